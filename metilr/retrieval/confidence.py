"""A calibrated confidence: the probability that an answer is right, from what a search leaves anyway.

The softmax of the classifier says how far the best exhibit is ahead of the others, which tells little about a photo
that shows none of them. A logistic regression on val adds what does: how similar the photo is to a *background*,
photographs that show no exhibit, and how many local features agree, where geometry is checked. Labels never change.

Source of the background's use: cohort normalisation of scores in speaker verification (Auckenthaler, Carey and
Lloyd-Thomas, Digital Signal Processing, 2000).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from metilr.metrics.functional import DISTRACTOR, gap
from metilr.retrieval.knn import NO_ROW, Matches, Predictions

OF_SEARCH = ("similarity", "lead", "mean_10")
OF_BACKGROUND = ("background_1", "background_5", "background_20")
OF_GEOMETRY = ("inliers", "inlier_lead")
NEAREST = 10
COUNTED = (1, 5, 20)  # nearest photographs of the background that means are taken of
LEAST_BACKGROUND = COUNTED[-1]  # with fewer the last mean is of all of them, whatever the query
STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # of the L2 penalty per query, on standardised features
FOLDS, REPEATS, SEED = 5, 5, 0  # of the cross-validation
BACKGROUND_WEIGHT = 0.5  # better than 0 on val of three museums of four, and about as good as 0.25 and 0.75
CHUNK = 1024  # queries compared with the background at once


@dataclass(frozen=True)
class Calibration:
    """A fitted logistic regression: the probability that an answer with such evidence is right."""

    features: Sequence[str]
    mean: Sequence[float]  # of each feature on val
    scale: Sequence[float]  # its standard deviation there
    coefficients: Sequence[float]  # of the standardised features
    intercept: float
    strength: float  # of the penalty, chosen by cross-validation

    def log_confidence(self, features: np.ndarray) -> np.ndarray:
        """Return the logarithm of the probability, ``(Q,)``, for features ``(Q, F)``."""
        return -np.logaddexp(0, -self.logit(features))

    def logit(self, features: np.ndarray) -> np.ndarray:
        """Return the logarithm of the odds, ``(Q,)``."""
        return (features - np.array(self.mean)) / np.array(self.scale) @ np.array(self.coefficients) + self.intercept

    def apply(self, answers: Predictions, evidence: "Evidence") -> Predictions:
        """Put the probability in place of the confidence; a query that was skipped stays so."""
        sure, is_answered = answers.log_confidence.copy(), ~np.isneginf(answers.log_confidence)
        sure[is_answered] = self.log_confidence(evidence.features()[is_answered])
        return replace(answers, log_confidence=sure)


def feature_names(is_checked: bool, n_background: int) -> list[str]:
    """Name the features of answers that geometry checked, or not, with so many photographs to compare with."""
    return [*OF_SEARCH, *(OF_GEOMETRY if is_checked else ()), *(OF_BACKGROUND if n_background else ())]


@dataclass(frozen=True, eq=False)
class Evidence:
    """What is known of the answers to Q queries."""

    names: Sequence[str]  # of the features
    of_answer: np.ndarray  # what the search and the geometric check say, float64 (Q, A)
    background: np.ndarray  # similarity to each of C photographs that show no exhibit, float64 (Q, C); C may be 0
    is_same: np.ndarray  # of those, which must not speak of the query, bool (Q, C): they are it, or its photographer's

    def features(self, kept: np.ndarray | None = None) -> np.ndarray:
        """Return the features, ``(Q, F)``, with the photographs of the background that are ``kept``, bool ``(C,)``."""
        if not self.background.shape[1]:
            return self.of_answer
        left_out = self.is_same if kept is None else self.is_same | ~kept
        n = COUNTED[-1] + left_out.sum(axis=1).max(initial=0)  # of so many, enough are not left out
        nearest, left_out = (np.take_along_axis(of, self._order[:, :n], axis=1) for of in (self.background, left_out))
        return np.concatenate([self.of_answer, background_means(nearest, left_out)], axis=1)

    @functools.cached_property
    def _order(self) -> np.ndarray:
        """The photographs from the nearest to the farthest, ``(Q, C)``."""
        return np.argsort(-self.background, axis=1)


def evidence_of_search(
    answers: Predictions, matches: Matches, match_labels: np.ndarray, nearest: np.ndarray
) -> np.ndarray:
    """What the search says of each answer, float64 ``(Q, 3)``: its similarity, its lead, the mean of the ten nearest.

    ``matches`` are the nearest image of each of the nearest exhibits, ``match_labels`` ``(Q, M)`` what they show, and
    ``nearest`` the similarities of the nearest rows, ``(Q, K)``, descending. The lead is over the most similar match of
    another exhibit, 0 where there is none.
    """
    is_other = (matches.rows != NO_ROW) & (match_labels != answers.labels[:, None])
    others = np.where(is_other, matches.similarities, -np.inf).max(axis=1, initial=-np.inf)
    lead = answers.similarity - np.where(np.isneginf(others), 0, others)
    return np.stack([answers.similarity, lead, nearest[:, :NEAREST].mean(axis=1)], axis=1)


def background_similarities(queries: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Compare queries, ``(Q, V, D)``, with photographs, ``(C, D)``: float64 ``(Q, C)``, the nearest view counts."""
    photographs = background.astype(np.float64).T
    similarities = np.empty((len(queries), len(background)))
    for i in range(0, len(queries) if len(background) else 0, CHUNK):
        similarities[i : i + CHUNK] = (queries[i : i + CHUNK].astype(np.float64) @ photographs).max(axis=1)
    return similarities


