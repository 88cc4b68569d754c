"""How well the confidence tells right answers from wrong ones, and exhibits from all else, beyond GAP.

All take the three arrays of ``metilr.metrics.functional`` and refuse what it refuses; those that compare met queries
with distractors refuse queries without distractors, too. A threshold accepts the answers that are at least as
confident, so it cannot split equally confident ones. A met query counts by what it shows in ``auroc`` and
``fpr_at_tpr``, and by whether its answer is right in the rest.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from metilr.errors import UserError
from metilr.metrics.functional import DISTRACTOR, acc, checked, gap_minus

FARS = (0.01, 0.1)  # false alarm rates of the figures: the usual ones that some thousand distractors can still tell
CLASS_SIZES = {"1": (1, 1), "2-3": (2, 3), "4+": (4, np.inf)}  # database images of an exhibit; most have one


class OperatingPoint(NamedTuple):
    """Where to put the threshold, and what it gives."""

    threshold: float  # answers with at least this log-confidence are accepted
    precision: float  # share of accepted answers that are right
    recall: float  # share of met queries whose answer is right and accepted
    n_accepted: int  # few make a shaky threshold


def open_set_figures(
    log_confidence: ArrayLike, predicted: ArrayLike, target: ArrayLike, kinds: Sequence[str], class_sizes: np.ndarray
) -> dict[str, Any]:
    """Compute all figures of one split, ready for JSON: ``auroc``, ``fpr95``, ``aurc``, ``dir`` (by false alarm rate).

    The same by kind of distractor, ``by_kind``, with all met queries, and by the number of images of the shown exhibit,
    ``by_class_size``, with all distractors, there also ``acc`` and ``gap_minus``; ``n`` counts the distractors or met
    queries of the group. None where a figure is undefined: without distractors, or in a bin without queries.

    ``kinds`` says what each query shows, read at distractors only; ``class_sizes``, ``(n_classes,)``, how many images
    the database has of each class, some of a met query's.
    """
    confidence, _, is_met = checked(log_confidence, predicted, target)
    answers, truth, kind_of = np.asarray(predicted), np.asarray(target), np.asarray(kinds)
    if kind_of.shape != truth.shape:
        raise ValueError(f"{len(kinds)} kinds for {len(truth)} queries")
    sizes = np.asarray(class_sizes)[truth[is_met]]
    if sizes.min() < 1:
        raise ValueError("a met query's class has no database image in class_sizes")

    by_kind = {}
    for kind in np.unique(kind_of[~is_met]).tolist():
        kept = is_met | (kind_of == kind)
        n = int((kept & ~is_met).sum())
        by_kind[kind] = {"n": n, **_rejection_figures(confidence[kept], answers[kept], truth[kept])}
    by_class_size: dict[str, dict[str, Any]] = {}
    for name, (least, most) in CLASS_SIZES.items():
        of_size = np.zeros(len(truth), dtype=bool)
        of_size[np.flatnonzero(is_met)[(sizes >= least) & (sizes <= most)]] = True
        kept, alone = of_size | ~is_met, (confidence[of_size], answers[of_size], truth[of_size])
        by_class_size[name] = {
            "n": int(of_size.sum()),
            "acc": acc(*alone) if of_size.any() else None,
            "gap_minus": gap_minus(*alone) if of_size.any() else None,
            **_rejection_figures(confidence[kept], answers[kept], truth[kept]),
        }
    return {**_rejection_figures(confidence, answers, truth), "by_kind": by_kind, "by_class_size": by_class_size}


def _rejection_figures(confidence: np.ndarray, answers: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """The figures of some queries; None where met queries or distractors are missing."""
    is_met = truth != DISTRACTOR
    case = confidence, answers, truth
    both = is_met.any() and not is_met.all()
    return {
        "auroc": auroc(*case) if both else None,
        "fpr95": fpr_at_tpr(*case) if both else None,
        "aurc": aurc(*case) if is_met.any() else None,
        "dir": {f"{far:g}": detection_identification_rate(*case, far) if both else None for far in FARS},
    }


def auroc(log_confidence: ArrayLike, predicted: ArrayLike, target: ArrayLike) -> float:
    """Compute the area under the ROC curve, in [0, 1]: 0.5 is chance.

    The share of (met query, distractor) pairs in which the met query is surer; equal ones count half.

    Source: Hendrycks and Gimpel, A Baseline for Detecting Misclassified and Out-of-Distribution Examples, ICLR 2017.
    """
    met, _, distractors = _strata(log_confidence, predicted, target)
    distractors = np.sort(distractors)
    n_below = np.searchsorted(distractors, met, side="left")
    n_up_to = np.searchsorted(distractors, met, side="right")
    return float((n_below + n_up_to).sum() / (2 * len(met) * len(distractors)))


def fpr_at_tpr(log_confidence: ArrayLike, predicted: ArrayLike, target: ArrayLike, level: float = 0.95) -> float:
    """Compute the share of distractors accepted by the highest threshold that keeps a share of met queries, ``level``.

    Source: Liang et al., Enhancing the Reliability of Out-of-Distribution Image Detection, ICLR 2018.
    """
    if not 0 < level <= 1:
        raise UserError(f"level {level}: choose a share of met queries above 0, at most 1")
    met, _, distractors = _strata(log_confidence, predicted, target)
    # The share, not level * M rounded up, which is one query too many where the product is not exact.
    last_kept = (np.arange(1, len(met) + 1) / len(met) >= level).argmax()
    threshold = -np.sort(-met)[last_kept]
    return float((distractors >= threshold).mean())


def detection_identification_rate(
    log_confidence: ArrayLike, predicted: ArrayLike, target: ArrayLike, far: float
) -> float:
    """Compute DIR: the share of met queries that are right and accepted when at most ``far`` of distractors are.

    The threshold is as low as that allows: just above the most confident distractor that may not pass, so that an
    answer as confident is rejected with it. At ``far`` 1, DIR is ACC.

    Source: Phillips, Grother and Micheals, Evaluation Methods in Face Recognition, Handbook of Face Recognition,
    2011 (open-set identification, rank 1). NIST's FRVT reports 1 - DIR as FNIR at a FPIR of ``far``.
    """
    if not 0 <= far <= 1:
        raise UserError(f"far {far}: choose a share of distractors from 0 to 1")
    met, right, distractors = _strata(log_confidence, predicted, target)
    n_passing = (np.arange(1, len(distractors) + 1) / len(distractors) <= far).sum()
    if n_passing == len(distractors):
        return float(right.mean())
    first_stopped = -np.sort(-distractors)[n_passing]
    return float((right & (met > first_stopped)).mean())


def risk_coverage(log_confidence: ArrayLike, predicted: ArrayLike, target: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Compute coverage and risk of answering only the surest queries, both ``(Q,)`` float64.

    Coverage is the share of all queries that are answered, ascending, risk the share of these answers that are wrong,
    as are all to distractors. Queries are ranked as in ``gap``.

    Source: Geifman and El-Yaniv, Selective Classification for Deep Neural Networks, NeurIPS 2017.
    """
    precision, _ = precision_recall(log_confidence, predicted, target)
    return np.arange(1, len(precision) + 1) / len(precision), 1 - precision


