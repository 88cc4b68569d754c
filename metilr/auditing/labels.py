"""Labels that the pictures speak against, exhibits that will be confused, and what leaked queries are worth."""

from collections.abc import Iterator, Sequence

import numpy as np

from metilr.auditing.copies import inliers
from metilr.auditing.groups import Pictures, key_of
from metilr.auditing.looks import Facts
from metilr.auditing.schema import Coverage, Figures, Label, Leakage
from metilr.auditing.subject import Found, Subject
from metilr.metrics import DISTRACTOR, acc, gap, gap_minus
from metilr.metrics.bootstrap import N_RESAMPLES
from metilr.progress import tracked
from metilr.retrieval.search import Neighbours

CERTAIN = 15  # points that lie on an image: fewer can do so by chance
LEAD = 0.1  # of similarity to another exhibit over that to the labelled one, which counts without such points
AHEAD = 2  # times as many as on any image of the labelled exhibit
CANDIDATES = 3  # exhibits besides the labelled one whose nearest image is laid over a photo
OWN_IMAGES = 5  # of the labelled exhibit
LISTED = 100  # exhibits that will be confused
BLOCK = 1000  # images of an exhibit at a time

Case = tuple[np.ndarray, np.ndarray, np.ndarray]  # log-confidence, predicted and true label of a split's queries


def other_exhibits(subject: Subject, near: Neighbours) -> np.ndarray:
    """Which of the nearest database images are of another exhibit than the image that they are near to, as ``near``."""
    return subject.labels[near.rows] != subject.labels[:, None]


def doubtful_photos(
    subject: Subject, near: Neighbours, rows: np.ndarray, usable: np.ndarray, pictures: Pictures,
    facts: Sequence[Facts], found: Found, quiet: bool,
) -> list[Label]:  # fmt: skip
    """Photos that lie on an image of another exhibit, or of one where none is labelled; the surest first.

    Looked at are photos whose most similar image is not of their exhibit. The confidence is the share of points that
    lie on the other's image, or how much more similar it is, whichever is greater; without points on the other's image
    a photo with points on its own exhibit's is passed over.
    """
    is_other, n_database = other_exhibits(subject, near), len(subject.truth.paths["database"])
    photos = [int(i) for i in np.flatnonzero(is_other[:, 0] & usable) if i >= n_database]

    def lying(photo: int, image: int) -> int:
        key = key_of(facts[photo], facts[image])
        if key not in found.known:
            found.add(key, inliers(pictures.sketch(photo), pictures.sketch(image)))
        return int(found.known[key])

    doubts = []
    for i in tracked(photos, "laying photos over images", len(photos), "photos", quiet):
        label = subject.labels[i]
        images = [int(row) for row in near.rows[i, is_other[i]] if usable[row]]
        _, first = np.unique(subject.labels[images], return_index=True)
        images = [images[place] for place in np.sort(first)[: CANDIDATES if label != DISTRACTOR else 1]]
        own = np.flatnonzero((subject.labels[:n_database] == label) & usable[:n_database] & (label != DISTRACTOR))
        own = own[np.argsort(-(rows[own] @ rows[i]), kind="stable")][:OWN_IMAGES]
        if not images:
            continue
        on_others, on_own = [lying(i, image) for image in images], [lying(i, int(image)) for image in own]
        most, own_most = max(on_others), max(on_own, default=0)
        lead = float(rows[i] @ rows[images[0]] - rows[i] @ rows[own[0]]) if len(own) else 0.0
        is_certain = most >= max(CERTAIN, AHEAD * own_most)
        if not is_certain and (lead < LEAD or own_most >= max(CERTAIN, most)):
            continue
        image = images[on_others.index(most)] if is_certain else images[0]
        doubts.append(
            Label(
                kind="unlabelled" if label == DISTRACTOR else "label",
                image=subject.said(i),
                seen=subject.names[subject.labels[image]],
                nearest=subject.said(image),
                similarity=float(rows[i] @ rows[image]),
                inliers=most,
                own_inliers=None if label == DISTRACTOR else own_most,
                confidence=min(1.0, max(lead, most / (most + own_most + CERTAIN) if is_certain else 0.0)),
            )
        )
    return sorted(doubts, key=lambda doubt: -doubt.confidence)


def own_similarities(subject: Subject, rows: np.ndarray) -> np.ndarray:
    """Greatest similarity of each database image to another of its exhibit, float64 ``(N,)``; NaN where it is alone."""
    labels = np.where(subject.is_valid, subject.labels, DISTRACTOR)[: len(subject.truth.paths["database"])]
    by_label = np.argsort(labels, kind="stable")
    own = np.full(len(labels), np.nan)
    for images in np.split(by_label, np.flatnonzero(np.diff(labels[by_label])) + 1):
        for start in range(0, len(images) if len(images) > 1 and labels[images[0]] != DISTRACTOR else 0, BLOCK):
            some = images[start : start + BLOCK]
            similarities = (rows[some] @ rows[images].T).astype(float)
            similarities[np.arange(len(some)), np.arange(start, start + len(some))] = -np.inf
            own[some] = similarities.max(axis=1)
    return own


