import json

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve
from torchmetrics.functional.classification import binary_calibration_error

from metilr.errors import UserError
from metilr.metrics import DISTRACTOR, acc, gap, gap_minus
from metilr.metrics.open_set import (
    aurc,
    auroc,
    calibration_error,
    decision_point,
    detection_identification_rate,
    fpr_at_tpr,
    open_set_figures,
    precision_recall,
    reliability,
    risk_coverage,
    threshold_for_precision,
)

# Ranked: right, distractor, wrong, distractor and right (a tie), right, distractor; given in another order.
CONFIDENCE = [-4.0, -0.1, -3.0, -1.0, -5.0, -2.0, -3.0]
PREDICTED = [3, 1, 9, 4, 6, 8, 5]
TARGET = [3, 1, DISTRACTOR, DISTRACTOR, DISTRACTOR, 2, 5]
CASE = CONFIDENCE, PREDICTED, TARGET


def answers(rng, n=200, n_confidences=None):
    """Met queries are right half the time, and then more confident; few confidences give ties, some at -inf."""
    target = rng.integers(-1, 3, n)
    target[:2] = 0, DISTRACTOR
    predicted = np.where(rng.random(n) < 0.5, target, 3)
    confidence = rng.standard_normal(n) + (predicted == target)
    if n_confidences is not None:
        confidence = np.floor(confidence * n_confidences / 4)
        confidence[confidence == confidence.min()] = -np.inf
    return confidence, predicted, target


def many_answers(seed):
    rng = np.random.default_rng(seed)
    return [answers(rng, n=n, n_confidences=c) for n in (7, 60, 200) for c in (None, 4, 12) for _ in range(4)]


def finite(confidence):
    """The same order for scikit-learn, which refuses -inf."""
    return np.maximum(confidence, -1e6)


def test_hand_worked_case():
    assert auroc(*CASE) == pytest.approx((3 + 2 + 1.5 + 1) / 12)
    assert fpr_at_tpr(*CASE) == pytest.approx(2 / 3)  # all four met queries must pass
    assert fpr_at_tpr(*CASE, level=0.5) == pytest.approx(1 / 3)
    assert fpr_at_tpr(*CASE, level=0.75) == pytest.approx(2 / 3)  # the tie passes together
    assert detection_identification_rate(*CASE, far=0) == 1 / 4
    assert detection_identification_rate(*CASE, far=0.34) == 1 / 4  # the right answer at -3 ties with a distractor
    assert detection_identification_rate(*CASE, far=0.67) == 3 / 4
    wrong = np.array([0, 1, 2, 3, 3, 3, 4])  # in order; at -3 the distractor is listed first
    coverage, risk = risk_coverage(*CASE)
    assert coverage == pytest.approx(np.arange(1, 8) / 7)
    assert risk == pytest.approx([0, 1 / 2, 2 / 3, 3 / 4, 3 / 5, 3 / 6, 4 / 7])
    assert aurc(*CASE) == pytest.approx(np.mean(wrong / np.arange(1, 8)))
    precision, recall = precision_recall(*CASE)
    assert precision == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4, 2 / 5, 3 / 6, 3 / 7])
    assert recall == pytest.approx([1 / 4, 1 / 4, 1 / 4, 1 / 4, 2 / 4, 3 / 4, 3 / 4])
    assert threshold_for_precision(*CASE, precision=1) == (-0.55, 1, 1 / 4, 1)
    assert threshold_for_precision(*CASE, precision=0.5) == (-4.5, 1 / 2, 3 / 4, 6)
    assert threshold_for_precision(*CASE, precision=0.41) == (-5, 3 / 7, 3 / 4, 7)


def test_auroc_equals_scikit_learn():
    for confidence, predicted, target in many_answers(0):
        expected = roc_auc_score(target != DISTRACTOR, finite(confidence))
        assert auroc(confidence, predicted, target) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("level", [0.07, 0.5, 0.95, 1.0])
def test_fpr_equals_scikit_learn(level):
    for confidence, predicted, target in many_answers(1):
        fpr, tpr, _ = roc_curve(target != DISTRACTOR, finite(confidence), drop_intermediate=False)
        assert fpr_at_tpr(confidence, predicted, target, level) == fpr[tpr >= level].min()