def aurc(log_confidence: ArrayLike, predicted: ArrayLike, target: ArrayLike) -> float:
    """Compute the area under the risk-coverage curve: the mean risk over all coverages 1/Q, 2/Q, ..., 1; 0 is best.

    Its floor rises with the share of distractors, so only figures on the same queries compare.

    Source: Geifman, Uziel and El-Yaniv, Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers, ICLR 2019.
    """
    _, risk = risk_coverage(log_confidence, predicted, target)
    return float(risk.mean())


def precision_recall(
    log_confidence: ArrayLike, predicted: ArrayLike, target: ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
    """Compute precision and recall after each query in rank order: the curve whose step area is GAP.

    Queries are ranked as in ``gap``. The area is Σ p(i) (recall(i) - recall(i-1)), not interpolated. Recall is over
    all met queries, so it ends at ACC. Both are ``(Q,)`` float64.
    """
    confidence, right, is_met = checked(log_confidence, predicted, target)
    n_right = np.cumsum(right[np.argsort(-confidence, kind="stable")])
    return n_right / np.arange(1, len(n_right) + 1), n_right / is_met.sum()


def reliability(
    log_confidence: ArrayLike, predicted: ArrayLike, target: ArrayLike, n_bins: int = 10
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compare confidence and share of right answers in equally wide bins: of each that has an answer, ``(B,)``.

    Mean confidence, share of right answers (none to a distractor is), number of answers. A skipped query has none.
    """
    sure, right, _ = checked(log_confidence, predicted, target)
    is_answered = ~np.isneginf(sure)
    confidence, right = np.exp(sure[is_answered]), right[is_answered]
    places = np.minimum((confidence * n_bins).astype(int), n_bins - 1)
    counts = np.bincount(places, minlength=n_bins)
    sums = [np.bincount(places, weights=of, minlength=n_bins)[counts > 0] for of in (confidence, right)]
    counts = counts[counts > 0]
    return sums[0] / counts, sums[1] / counts, counts


def calibration_error(log_confidence: ArrayLike, predicted: ArrayLike, target: ArrayLike, n_bins: int = 10) -> float:
    """Compute the expected calibration error, in [0, 1]: how far confidence and share of right answers lie apart.

    The mean over equally wide bins of confidence, weighted by their answers; 0 is best, and without answers.

    Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017.
    """
    confidence, right, counts = reliability(log_confidence, predicted, target, n_bins)
    return float((np.abs(confidence - right) * counts).sum() / max(counts.sum(), 1))


def threshold_for_precision(
    log_confidence: ArrayLike, predicted: ArrayLike, target: ArrayLike, precision: float
) -> OperatingPoint | None:
    """Find the lowest threshold at which at least ``precision`` of the accepted answers are right.

    Lowest accepts most, so no other threshold of this precision has more recall; a higher one can be less precise. -inf
    stands for no answer and is never accepted. The threshold lies midway between the least sure accepted answer and the
    next one, so that rounding does not move a query across. What it gives on these queries is optimistic there: choose
    it on val. None if no threshold is that precise.
    """
    _refuse_no_precision(precision)
    confidence, _, _ = checked(log_confidence, predicted, target)
    reached, recall = precision_recall(log_confidence, predicted, target)
    ranked = -np.sort(-confidence)
    ends_tie = np.append(ranked[1:] < ranked[:-1], True)
    possible = np.flatnonzero(ends_tie & (reached >= precision) & (ranked > -np.inf))
    if not len(possible):
        return None
    last = possible[-1]
    below = ranked[last + 1] if last + 1 < len(ranked) else -np.inf
    threshold = (ranked[last] + below) / 2 if below > -np.inf else ranked[last]
    return OperatingPoint(float(threshold), float(reached[last]), float(recall[last]), int(last) + 1)


def decision_point(
    log_confidence: ArrayLike, predicted: ArrayLike, target: ArrayLike, precision: float, is_probability: bool
) -> OperatingPoint | None:
    """Choose the threshold on val from which on answers are accepted, see ``threshold_for_precision``.

    Where confidence is the probability that an answer is right, it is the precision itself: each answer accepted is
    right that often.
    """
    if not is_probability:
        return threshold_for_precision(log_confidence, predicted, target, precision)
    _refuse_no_precision(precision)
    confidence, right, is_met = checked(log_confidence, predicted, target)
    threshold = float(np.log(precision))
    accepted = confidence >= threshold
    n_right, n_accepted = int((right & accepted).sum()), int(accepted.sum())
    return OperatingPoint(threshold, n_right / max(n_accepted, 1), float(n_right / is_met.sum()), n_accepted)


def _refuse_no_precision(precision: float) -> None:
    if not 0 < precision <= 1:
        raise UserError(f"precision {precision}: choose a share of right answers above 0, at most 1")


def _strata(
    log_confidence: ArrayLike, predicted: ArrayLike, target: ArrayLike
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return met queries' confidence and whether each is right, both ``(M,)``, and distractors' confidence."""
    confidence, right, is_met = checked(log_confidence, predicted, target)
    if is_met.all():
        raise UserError("every query shows an exhibit, so there is nothing to reject: add distractors")
    return confidence[is_met], right[is_met], confidence[~is_met]
