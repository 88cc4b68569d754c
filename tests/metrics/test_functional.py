import itertools

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torchmetrics.retrieval import RetrievalMAP, RetrievalRecall

from metilr.errors import UserError
from metilr.metrics import DISTRACTOR, acc, gap, gap_bounds, gap_minus, mean_average_precision, recall_at

# Ranked: right, wrong (distractor), right, wrong (met), wrong (distractor); given in another order.
CONFIDENCE = [-3.0, -0.1, -5.0, -2.0, -4.0]
PREDICTED = [7, 1, 8, 9, 2]
TARGET = [7, 1, DISTRACTOR, DISTRACTOR, 3]


def loop(confidence, predicted, target):
    """The definition: (1/M) Σ p(i) r(i), queries ranked by confidence."""
    ranked = sorted(zip(confidence, predicted, target, strict=True), key=lambda answer: -answer[0])
    n_right, total = 0, 0.0
    for i, (_, answer, truth) in enumerate(ranked, start=1):
        right = answer == truth and truth != DISTRACTOR
        n_right += right
        total += right * n_right / i
    return total / sum(truth != DISTRACTOR for truth in target)


def answers(rng, n=200, n_confidences=None):
    confidence = -rng.random(n) if n_confidences is None else rng.integers(0, n_confidences, n) - 5.0
    return confidence, rng.integers(0, 3, n), rng.integers(-1, 3, n)


def test_hand_worked_case():
    assert gap(CONFIDENCE, PREDICTED, TARGET) == pytest.approx((1 / 1 + 2 / 3) / 3)
    assert gap_minus(CONFIDENCE, PREDICTED, TARGET) == pytest.approx((1 / 1 + 2 / 2) / 3)
    assert acc(CONFIDENCE, PREDICTED, TARGET) == pytest.approx(2 / 3)


@pytest.mark.parametrize("n_confidences", [None, 4])
def test_equals_the_loop(n_confidences):
    rng = np.random.default_rng(0)
    for _ in range(20):
        confidence, predicted, target = answers(rng, n_confidences=n_confidences)
        met = target != DISTRACTOR
        assert gap(confidence, predicted, target) == pytest.approx(loop(confidence, predicted, target), abs=1e-14)
        assert gap_minus(confidence, predicted, target) == pytest.approx(
            loop(confidence[met], predicted[met], target[met]), abs=1e-14
        )
        assert acc(confidence, predicted, target) == np.mean(predicted[met] == target[met])


def test_relation_to_average_precision():
    # Without ties, AP divides the same sum by the number of right answers instead of met queries.
    confidence, predicted, target = answers(np.random.default_rng(1))
    right = (predicted == target) & (target != DISTRACTOR)
    expected = average_precision_score(right, confidence) * right.sum() / (target != DISTRACTOR).sum()
    assert gap(confidence, predicted, target) == pytest.approx(expected, abs=1e-14)


def test_ends_of_the_range():
    assert gap([0, -1], [4, 5], [4, 5]) == gap_minus([0, -1], [4, 5], [4, 5]) == 1.0
    assert gap([0, -1], [5, 4], [4, 5]) == acc([0, -1], [5, 4], [4, 5]) == 0.0


def test_a_distractor_is_never_right():
    assert gap([0, -1], [DISTRACTOR, 2], [DISTRACTOR, 2]) == 0.5
    assert acc([0, -1], [DISTRACTOR, 2], [DISTRACTOR, 2]) == 1.0


def test_ties_keep_input_order():
    assert gap([0, 0], [1, 2], [1, DISTRACTOR]) == 1.0
    assert gap([0, 0], [2, 1], [DISTRACTOR, 1]) == 0.5


def test_minus_infinity_ranks_last():
    assert gap([-np.inf, -1e300, -1], [1, 2, 9], [1, 2, DISTRACTOR]) == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_bounds_are_reached_by_some_order_and_passed_by_none():
    rng = np.random.default_rng(2)
    widths = []
    for _ in range(15):
        confidence, predicted, target = answers(rng, n=6, n_confidences=2)
        target[0] = 1
        values = [
            gap(confidence[list(order)], predicted[list(order)], target[list(order)])
            for order in itertools.permutations(range(6))
        ]
        bounds = gap_bounds(confidence, predicted, target)
        assert bounds == pytest.approx((min(values), max(values)), abs=1e-14)
        widths.append(bounds[1] - bounds[0])
    assert max(widths) > 0.1


@pytest.mark.parametrize("metric", [gap, gap_minus, acc, gap_bounds])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, -1], [1, 2], [DISTRACTOR, DISTRACTOR]), "no query shows an exhibit"),
        (([], [], []), "no query shows an exhibit"),
        (([0, np.nan], [1, 2], [1, 2]), "query 1 is NaN"),
        (([0, -1], [1], [1, 2]), "of one length"),
        (([[0, -1]], [[1, 2]], [[1, 2]]), "1-D"),
    ],
)
def test_refuses(metric, arguments, message):
    with pytest.raises(UserError, match=message):
        metric(*arguments)


def test_recall_and_map_over_exhibits_are_torchmetrics_and_scikit_learn_s():
    """Over a whole ranking of exhibits, of which each met query has one right one."""
    rng = np.random.default_rng(0)
    scores, target = rng.random((40, 12)), rng.integers(-1, 12, 40)  # torchmetrics passes over scores below 0
    met = target != DISTRACTOR
    ranks = np.where(met, 1 + (scores > np.take_along_axis(scores, target[:, None], axis=1)).sum(axis=1), np.nan)
    relevant = np.arange(12) == target[met, None]
    flat = [torch.from_numpy(each.ravel()) for each in (scores[met], relevant)]
    query = torch.arange(met.sum()).repeat_interleave(12)
    for k in (1, 5, 10, 12):
        assert recall_at(ranks, k) == pytest.approx(float(RetrievalRecall(top_k=k)(*flat, indexes=query)))
    precisions = [average_precision_score(*pair) for pair in zip(relevant, scores[met], strict=True)]
    assert mean_average_precision(ranks) == pytest.approx(np.mean(precisions))
    assert mean_average_precision(ranks) == pytest.approx(float(RetrievalMAP()(*flat, indexes=query)))


def test_recall_and_map_by_hand():
    ranks = [1, 4, np.nan, np.inf, 2]  # the third shows no exhibit, the fourth one that nobody could find
    assert [recall_at(ranks, k) for k in (1, 2, 3, 4, 1000)] == [1 / 4, 2 / 4, 2 / 4, 3 / 4, 3 / 4]
    assert mean_average_precision(ranks) == (1 + 1 / 4 + 0 + 1 / 2) / 4


def test_recall_and_map_refuse_what_is_no_rank():
    for ranks in ([0, 1], [-1.0], [1.5]):
        with pytest.raises(UserError, match="ranks must be whole numbers from 1 on, inf or NaN"):
            recall_at(ranks, 1)
    with pytest.raises(UserError, match="no query shows an exhibit"):
        mean_average_precision([np.nan])
    with pytest.raises(UserError, match="k 0: choose 1 or more"):
        recall_at([1], 0)
