"""What inliers do to answers, against loops; nothing that is tuned lowers GAP on val."""

import math

import numpy as np
import pytest

from metilr.geometry.evidence import (
    BOOST_GRID,
    ENOUGH_GRID,
    OFF,
    WEIGHT_GRID,
    Checked,
    Gate,
    apply_evidence,
    inlier_lead,
    inliers_of_answers,
    reordered,
    tune_evidence,
)
from metilr.metrics.functional import acc, gap
from metilr.retrieval.knn import NO_LABEL, NO_ROW, Matches, Predictions


def test_the_gate_is_its_formula() -> None:
    log_confidence, inliers = np.array([-0.1, -2.0, 0.0, -np.inf]), np.array([0, 5, 200, 7])
    gated = Gate(weight=2.0, enough=30.0).apply(log_confidence, inliers)
    for before, n, after in zip(log_confidence.tolist(), inliers.tolist(), gated.tolist(), strict=True):
        assert math.exp(after) == pytest.approx(math.exp(before) * ((1 + n) / (1 + n + 30)) ** 2)
        assert after <= before
    np.testing.assert_array_equal(OFF.apply(log_confidence, inliers), log_confidence)


DATABASE_LABELS = np.array([3, 1, 2, 3, 5])  # rows 0 and 3 show the same


def answers(labels, log_confidence, similarity, nearest) -> Predictions:
    return Predictions(*(np.array(x) for x in (labels, log_confidence, similarity, nearest)))


def checked(rows, similarities, inliers, tau=10.0) -> Checked:
    return Checked(Matches(np.array(rows), np.array(similarities)), np.array(inliers), DATABASE_LABELS, 6, tau)


def test_inliers_and_lead_of_an_answer() -> None:
    found = checked([[0, 1, 3], [2, 1, NO_ROW], [NO_ROW] * 3], np.zeros((3, 3)), [[4, 90, 7], [8, 3, 0], [0, 0, 0]])
    given = answers([3, 2, NO_LABEL], [0, 0, 0], [0, 0, 0], [0, 0, 0])
    assert inliers_of_answers(given, found).tolist() == [7, 8, 0]
    assert inlier_lead(given, found).tolist() == [0, 5, 0]
    nothing = checked(np.empty((3, 0), int), np.empty((3, 0)), np.empty((3, 0), int))
    assert inliers_of_answers(given, nothing).tolist() == inlier_lead(given, nothing).tolist() == [0, 0, 0]


def test_a_boost_reorders_as_its_formula_says() -> None:
    found = checked(
        [[0, 1, 2], [0, 1, 2], [4, NO_ROW, NO_ROW], [NO_ROW] * 3],
        [[0.5, 0.4, 0.1], [0.9, 0.2, 0.1], [0.3, np.nan, np.nan], [np.nan] * 3],
        [[3, 60, 2], [9, 30, 0], [0, 0, 0], [0, 0, 0]],
    )
    given = answers([3, 3, 5, NO_LABEL], [-0.2, -0.1, -3.0, -np.inf], [0.5, 0.9, 0.3, np.nan], [0, 0, 4, NO_ROW])
    result = reordered(given, found, boost=1.0)
    # 0.5 + 1 * 3/33 against 0.4 + 1 * 60/90: row 1 wins; 0.9 + 9/39 against 0.2 + 30/60: row 0 stays.
    assert result.labels.tolist() == [1, 3, 5, NO_LABEL] and result.nearest.tolist() == [1, 0, 4, NO_ROW]
    np.testing.assert_array_equal(result.similarity, [0.4, 0.9, 0.3, np.nan])
    boosted = [[0.5 + 3 / 33, 0.4 + 60 / 90, 0.1 + 2 / 32], [0.9 + 9 / 39, 0.2 + 30 / 60, 0.1], [0.3]]
    for scores, log_confidence in zip(boosted, result.log_confidence, strict=False):
        every_class = scores + [0.0] * (6 - len(scores))
        softmax = math.exp(10 * max(scores)) / sum(math.exp(10 * score) for score in every_class)
        assert log_confidence == pytest.approx(math.log(softmax))
    assert result.log_confidence[3] == -np.inf
    assert reordered(given, found, boost=0.0) is given


def checked_museum(seed: int, informative: bool):
    """Answers to 60 queries with 4 candidates of different classes, a third of the queries distractors."""
    rng = np.random.default_rng(seed)
    target = np.where(np.arange(60) < 40, rng.integers(0, 12, 60), -1)
    rows = np.array([rng.permutation(12)[:4] for _ in range(60)])
    for i in range(0, 40, 2):  # half of the met queries have the right exhibit among their candidates
        if target[i] not in rows[i]:
            rows[i, rng.integers(4)] = target[i]
    similarities = -np.sort(-rng.uniform(0, 0.6, (60, 4)), axis=1)
    is_right = rows == target[:, None]
    inliers = np.where(is_right & informative, rng.integers(30, 200, (60, 4)), rng.integers(0, 15, (60, 4)))
    given = answers(rows[:, 0], -rng.exponential(1, 60), similarities[:, 0], rows[:, 0])
    return given, Checked(Matches(rows, similarities), inliers, np.arange(12), 12, 10.0), target


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("informative", [True, False])
@pytest.mark.parametrize("reorder", [True, False])
def test_what_is_tuned_is_the_best_of_the_grid_on_val(seed: int, informative: bool, reorder: bool) -> None:
    given, found, target = checked_museum(seed, informative)

    def reached(boost: float, gate: Gate) -> float:
        result = apply_evidence(given, found, boost, gate)
        return gap(result.log_confidence, result.labels, target)

    boost, gate = tune_evidence(given, found, target, reorder)
    assert boost == 0 or reorder
    gates = [Gate(weight, enough) for weight in WEIGHT_GRID for enough in ENOUGH_GRID]
    everything = {(b, g): reached(b, g) for b in (BOOST_GRID if reorder else (0.0,)) for g in gates}
    highest = max(everything.values())
    assert highest >= gap(given.log_confidence, given.labels, target) + 0.05 * informative
    assert (boost, gate) == next(choice for choice, value in everything.items() if value == highest)
    result = apply_evidence(given, found, boost, gate)
    before, after = (acc(a.log_confidence, a.labels, target) for a in (given, result))
    if reorder and informative:
        assert after > before
    if not reorder:
        np.testing.assert_array_equal(result.labels, given.labels)
