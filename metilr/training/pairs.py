"""Training pairs of an epoch (which images, which of their views, one exhibit or two), and their batches.

Rows are rows of the database. ``rows`` are those that can be trained on, ascending; ``labels`` are of all, ``(N,)``,
and so are ``descriptors``, ``(N, D)`` of unit length.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from metilr.errors import UserError
from metilr.retrieval.search import GPU_MAX_K, SearchDevice, search

Pairing = Literal["syn", "syn+neg", "syn+real+neg", "syn+real-closest+neg"]
N_NEGATIVES = 10  # an anchor's negative is drawn from so many most similar images of other classes


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


def choose_anchors(rows: np.ndarray, n_anchors: int | None, rng: np.random.Generator) -> np.ndarray:
    """Draw an epoch's anchors in random order: every row once, or so many, none again before all have come."""
    n_anchors = len(rows) if n_anchors is None else n_anchors
    return np.concatenate([rng.permutation(rows) for _ in range(-(-n_anchors // len(rows)))])[:n_anchors]


def positives(
    anchors: np.ndarray,
    rows: np.ndarray,
    labels: np.ndarray,
    pairing: Pairing,
    descriptors: np.ndarray | None,
    rng: np.random.Generator,
) -> np.ndarray:
    """Draw each anchor's positive, rows ``(A,)``: the anchor itself, or another image of its class.

    ``syn``: always itself, under another view. ``syn+real``: any **other** image of the class at random, itself
    in a class of one. ``syn+real-closest``, which alone needs descriptors: at random itself or its most similar fellow.
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
        chosen[i] = rng.choice([anchors[i], fellows[np.argmax(similarities)]])
    return chosen


def hard_negatives(
    anchors: np.ndarray,
    rows: np.ndarray,
    labels: np.ndarray,
    descriptors: np.ndarray,
    rng: np.random.Generator,
    device: SearchDevice = "cpu",
) -> np.ndarray:
    """Draw each anchor's negative, rows ``(A,)``, at random among the 10 most similar images of other classes.

    The search is exact and is widened for an anchor until 10 (or all there are) images of other classes are
    found, however many images its own class has.

    Raises:
        UserError: If there is only one class.
    """
    if len(np.unique(labels[rows])) < 2:
        raise UserError("negatives need images of at least two exhibits, here is one; use syn", "pairing")
    database = descriptors if len(rows) == len(descriptors) else descriptors[rows]
    candidates: dict[int, np.ndarray] = {}
    unsettled, k = np.unique(anchors), min(len(rows), 3 * N_NEGATIVES)
    while len(unsettled):
        on = device if k <= GPU_MAX_K // 2 else "cpu"
        neighbours = search(database, descriptors[unsettled], k, on).rows
        is_other = labels[rows[neighbours]] != labels[unsettled][:, None]
        is_settled = (is_other.sum(axis=1) >= N_NEGATIVES) | (k == len(rows))
        for i in np.flatnonzero(is_settled):
            candidates[int(unsettled[i])] = rows[neighbours[i][is_other[i]][:N_NEGATIVES]]
        unsettled, k = unsettled[~is_settled], min(len(rows), 4 * k)
    return np.array([rng.choice(candidates[anchor]) for anchor in anchors.tolist()], dtype=np.int64)


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
    device: SearchDevice = "cpu",
) -> Pairs:
    """Draw the pairs of an epoch: for each anchor a positive and, with ``+neg``, a negative, all shuffled.

    Args:
        rows: Of the database, that can be trained on.
        labels: Of the whole database.
        pairing: Where positives come from, and whether negatives are mined.
        descriptors: Of the weights as they are now, at one scale; None for ``syn``.
        n_anchors: None for each row once; else so many: a random part, or several rounds over all.
        n_views: Views are drawn from so many fixed ones per image; None: every view of the run is a new one.
        epoch: Of the run, from 0.
        seed: The run's.
        device: Where FAISS searches.

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
    """Cut an epoch into batches and give a process its part of each: every pair once, no padding.

    All processes get the same number of batches; batches differ in size by at most one pair, and so do the
    processes' parts of a batch.

    Raises:
        UserError: If a batch of at most ``batch_size`` pairs, over all processes, has fewer pairs than processes.
    """
    n_batches = max(1, -(-n_pairs // batch_size))
    if n_pairs // n_batches < world_size:
        raise UserError(
            f"{batch_size}: {n_pairs} pairs in {n_batches} batches leave a process of {world_size} without a pair; "
            "use fewer processes or larger batches", "batch_pairs"
        )  # fmt: skip
    batches = np.array_split(np.arange(n_pairs), n_batches)
    return [np.array_split(batch, world_size)[rank] for batch in batches]


class PairBatch(NamedTuple):
    """Pairs of views.

    Attributes:
        first: uint8 ``(B, 3, H, W)``; or pooled vectors, float32 ``(B, width)``, where the backbone is frozen.
        second: The same form.
        positive: Whether both show the same exhibit, bool ``(B,)``.
        first_labels: Class of ``first``, int64 ``(B,)``.
        second_labels: Class of ``second``, int64 ``(B,)``.
    """

    first: Tensor
    second: Tensor
    positive: Tensor
    first_labels: Tensor
    second_labels: Tensor


ViewsOf = Callable[[np.ndarray, np.ndarray], Tensor]  # rows and numbers of views, each (B,), to what stands for them


class PairDataset(Dataset[PairBatch]):
    """An item is a whole batch, so the loader must not batch again (``batch_size=None``).

    Args:
        pairs: The epoch's.
        batches: This process's part: positions in ``pairs``.
        labels: Class of every database row.
        first: Gives the views of the first of each pair.
        second: Gives those of the second.
    """

    def __init__(
        self, pairs: Pairs, batches: Sequence[np.ndarray], labels: np.ndarray, first: ViewsOf, second: ViewsOf
    ) -> None:
        self.pairs, self.batches, self.labels = pairs, batches, labels
        self.first, self.second = first, second

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int) -> PairBatch:
        pairs = self.pairs.take(self.batches[i])
        return PairBatch(
            self.first(pairs.first, pairs.first_view),
            self.second(pairs.second, pairs.second_view),
            torch.from_numpy(pairs.positive),
            torch.from_numpy(self.labels[pairs.first]),
            torch.from_numpy(self.labels[pairs.second]),
        )
