"""Training pairs of one epoch: which images, which of their views, and whether they show the same exhibit."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from metilr.errors import UserError
from metilr.retrieval.search import GPU_MAX_K, search

Pairing = Literal["syn", "syn+neg", "syn+real+neg", "syn+real-closest+neg"]
N_NEGATIVES = 10  # an anchor's negative is drawn from so many most similar images of other classes
N_CLOSEST = 2  # of syn+real-closest: the image itself and its most similar fellow


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of database images; all arrays ``(P,)``.

    Attributes:
        first: Row of the anchor, int64.
        second: Row of the other image, int64; the anchor itself in a synthetic positive.
        positive: Whether both show the same exhibit, bool.
        first_view: Which augmented view of ``first``, int64.
        second_view: Which augmented view of ``second``, int64.
    """

    first: np.ndarray
    second: np.ndarray
    positive: np.ndarray
    first_view: np.ndarray
    second_view: np.ndarray

    def __len__(self) -> int:
        return len(self.first)

    def take(self, indices: np.ndarray) -> "Pairs":
        """The pairs at these positions, in this order."""
        return Pairs(*(getattr(self, name)[indices] for name in self.__dataclass_fields__))


def needs_descriptors(pairing: Pairing) -> bool:
    """Whether the pairs depend on the current descriptors; positives alone need none."""
    return pairing != "syn"


