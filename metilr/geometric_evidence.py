"""What inliers do to answers: the confidence of those with few falls, and they can decide between candidates.

Knows arrays alone; the parameters are chosen by GAP on val.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from metilr.knn import NO_ROW, Predictions
from metilr.matches import Matches
from metilr.metrics.functional import gap

BOOST_GRID = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)  # 0 leaves the order; 4 is beyond what similarities can outweigh
ENOUGH_TO_REORDER = 30.0  # inliers, see ``reordered``
WEIGHT_GRID = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # 0 is off
ENOUGH_GRID = (10.0, 30.0, 100.0)  # wrong matches of 1200 features have 0 to 20 inliers, right ones 20 to 400


@dataclass(frozen=True)
class Gate:
    """How inliers change the confidence of an answer: confidence · ((1 + n) / (1 + n + enough)) ^ weight.

    n is the number of inliers. Many leave the confidence as it is, few lower it, and it stays below 1.

    Attributes:
        weight: 0 or more; 0 leaves every confidence as it is.
        enough: Inliers from about which on more make little difference, above 0.
    """

    weight: float
    enough: float

    def apply(self, log_confidence: np.ndarray, inliers: np.ndarray) -> np.ndarray:
        """Return the gated logarithm of the confidence, log_confidence − weight · log1p(enough / (1 + n)).

        Args:
            log_confidence: ``(Q,)``; -inf stays.
            inliers: Of each answer, see ``inliers_of_answers``, ``(Q,)``.

        Returns:
            float64 ``(Q,)``, nowhere larger than before.
        """
        return log_confidence - self.weight * np.log1p(self.enough / (1 + inliers))


OFF = Gate(0.0, ENOUGH_GRID[0])


def tune_evidence(
    answers: Predictions,
    matches: Matches,
    database_labels: np.ndarray,
    inliers: np.ndarray,
    tau: float,
    target: np.ndarray,
    reorder: bool,
) -> tuple[float, Gate]:
    """Choose the boost (0 without ``reorder``) and the gate by GAP on val.

    Nothing is among the choices, so GAP on val is never lower with them than without. Equal GAPs: the smaller boost,
    then as ``tune_gate``.

    Args:
        answers: To the Q queries of val.
        matches: Their candidates, the first M of which were checked.
        database_labels: Class of each database row, ``(N,)``.
        inliers: Of the candidates, ``(Q, M)``.
        tau: Inverse temperature.
        target: True labels, ``(Q,)``.
        reorder: Whether labels may change.
    """
    best, highest = (0.0, OFF), -1.0
    for boost in BOOST_GRID if reorder else (0.0,):
        changed = reordered(answers, matches, database_labels, inliers, boost, tau)
        evidence = inliers_of_answers(changed, matches, database_labels, inliers)
        gate = tune_gate(changed.log_confidence, changed.labels, target, evidence)
        reached = gap(gate.apply(changed.log_confidence, evidence), changed.labels, target)
        if reached > highest:
            best, highest = (boost, gate), reached
    return best


def apply_evidence(
    answers: Predictions,
    matches: Matches,
    database_labels: np.ndarray,
    inliers: np.ndarray,
    tau: float,
    boost: float,
    gate: Gate,
) -> Predictions:
    """Reorder and gate answers; arguments as those of ``tune_evidence`` and what that returns."""
    changed = reordered(answers, matches, database_labels, inliers, boost, tau)
    evidence = inliers_of_answers(changed, matches, database_labels, inliers)
    return dataclasses.replace(changed, log_confidence=gate.apply(changed.log_confidence, evidence))


def reordered(
    answers: Predictions, matches: Matches, database_labels: np.ndarray, inliers: np.ndarray, boost: float, tau: float
) -> Predictions:
    """Answer with the candidate of largest similarity + boost · n / (n + ENOUGH_TO_REORDER), n its inliers.

    The first of equal ones. The confidence becomes that of the new answer: in the softmax, classes differ by tau times
    the difference of their similarities. Unlike a gate this changes labels, so ACC as well.

    Args:
        answers: To Q queries.
        matches: Their candidates, the first M of which were checked.
        database_labels: Class of each database row, ``(N,)``.
        inliers: Of the candidates, ``(Q, M)``.
        boost: 0 leaves the answers as they are.
        tau: Inverse temperature.
    """
    if boost == 0 or not inliers.shape[1]:
        return answers
    rows, similarities = (array[:, : inliers.shape[1]] for array in (matches.rows, matches.similarities))
    scores = np.where(rows == NO_ROW, -np.inf, similarities + boost * inliers / (inliers + ENOUGH_TO_REORDER))
    place = scores.argmax(axis=1)[:, None]
    row, similarity = (np.take_along_axis(array, place, axis=1)[:, 0] for array in (rows, similarities))
    is_new = (row != NO_ROW) & (database_labels[row] != answers.labels)
    return Predictions(
        labels=np.where(is_new, database_labels[row], answers.labels),
        log_confidence=np.where(
            is_new, answers.log_confidence - tau * (answers.similarity - similarity), answers.log_confidence
        ),
        similarity=np.where(is_new, similarity, answers.similarity),
        nearest=np.where(is_new, row, answers.nearest),
    )


def inliers_of_answers(
    answers: Predictions, matches: Matches, database_labels: np.ndarray, inliers: np.ndarray
) -> np.ndarray:
    """Return the most inliers with a candidate of the answered class, int64 ``(Q,)``; 0 without such a candidate."""
    rows = matches.rows[:, : inliers.shape[1]]
    speaks = (database_labels[rows] == answers.labels[:, None]) & (rows != NO_ROW)
    return np.where(speaks, inliers, 0).max(axis=1, initial=0)


def tune_gate(
    log_confidence: np.ndarray,
    predicted: np.ndarray,
    target: np.ndarray,
    inliers: np.ndarray,
    weight_grid: Sequence[float] = WEIGHT_GRID,
    enough_grid: Sequence[float] = ENOUGH_GRID,
) -> Gate:
    """Choose a gate by GAP on val.

    No gate is among the choices, so GAP on val is never lower with the result than without. Equal GAPs: no gate,
    then the smaller weight, then the smaller ``enough``.

    Args:
        log_confidence: Of each answer, ``(Q,)``.
        predicted: Predicted labels, ``(Q,)``.
        target: True labels, ``(Q,)``; DISTRACTOR where no exhibit is shown.
        inliers: Of each answer, ``(Q,)``.
        weight_grid: Weights to try.
        enough_grid: Values of ``enough`` to try with each.
    """
    best, highest = OFF, gap(log_confidence, predicted, target)
    for weight in sorted(weight_grid):
        for enough in sorted(enough_grid):
            gate = Gate(weight, enough)
            reached = gap(gate.apply(log_confidence, inliers), predicted, target)
            if reached > highest:
                best, highest = gate, reached
    return best
