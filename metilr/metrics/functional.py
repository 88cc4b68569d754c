"""GAP, GAP⁻ and ACC as pure functions of answers, and recall and mAP as functions of ranks.

The first take ``log_confidence`` (higher is surer, on any increasing scale; -inf allowed), ``predicted`` labels and
``target`` labels (DISTRACTOR where a query shows no exhibit), each ``(Q,)``, compute in float64 and give a scalar in
[0, 1]. An answer is right if the query shows an exhibit and its label was predicted. Queries are ranked by
log-confidence, surest first; equal ones keep their input order (``gap_bounds`` says how much that order can matter).

They raise UserError if shapes differ, a confidence is NaN, or no query shows an exhibit.

The others take ``ranks``, ``(Q,)``: the place of the exhibit that a query shows when all exhibits are ranked by their
most similar image (``metilr.class_ranks``), 1 the first; inf where no image of it can be found, NaN where the query
shows no exhibit and is left out. They raise UserError if a rank is none, or no query shows an exhibit.
"""

import numpy as np
from numpy.typing import ArrayLike

from metilr.errors import UserError

DISTRACTOR = -1
"""Target of a query that shows no exhibit of the museum."""


def gap(log_confidence: ArrayLike, predicted: ArrayLike, target: ArrayLike) -> float:
    """Compute global average precision: (1/M) Σ p(i) r(i) over all queries ranked by confidence.

    r(i) is 1 if the i-th answer is right, p(i) the share of right ones among the first i, M the number of
    queries that show an exhibit. A distractor is never right, so it only lowers p.

    Source: Weyand et al., Google Landmarks Dataset v2, CVPR 2020 (there µAP). Differs from scikit-learn's
    ``average_precision_score`` in the denominator (met queries, not right answers) and in ties (kept in
    order, not taken together).
    """
    confidence, right, is_met = checked(log_confidence, predicted, target)
    return _average_precision(right[np.argsort(-confidence, kind="stable")], is_met.sum())


def gap_minus(log_confidence: ArrayLike, predicted: ArrayLike, target: ArrayLike) -> float:
    """Compute GAP⁻: GAP over met queries alone, as if no distractor had been asked.

    Source: Ypsilantis et al., The Met Dataset, NeurIPS 2021.
    """
    confidence, right, is_met = checked(log_confidence, predicted, target)
    return _average_precision(right[is_met][np.argsort(-confidence[is_met], kind="stable")], is_met.sum())


def acc(log_confidence: ArrayLike, predicted: ArrayLike, target: ArrayLike) -> float:
    """Compute ACC: the share of met queries whose label is right; source as for GAP⁻."""
    _, right, is_met = checked(log_confidence, predicted, target)
    return float(right.sum() / is_met.sum())


def gap_bounds(log_confidence: ArrayLike, predicted: ArrayLike, target: ArrayLike) -> tuple[float, float]:
    """Compute the least and the greatest GAP that any order of equally confident answers allows.

    Wrong answers first within each tie give the least, right ones first the greatest. A wide interval means that the
    confidence has saturated.
    """
    confidence, right, is_met = checked(log_confidence, predicted, target)
    wrong_first, right_first = np.lexsort((right, -confidence)), np.lexsort((~right, -confidence))
    n_met = is_met.sum()
    return _average_precision(right[wrong_first], n_met), _average_precision(right[right_first], n_met)


def recall_at(ranks: ArrayLike, k: int) -> float:
    """Compute recall@k over exhibits: the share of met queries whose exhibit is among the k most similar ones.

    As a query shows one exhibit, this is the CMC at k too. Several images of one exhibit take one place.
    """
    if k < 1:
        raise UserError(f"{k}: choose 1 or more", "k")
    return float((_met_ranks(ranks) <= k).mean())


def mean_average_precision(ranks: ArrayLike) -> float:
    """Compute mAP over exhibits, of the whole ranking: the mean of 1 / rank, as a query shows one exhibit.

    It is not the mAP over images, in which each further image of the exhibit must be ranked high too, and not cut off
    at any rank.
    """
    return float((1 / _met_ranks(ranks)).mean())


def _met_ranks(ranks: ArrayLike) -> np.ndarray:
    """Return the ranks of met queries, ``(M,)`` float64."""
    values = np.asarray(ranks, dtype=np.float64)
    met = values[~np.isnan(values)]
    if values.ndim != 1 or (met < 1).any() or (met != np.floor(met)).any():
        raise UserError("ranks must be whole numbers from 1 on, inf or NaN, and 1-D")
    if not len(met):
        raise UserError("no query shows an exhibit, so recall and mAP are undefined: add met queries")
    return met


def _average_precision(right: np.ndarray, n_met: int) -> float:
    """Return (1/M) Σ p(i) r(i) of right answers ``(Q,)`` in rank order."""
    precision = np.cumsum(right) / np.arange(1, len(right) + 1)
    return float(precision[right].sum() / n_met)


def checked(
    log_confidence: ArrayLike, predicted: ArrayLike, target: ArrayLike
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the confidence in float64, and where an answer is right and a query met; all ``(Q,)``."""
    confidence = np.asarray(log_confidence, dtype=np.float64)
    answers, truth = np.asarray(predicted), np.asarray(target)
    if confidence.ndim != 1 or not confidence.shape == answers.shape == truth.shape:
        shapes = f"{confidence.shape}, {answers.shape} and {truth.shape}"
        raise UserError(f"log_confidence, predicted and target must be 1-D and of one length, not {shapes}")
    if np.isnan(confidence).any():
        raise UserError(f"the log-confidence of query {int(np.isnan(confidence).argmax())} is NaN")
    is_met = truth != DISTRACTOR
    if not is_met.any():
        raise UserError("no query shows an exhibit, so GAP, GAP⁻ and ACC are undefined: add met queries")
    return confidence, (answers == truth) & is_met, is_met