def choose_anchors(rows: np.ndarray, n_anchors: int | None, rng: np.random.Generator) -> np.ndarray:
    """Draw an epoch's anchors: every row once, or a given number of them.

    Args:
        rows: Database rows that can be trained on, ``(N,)``.
        n_anchors: None for each row once; else so many: a random part, or several rounds over all.
        rng: Draws the order.

    Returns:
        Rows in random order; no row comes again before all have come.
    """
    n_anchors = len(rows) if n_anchors is None else n_anchors
    rounds = -(-n_anchors // len(rows))
    return np.concatenate([rng.permutation(rows) for _ in range(rounds)])[:n_anchors]


def positives(
    anchors: np.ndarray,
    rows: np.ndarray,
    labels: np.ndarray,
    pairing: Pairing,
    descriptors: np.ndarray | None,
    rng: np.random.Generator,
) -> np.ndarray:
    """Draw each anchor's positive: the anchor itself, or another image of its class.

    ``syn``: always itself, under another view. ``syn+real``: any **other** image of the class at random, itself
    in a class of one. ``syn+real-closest``: at random itself or its most similar fellow.

    Args:
        anchors: Rows, ``(A,)``.
        rows: Database rows that can be trained on.
        labels: Class of every database row, ``(N,)``.
        pairing: Where positives come from.
        descriptors: Of every database row, ``(N, D)``; used by ``syn+real-closest`` alone.
        rng: Draws.

    Returns:
        Rows, ``(A,)``.
    """
    chosen = anchors.copy()
    if "real" not in pairing:
        return chosen
    order = rows[np.argsort(labels[rows], kind="stable")]
    starts = np.searchsorted(labels[order], labels[anchors], side="left")
    ends = np.searchsorted(labels[order], labels[anchors], side="right")
    for i in np.flatnonzero(ends - starts > 1):
        members = order[starts[i] : ends[i]]
        fellows = members[members != anchors[i]]
        if "closest" not in pairing:
            chosen[i] = rng.choice(fellows)
            continue
        assert descriptors is not None
        similarities = np.asarray(descriptors[fellows], np.float64) @ np.asarray(descriptors[anchors[i]], np.float64)
        closest = fellows[np.argsort(-similarities, kind="stable")[: N_CLOSEST - 1]]
        chosen[i] = rng.choice(np.concatenate([[anchors[i]], closest]))
    return chosen


def hard_negatives(
    anchors: np.ndarray,
    rows: np.ndarray,
    labels: np.ndarray,
    descriptors: np.ndarray,
    rng: np.random.Generator,
    device: Literal["cpu", "gpu"] = "cpu",
) -> np.ndarray:
    """Draw each anchor's negative at random among the 10 most similar images of other classes.

    The search is exact and is widened for an anchor until 10 (or all there are) images of other classes are
    found, however many images its own class has.

    Args:
        anchors: Rows, ``(A,)``.
        rows: Database rows that can be trained on, ascending.
        labels: Class of every database row, ``(N,)``.
        descriptors: Of every database row, unit length, ``(N, D)``.
        rng: Draws.
        device: Where FAISS searches.

    Returns:
        Rows, ``(A,)``.

    Raises:
        UserError: If there is only one class.
    """
    n_classes = len(np.unique(labels[rows]))
    if n_classes < 2:
        raise UserError("--data.pairing: negatives need images of at least two exhibits, here is one; use syn")
    asked = np.unique(anchors)
    database = _rows_of(descriptors, rows)
    candidates: dict[int, np.ndarray] = {}
    k = min(len(rows), 3 * N_NEGATIVES)
    unsettled = asked
    while len(unsettled):
        found = search(database, _rows_of(descriptors, unsettled), k, device if k <= GPU_MAX_K // 2 else "cpu").rows
        others = labels[rows[found]] != labels[unsettled][:, None]
        settled = (others.sum(axis=1) >= N_NEGATIVES) | (k == len(rows))
        for i in np.flatnonzero(settled):
            candidates[int(unsettled[i])] = rows[found[i][others[i]][:N_NEGATIVES]]
        unsettled = unsettled[~settled]
        k = min(len(rows), 4 * k)
    return np.array([rng.choice(candidates[anchor]) for anchor in anchors.tolist()], dtype=np.int64)


def _rows_of(descriptors: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rows of a matrix; without a copy where that is all of them."""
    return descriptors if len(rows) == len(descriptors) else np.ascontiguousarray(descriptors[rows])


def draw_pairs(
    rows: np.ndarray,
    labels: np.ndarray,
    pairing: Pairing,
    descriptors: np.ndarray | None,
    *,
    n_anchors: int | None,
    n_views: int | None,
    epoch: int,
    seed: int,
    device: Literal["cpu", "gpu"] = "cpu",
) -> Pairs:
    """Draw the pairs of an epoch: for each anchor a positive and, with ``+neg``, a negative, all shuffled.

    Args:
        rows: Database rows that can be trained on, ascending.
        labels: Class of every database row, ``(N,)``.
        pairing: Where positives come from, and whether negatives are mined.
        descriptors: Current single-scale descriptors of every database row, ``(N, D)``; None where unused.
        n_anchors: As in ``choose_anchors``.
        n_views: Views are drawn from so many fixed ones per image; None: every view of the run is a new one.
        epoch: Of the run, from 0.
        seed: The run's.
        device: Where FAISS searches.

    Raises:
        UserError: If negatives are mined and there is only one class.

    Source: Ypsilantis et al., The Met Dataset, NeurIPS 2021, section 4.
    """
    rng = np.random.default_rng((seed, epoch))
    anchors = choose_anchors(rows, n_anchors, rng)
    firsts, seconds = [anchors], [positives(anchors, rows, labels, pairing, descriptors, rng)]
    if pairing.endswith("+neg"):
        assert descriptors is not None
        firsts.append(anchors)
        seconds.append(hard_negatives(anchors, rows, labels, descriptors, rng, device))
    first, second = np.concatenate(firsts), np.concatenate(seconds)
    positive = np.arange(len(first)) < len(anchors)
    if n_views is None:
        views = epoch * 2 * len(first) + np.arange(2 * len(first)).reshape(2, -1)
    else:
        views = rng.integers(n_views, size=(2, len(first)))
        # A synthetic positive shows two different views where there are two.
        same = (first == second) & (views[0] == views[1]) & (n_views > 1)
        views[1][same] = (views[1][same] + rng.integers(1, max(n_views, 2), size=int(same.sum()))) % n_views
    return Pairs(first, second, positive, views[0], views[1]).take(rng.permutation(len(first)))


def deal_batches(n_pairs: int, batch_size: int, rank: int, world_size: int) -> list[np.ndarray]:
    """Cut an epoch into batches and give each process its part: every pair once, no padding.

    All processes get the same number of batches; batches differ in size by at most one pair, and so do the
    processes' parts of a batch.

    Args:
        n_pairs: Pairs of the epoch.
        batch_size: Most pairs in a batch over all processes together.
        rank: This process.
        world_size: All processes.

    Raises:
        UserError: If a batch has fewer pairs than there are processes.
    """
    n_batches = max(1, -(-n_pairs // batch_size))
    if n_pairs // n_batches < world_size:
        raise UserError(
            f"data.batch_pairs {batch_size}: {n_pairs} pairs in {n_batches} batches leave a process of {world_size} "
            "without a pair; use fewer processes or larger batches"
        )
    batches = np.array_split(np.arange(n_pairs), n_batches)
    return [np.array_split(batch, world_size)[rank] for batch in batches]