def test_level_is_met_exactly_where_the_product_with_the_number_of_queries_is_not_exact():
    assert 0.07 * 100 > 7
    confidence = np.concatenate([-np.arange(100.0), -np.arange(100.0) - 0.5])
    target = np.repeat([0, DISTRACTOR], 100)
    assert fpr_at_tpr(confidence, target, target, level=0.07) == 0.06


@pytest.mark.parametrize("far", [0.0, 0.01, 0.1, 0.3, 1.0])
def test_detection_identification_rate_equals_the_best_of_all_thresholds(far):
    for confidence, predicted, target in many_answers(2):
        met = target != DISTRACTOR
        best = 0.0
        for threshold in [*confidence, np.inf]:
            if np.mean(confidence[~met] >= threshold) <= far:
                best = max(best, np.mean((confidence >= threshold)[met] & (predicted == target)[met]))
        assert detection_identification_rate(confidence, predicted, target, far) == pytest.approx(best, abs=1e-14)


def test_detection_identification_rate_at_the_end_is_acc():
    _, predicted, target = CASE
    lowest = np.where(np.array(target) == DISTRACTOR, 0, -np.inf)  # even where nothing is less confident
    assert detection_identification_rate(lowest, predicted, target, far=1) == acc(*CASE) == 3 / 4


def test_risk_coverage_equals_a_loop():
    for confidence, predicted, target in many_answers(3):
        n_wrong, risks = 0, []
        for n, i in enumerate(sorted(range(len(target)), key=lambda i: -confidence[i]), start=1):
            n_wrong += target[i] == DISTRACTOR or predicted[i] != target[i]
            risks.append(n_wrong / n)
        coverage, risk = risk_coverage(confidence, predicted, target)
        assert coverage == pytest.approx(np.linspace(0, 1, len(target) + 1)[1:])
        assert risk == pytest.approx(risks, abs=1e-14)
        assert aurc(confidence, predicted, target) == pytest.approx(sum(risks) / len(risks), abs=1e-14)


def test_step_area_of_precision_recall_is_gap():
    for case in many_answers(4):
        precision, recall = precision_recall(*case)
        assert (precision * np.diff(recall, prepend=0)).sum() == pytest.approx(gap(*case), abs=1e-14)
        assert recall[-1] == acc(*case)


@pytest.mark.parametrize("wanted", [0.05, 0.3, 0.5, 0.7, 1.0])
def test_threshold_for_precision_equals_the_lowest_of_all_thresholds(wanted):
    found = []
    for confidence, predicted, target in many_answers(5):
        met = target != DISTRACTOR
        right = met & (predicted == target)
        possible = [t for t in confidence if t > -np.inf and right[confidence >= t].mean() >= wanted]
        point = threshold_for_precision(confidence, predicted, target, wanted)
        found.append(point is not None)
        assert found[-1] == bool(possible)
        if point is not None:
            accepted = confidence >= min(possible)
            assert np.array_equal(confidence >= point.threshold, accepted)
            expected = right[accepted].mean(), (right & accepted).sum() / met.sum(), accepted.sum()
            assert point[1:] == pytest.approx(expected, abs=1e-14)
    assert any(found)


def test_a_precision_that_no_threshold_reaches_has_none():
    # The right answer comes first in its tie, but a threshold accepts or rejects both.
    assert threshold_for_precision([0, 0], [1, 2], [1, DISTRACTOR], 0.51) is None
    assert threshold_for_precision([0, 0], [1, 2], [1, DISTRACTOR], 0.5) == (0, 0.5, 1, 2)
    assert threshold_for_precision([-np.inf], [1], [1], 0.5) is None


def probable_answers(seed):
    """Answers whose confidence is a probability, some at the ends of bins, some skipped."""
    for confidence, predicted, target in many_answers(seed):
        probability = 1 / (1 + np.exp(-confidence))
        probability[::5] = np.round(probability[::5], 1)
        with np.errstate(divide="ignore"):
            yield np.log(probability), predicted, target