def unlike_images(subject: Subject, near: Neighbours, own: np.ndarray) -> list[Label]:
    """Images that are more similar to another exhibit than to any of their own, by how much; the most first."""
    doubts = [
        Label(
            kind="unlike",
            image=subject.said(i),
            seen=subject.names[subject.labels[image]],
            nearest=subject.said(image),
            similarity=similarity,
            confidence=min(1.0, ahead),
        )
        for i, image, similarity in _nearest_others(subject, near)
        if (ahead := similarity - float(own[i])) > 0  # not where it is alone
    ]
    return sorted(doubts, key=lambda doubt: -doubt.confidence)


def confused_exhibits(subject: Subject, near: Neighbours, own: np.ndarray) -> list[Coverage]:
    """Exhibits of which an image is nearer to another exhibit than they are in themselves, the worst first.

    An exhibit with one image counts as similar to itself as half of the others are; where all have one, those that are
    most similar to another are listed.
    """
    usual = float(np.nanmedian(own)) if np.isfinite(own).any() else -1.0
    worst: dict[int, tuple[float, int, int]] = {}
    least: dict[int, float] = {}
    for i, image, similarity in _nearest_others(subject, near):
        label = int(subject.labels[i])
        worst[label] = max(worst.get(label, (-np.inf, i, image)), (similarity, i, image))
        if np.isfinite(own[i]):
            least[label] = min(least.get(label, np.inf), float(own[i]))
    order = sorted(worst.items(), key=lambda each: least.get(each[0], usual) - each[1][0])
    sizes = subject.truth.class_sizes()
    return [
        Coverage(
            exhibit=subject.names[label],
            n_images=int(sizes[label]),
            own=least.get(label),
            other=similarity,
            nearest_exhibit=subject.names[subject.labels[image]],
            images=(subject.said(i), subject.said(image)),
        )
        for label, (similarity, i, image) in order[:LISTED]
        if similarity > least.get(label, usual)
    ]


def _nearest_others(subject: Subject, near: Neighbours) -> Iterator[tuple[int, int, float]]:
    """Each database image that has a descriptor, the nearest of another exhibit, if it is ``near``, and how similar."""
    n_database = len(subject.truth.paths["database"])
    is_other = other_exhibits(subject, near)[:n_database] & subject.is_valid[near.rows[:n_database]]
    for i in np.flatnonzero(is_other.any(axis=1) & subject.is_valid[:n_database]).tolist():
        place = int(is_other[i].argmax())
        yield i, int(near.rows[i, place]), float(near.similarities[i, place])


def leakage_of(case: Case, is_leaked: np.ndarray, seed: int = 0) -> Leakage:
    """Figures of a split's queries with and without the leaked ones, ``(Q,)``, and how far they differ.

    The interval draws queries with replacement, those that show an exhibit and the others apart, and takes both
    figures of each draw.
    """
    is_met, rng = case[2] != DISTRACTOR, np.random.default_rng(seed)
    kept, difference = ~is_leaked, None
    figures = _figures(case, np.arange(len(is_met)))
    without = _figures(case, np.flatnonzero(kept)) if (kept & is_met).any() else None
    if is_leaked.any() and without is not None:
        draws = []
        for _ in range(N_RESAMPLES):
            drawn = np.concatenate([rng.choice(part, len(part)) for part in map(np.flatnonzero, (is_met, ~is_met))])
            left = drawn[kept[drawn]]
            if is_met[left].any():
                draws.append(_less(_figures(case, drawn), _figures(case, left)))
        values, ends = _less(figures, without), np.quantile(draws, [0.025, 0.975], axis=0).tolist()
        difference = dict(zip(Figures.model_fields, zip(values, *ends, strict=True), strict=True))
    n_queries, n_leaked = len(is_met), int(is_leaked.sum())
    return Leakage(n_queries=n_queries, n_leaked=n_leaked, with_leaked=figures, without=without, difference=difference)


def _figures(case: Case, queries: np.ndarray) -> Figures:
    some = [each[queries] for each in case]
    return Figures(gap=gap(*some), gap_minus=gap_minus(*some), acc=acc(*some))


def _less(some: Figures, others: Figures) -> list[float]:
    return [a - b for (_, a), (_, b) in zip(some, others, strict=True)]