def background_means(similarities: np.ndarray, left_out: np.ndarray) -> np.ndarray:
    """Return the mean similarity to the nearest photograph, the 5 and the 20 nearest not left out, ``(Q, 3)``.

    Of fewer the mean of those that there are, 0 of none.
    """
    n = min(COUNTED[-1], similarities.shape[1])
    distances = np.where(left_out, np.inf, -similarities)
    distances.partition(n - 1, axis=1)
    nearest = -np.sort(distances[:, :n], axis=1)
    is_there = ~np.isneginf(nearest)
    sums, counts = np.where(is_there, nearest, 0).cumsum(axis=1), is_there.cumsum(axis=1)
    places = [min(count, n) - 1 for count in COUNTED]
    return sums[:, places] / np.maximum(counts[:, places], 1)


def above_background(similarity: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Return similarity − 0.5 · mean similarity to the 5 nearest photographs, ``(Q,)``, where no val can weigh them."""
    return similarity - BACKGROUND_WEIGHT * background_means(background, np.zeros(background.shape, dtype=bool))[:, 1]


@dataclass(frozen=True)
class Fit:
    """What was fitted on val, and what cross-validation there says of it.

    Both GAPs are means over the same held-out parts of val, weighted by their met queries; k and τ of the plain
    confidence were chosen on all of val, so the comparison favours it.
    """

    calibration: Calibration
    plain_gap: float
    calibrated_gap: float
    n_background: int  # photographs

    @property
    def gains(self) -> bool:
        """Whether the calibrated confidence ranks better."""
        return self.calibrated_gap > self.plain_gap


def fit_calibration(
    answers: Predictions, evidence: Evidence, target: np.ndarray, groups: np.ndarray, background_queries: np.ndarray
) -> Fit | None:
    """Fit on val, whose true labels are ``target`` ``(Q,)``; None where it tells nothing.

    It tells nothing where too few answers are right, or wrong, or held-out right ones get lower logits. The strength
    is chosen by GAP of held-out parts. A query's group, ``(Q,)``, is held out as a whole, from the fit and
    from the background: ``background_queries``, ``(C,)``, are its places among the queries. Of equal strengths the
    greater counts. Such a penalty makes probabilities timid, so the logit is scaled to what the held-out ones were
    worth (Platt, 1999).
    """
    is_right = (answers.labels == target) & (target != DISTRACTOR)
    is_answered = ~np.isneginf(answers.log_confidence)
    parts = held_out_parts(is_right, groups, np.flatnonzero(is_answered))
    if parts is None:
        return None
    logits, totals, n_met = np.zeros((len(STRENGTHS), len(target))), np.zeros(1 + len(STRENGTHS)), 0
    for fitted, judged in parts:
        features = evidence.features(np.isin(background_queries, fitted))
        models = [_fit(evidence.names, features[fitted], is_right[fitted], strength) for strength in STRENGTHS]
        of_part = np.stack([model.logit(features[judged]) for model in models])
        logits[:, judged] += of_part / REPEATS
        if weight := int((target[judged] != DISTRACTOR).sum()):  # else GAP is undefined
            case = answers.labels[judged], target[judged]
            totals += [weight * gap(sure, *case) for sure in (answers.log_confidence[judged], *of_part)]
            n_met += weight
    plain, *reached = (totals / n_met).tolist()
    best = max(range(len(STRENGTHS)), key=lambda i: (reached[i], i))
    model = _fit(evidence.names, evidence.features()[is_answered], is_right[is_answered], STRENGTHS[best])
    worth = _fit(["logit"], logits[best, is_answered, None], is_right[is_answered], STRENGTHS[0])
    if worth.coefficients[0] <= 0:  # right answers have the lower logits where they are held out
        return None
    return Fit(_scaled(model, worth), plain, reached[best], len(background_queries))


def held_out_parts(
    is_right: np.ndarray, groups: np.ndarray, places: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """Queries, among ``places``, to fit on and to judge, each judged once in each repeat; None if there are too few.

    Groups are shuffled and dealt to the parts in turn, those with most right answers first, so that each has some.
    """
    names, group = np.unique(groups[places], return_inverse=True)
    n_right = np.bincount(group, is_right[places])
    if min(n_right.sum(), len(places) - n_right.sum(), len(names)) < FOLDS:
        return None
    rng, parts, part_of_group = np.random.default_rng(SEED), [], np.empty(len(names), dtype=int)
    for _ in range(REPEATS):
        shuffled = rng.permutation(len(names))
        part_of_group[shuffled[np.argsort(-n_right[shuffled], kind="stable")]] = np.arange(len(names)) % FOLDS
        part = part_of_group[group]
        parts += [(places[part != i], places[part == i]) for i in range(FOLDS)]
    return parts if all(0 < is_right[fitted].sum() < len(fitted) for fitted, _ in parts) else None


def _scaled(model: Calibration, worth: Calibration) -> Calibration:
    """The model whose logit is that of ``worth``, of the model's logit."""
    [mean], [scale], [slope] = worth.mean, worth.scale, worth.coefficients
    factor = slope / scale
    return replace(
        model,
        coefficients=[factor * coefficient for coefficient in model.coefficients],
        intercept=factor * (model.intercept - mean) + worth.intercept,
    )


def _fit(names: Sequence[str], features: np.ndarray, is_right: np.ndarray, strength: float) -> Calibration:
    from sklearn.linear_model import LogisticRegression

    mean, scale = features.mean(axis=0), features.std(axis=0)
    scale = np.where(scale > 1e-9, scale, 1)  # of a constant, rounding is left
    model = LogisticRegression(C=1 / (strength * len(features)), solver="newton-cholesky", tol=1e-8)
    model.fit((features - mean) / scale, is_right)
    return Calibration(
        [*names], mean.tolist(), scale.tolist(), model.coef_[0].tolist(), float(model.intercept_[0]), strength
    )