@pytest.mark.parametrize("n_bins", [1, 10, 15])
def test_reliability_equals_a_loop_over_the_bins(n_bins):
    for log_confidence, predicted, target in probable_answers(7):
        bins = {}
        for sure, answer, shown in zip(log_confidence, predicted, target, strict=True):
            if sure > -np.inf:
                place = next(i for i in range(n_bins) if np.exp(sure) * n_bins < i + 1 or i == n_bins - 1)
                bins.setdefault(place, []).append((np.exp(sure), shown != DISTRACTOR and answer == shown))
        expected = [(*np.mean(bins[place], axis=0), len(bins[place])) for place in sorted(bins)]
        confidence, right, counts = reliability(log_confidence, predicted, target, n_bins)
        assert np.stack([confidence, right, counts], axis=1) == pytest.approx(np.array(expected), abs=1e-12)
        error = sum(abs(sure - share) * n for sure, share, n in expected) / sum(n for *_, n in expected)
        found = calibration_error(log_confidence, predicted, target, n_bins)
        assert found == pytest.approx(error, abs=1e-12)


@pytest.mark.parametrize("n_bins", [1, 10, 15])
def test_calibration_error_equals_torchmetrics(n_bins):
    """Of confidences that are in no two bins: at their ends it rounds to float32."""
    for confidence, predicted, target in many_answers(8):
        probability = (np.floor(n_bins / (1 + np.exp(-confidence))) + 0.3) / n_bins
        right = torch.from_numpy((target != DISTRACTOR) & (predicted == target))
        expected = binary_calibration_error(torch.from_numpy(probability), right.long(), n_bins, norm="l1")
        found = calibration_error(np.log(probability), predicted, target, n_bins)
        assert found == pytest.approx(expected.item(), abs=1e-6)


def test_a_worked_calibration_error():
    case = np.log([0.95, 1.0, 0.85, 0.05]), [1, 2, 3, 4], [1, 2, DISTRACTOR, 5]
    confidence, right, counts = reliability(*case)
    assert (
        confidence == pytest.approx([0.05, 0.85, 0.975])
        and right.tolist() == [0, 0, 1]
        and counts.tolist() == [1, 1, 2]
    )
    assert calibration_error(*case) == pytest.approx((0.05 + 0.85 + 2 * 0.025) / 4)
    assert calibration_error([-np.inf], [-1], [1]) == 0


@pytest.mark.parametrize("precision", [0.3, 0.5, 0.9, 1.0])
def test_a_probability_is_accepted_from_the_precision_on(precision):
    for log_confidence, predicted, target in probable_answers(9):
        right = (target != DISTRACTOR) & (predicted == target)
        accepted = [i for i, sure in enumerate(log_confidence) if sure >= np.log(precision)]
        n_right = sum(right[i] for i in accepted)
        expected = (
            np.log(precision),
            n_right / max(len(accepted), 1),
            n_right / sum(target != DISTRACTOR),
            len(accepted),
        )
        case = log_confidence, predicted, target, precision
        assert decision_point(*case, is_probability=True) == pytest.approx(expected, abs=1e-14)
        assert decision_point(*case, is_probability=False) == threshold_for_precision(*case)


def test_figures_are_those_of_their_queries_alone():
    rng = np.random.default_rng(6)
    confidence, predicted, target = answers(rng)
    met = target != DISTRACTOR
    kinds = np.where(met, "met", rng.choice(["other-artwork", "non-art"], len(target)))
    figures = open_set_figures(confidence, predicted, target, kinds.tolist(), np.array([1, 3, 5]))
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures

    everything = confidence, predicted, target
    assert figures["auroc"] == auroc(*everything) and figures["fpr95"] == fpr_at_tpr(*everything, level=0.95)
    assert figures["aurc"] == aurc(*everything)
    assert figures["dir"] == {
        "0.01": detection_identification_rate(*everything, far=0.01),
        "0.1": detection_identification_rate(*everything, far=0.1),
    }
    assert figures["dir"]["0.01"] < figures["dir"]["0.1"]

    assert figures["by_kind"].keys() == {"other-artwork", "non-art"}
    for kind, of_kind in figures["by_kind"].items():
        scores = np.concatenate([confidence[met], confidence[kinds == kind]])
        truth = np.concatenate([np.ones(met.sum()), np.zeros((kinds == kind).sum())])
        fpr, tpr, _ = roc_curve(truth, scores, drop_intermediate=False)
        assert of_kind["n"] == (kinds == kind).sum()
        assert of_kind["auroc"] == pytest.approx(roc_auc_score(truth, scores))
        assert of_kind["fpr95"] == pytest.approx(fpr[tpr >= 0.95].min())
        kept = met | (kinds == kind)
        alone = confidence[kept], predicted[kept], target[kept]
        assert of_kind["aurc"] == aurc(*alone)
        assert of_kind["dir"]["0.1"] == detection_identification_rate(*alone, far=0.1)

    for label, size in enumerate(["1", "2-3", "4+"]):
        shown = confidence[target == label], predicted[target == label], target[target == label]
        of_size = figures["by_class_size"][size]
        assert (of_size["n"], of_size["acc"], of_size["gap_minus"]) == (len(shown[0]), acc(*shown), gap_minus(*shown))
        kept = (target == label) | ~met
        assert of_size["auroc"] == auroc(confidence[kept], predicted[kept], target[kept])


