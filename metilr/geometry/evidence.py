"""What inliers do to answers: the confidence of those with few falls, and they can decide between candidates.

Knows arrays alone, of Q queries with M candidates each; the parameters are chosen by GAP on val.
"""

from dataclasses import dataclass, replace

import numpy as np

from metilr.metrics.functional import gap
from metilr.retrieval.knn import NO_ROW, Matches, Predictions, log_confidence

BOOST_GRID = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)  # 0 leaves the order; 4 is beyond what similarities can outweigh
ENOUGH_TO_REORDER = 30.0  # inliers, see ``reordered``
WEIGHT_GRID = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # 0 is off
ENOUGH_GRID = (10.0, 30.0, 100.0)  # wrong matches of 1200 features have 0 to 20 inliers, right ones 20 to 400


@dataclass(frozen=True)
class Gate:
    """How inliers change the confidence of an answer: confidence · ((1 + n) / (1 + n + enough)) ^ weight.

    n is the number of inliers by which the answer leads: many leave the confidence as it is, few lower it. ``enough``,
    above 0, is about how many are many.
    """

    weight: float
    enough: float

    def apply(self, log_confidence: np.ndarray, inliers: np.ndarray) -> np.ndarray:
        """Return log_confidence − weight · log1p(enough / (1 + n)), ``(Q,)``."""
        return log_confidence - self.weight * np.log1p(self.enough / (1 + inliers))


GATES = [Gate(weight, enough) for weight in WEIGHT_GRID for enough in ENOUGH_GRID]
OFF = GATES[0]


@dataclass(frozen=True, eq=False)
class Checked:
    """What was checked of the answers to Q queries."""

    matches: Matches  # candidates of each query, the first M of which were checked
    inliers: np.ndarray  # of those, int64 (Q, M)
    database_labels: np.ndarray  # class of each database row, (N,)
    n_classes: int
    tau: float

    @property
    def rows(self) -> np.ndarray:
        """The candidates that were checked, ``(Q, M)``."""
        return self.matches.rows[:, : self.inliers.shape[1]]


def tune_evidence(answers: Predictions, checked: Checked, target: np.ndarray, reorder: bool) -> tuple[float, Gate]:
    """Choose the boost (0 without ``reorder``) and the gate by GAP on val, whose true labels are ``target``, ``(Q,)``.

    Neither is among the choices, so GAP on val never falls; of equal GAPs the first in the grids' order counts.
    """
    best, highest = (0.0, OFF), -1.0
    for boost in BOOST_GRID if reorder else (0.0,):
        changed = reordered(answers, checked, boost)
        lead = inlier_lead(changed, checked)
        for gate in GATES:
            reached = gap(gate.apply(changed.log_confidence, lead), changed.labels, target)
            if reached > highest:
                best, highest = (boost, gate), reached
    return best


def apply_evidence(answers: Predictions, checked: Checked, boost: float, gate: Gate) -> Predictions:
    """Reorder and gate answers by what ``tune_evidence`` chose."""
    changed = reordered(answers, checked, boost)
    return replace(changed, log_confidence=gate.apply(changed.log_confidence, inlier_lead(changed, checked)))


def reordered(answers: Predictions, checked: Checked, boost: float) -> Predictions:
    """Answer with the candidate of largest s + boost · n / (n + ENOUGH_TO_REORDER), s its similarity, n its inliers.

    The first of equal ones. The log-confidence is the classifier's with these numbers in place of similarities, 0 for
    classes that are no candidate. A boost of 0 leaves the answers as they are.
    """
    rows = checked.rows
    if boost == 0 or not rows.shape[1]:
        return answers
    is_there = rows != NO_ROW
    similarities = checked.matches.similarities[:, : rows.shape[1]]
    boosted = similarities + boost * checked.inliers / (checked.inliers + ENOUGH_TO_REORDER)
    boosted = np.where(is_there, boosted, -np.inf)
    place = boosted.argmax(axis=1)[:, None]
    row, similarity, best = (np.take_along_axis(array, place, axis=1)[:, 0] for array in (rows, similarities, boosted))
    is_answered = row != NO_ROW
    best = np.where(is_answered, best, 0)
    behind = np.where(np.arange(rows.shape[1]) == place, -np.inf, boosted - best[:, None])
    sure = log_confidence(behind, checked.n_classes - is_there.sum(axis=1), best, checked.tau)
    return Predictions(
        labels=np.where(is_answered, checked.database_labels[row], answers.labels),
        log_confidence=np.where(is_answered, sure, answers.log_confidence),
        similarity=np.where(is_answered, similarity, answers.similarity),
        nearest=np.where(is_answered, row, answers.nearest),
    )


def inliers_of_answers(answers: Predictions, checked: Checked) -> np.ndarray:
    """Return the most inliers with a candidate of the answered class, int64 ``(Q,)``; 0 without such a candidate."""
    return np.where(_speaks(answers, checked), checked.inliers, 0).max(axis=1, initial=0)


def inlier_lead(answers: Predictions, checked: Checked) -> np.ndarray:
    """Return how many inliers more an answer has than any other candidate, int64 ``(Q,)``, at least 0."""
    others = np.where(_speaks(answers, checked), 0, checked.inliers).max(axis=1, initial=0)
    return np.maximum(inliers_of_answers(answers, checked) - others, 0)


def _speaks(answers: Predictions, checked: Checked) -> np.ndarray:
    """Which candidates are of the answered class, bool ``(Q, M)``."""
    rows = checked.rows
    return (checked.database_labels[rows] == answers.labels[:, None]) & (rows != NO_ROW)