def test_class_sizes_fall_into_their_bins():
    target = np.arange(6)
    figures = open_set_figures(-target, target, target, ["met"] * 6, np.array([1, 1, 2, 3, 4, 90]))
    assert {size: of_size["n"] for size, of_size in figures["by_class_size"].items()} == {"1": 2, "2-3": 2, "4+": 2}


def test_undefined_figures_are_none():
    figures = open_set_figures([0, -np.inf], [0, 0], [0, 1], ["met", "met"], np.array([2, 3, 1]))
    rejection = {"auroc": None, "fpr95": None, "dir": {"0.01": None, "0.1": None}}
    nothing = {"n": 0, "acc": None, "gap_minus": None, "aurc": None, **rejection}
    some = {"n": 2, "acc": 0.5, "gap_minus": 0.5, "aurc": 0.25, **rejection}
    assert figures == {
        **rejection, "aurc": 0.25, "by_kind": {}, "by_class_size": {"1": nothing, "2-3": some, "4+": nothing},
    }  # fmt: skip
    json.dumps(figures, allow_nan=False)


def test_figures_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="1 kinds for 2 queries"):
        open_set_figures([0, -1], [0, 1], [0, DISTRACTOR], ["met"], np.array([1]))
    with pytest.raises(ValueError, match="no database image"):
        open_set_figures([0, -1], [0, 1], [0, 1], ["met", "met"], np.array([1, 0]))
    with pytest.raises(UserError, match="no query shows an exhibit"):
        open_set_figures([0], [0], [DISTRACTOR], ["non-art"], np.array([1]))


@pytest.mark.parametrize("metric", [auroc, fpr_at_tpr, lambda *case: detection_identification_rate(*case, far=0.1)])
def test_distractors_are_needed(metric):
    with pytest.raises(UserError, match="every query shows an exhibit"):
        metric([0, -1], [1, 2], [1, 2])


@pytest.mark.parametrize(
    "metric",
    [
        auroc,
        fpr_at_tpr,
        risk_coverage,
        aurc,
        precision_recall,
        reliability,
        calibration_error,
        lambda *case: decision_point(*case, precision=0.9, is_probability=True),
        lambda *case: detection_identification_rate(*case, far=0.1),
        lambda *case: threshold_for_precision(*case, precision=0.9),
    ],
)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, -1], [1, 2], [DISTRACTOR, DISTRACTOR]), "no query shows an exhibit"),
        (([0, np.nan], [1, 2], [1, DISTRACTOR]), "query 1 is NaN"),
        (([0, -1], [1], [1, DISTRACTOR]), "of one length"),
    ],
)
def test_refuses(metric, arguments, message):
    with pytest.raises(UserError, match=message):
        metric(*arguments)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_refuses_shares_out_of_range(share):
    with pytest.raises(UserError, match="level"):
        fpr_at_tpr(*CASE, level=share)
    with pytest.raises(UserError, match="far"):
        detection_identification_rate(*CASE, far=share)
    with pytest.raises(UserError, match="precision"):
        threshold_for_precision(*CASE, precision=share)
    with pytest.raises(UserError, match="precision"):
        decision_point(*CASE, precision=share, is_probability=True)


def test_refuses_to_accept_nothing():
    with pytest.raises(UserError, match="above 0"):
        fpr_at_tpr(*CASE, level=0)
    with pytest.raises(UserError, match="above 0"):
        threshold_for_precision(*CASE, precision=0)
    with pytest.raises(UserError, match="above 0"):
        decision_point(*CASE, precision=0, is_probability=True)
