"""Training pairs of an epoch, and their batches.

Rows are rows of the database. ``rows`` are those that can be trained on, ascending; ``labels`` are of all, ``(N,)``,
and so are ``descriptors``, ``(N, D)`` of unit length. Pairs are a record array ``(P,)``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metilr.errors import UserError
from metilr.retrieval.search import GPU_MAX_K, SearchDevice, search
from metilr.training import Pairing, PairOptions

PAIR = np.dtype([  # rows of two images, the same in a synthetic positive; if they show one exhibit; a view of each
    ("first", np.int64), ("second", np.int64), ("positive", bool), ("first_view", np.int64), ("second_view", np.int64),
])  # fmt: skip
N_NEGATIVES = 10  # an anchor's negative is drawn from so many most similar images of other classes


def choose_anchors(
    rows: np.ndarray, n_anchors: int | None, rng: np.random.Generator, classes: np.ndarray | None = None
) -> np.ndarray:
    """Draw an epoch's anchors in random order: every row once, or so many, none again before all have come.

    With the ``classes`` of rows ``(R,)``: every class once, or so many anchors, and no row of a class again before its
    others have come.
    """
    if classes is None:
        turns = [rows] * rounds_of(n_anchors, len(rows))
    else:
        order = rng.permutation(len(rows))
        order = order[np.argsort(classes[order], kind="stable")]
        _, starts, counts = np.unique(classes[order], return_index=True, return_counts=True)
        turns = [rows[order[starts + turn % counts]] for turn in range(rounds_of(n_anchors, len(starts)))]
    return np.concatenate([rng.permutation(turn) for turn in turns])[:n_anchors]


def rounds_of(n_anchors: int | None, n: int) -> int:
    """How often so many anchors go around n rows or classes, begun rounds included."""
    return 1 if n_anchors is None else -(-n_anchors // n)


def positives(
    anchors: np.ndarray, rows: np.ndarray, labels: np.ndarray, pairing: Pairing, descriptors: np.ndarray | None,
    rng: np.random.Generator,
) -> np.ndarray:  # fmt: skip
    """Draw each anchor's positive, rows ``(A,)``: the anchor itself, or another image of its class.

    ``syn``: always itself, under another view. ``syn+real``: any **other** image of the class at random, itself
    in a class of one. ``syn+real-closest``, which alone needs descriptors: at random itself or its most similar fellow.
    """
    chosen = anchors.copy()
    if "real" not in pairing:
        return chosen
    order = rows[np.argsort(labels[rows], kind="stable")]
    starts, ends = (np.searchsorted(labels[order], labels[anchors], side) for side in ("left", "right"))
    for i in np.flatnonzero(ends - starts > 1):
        members = order[starts[i] : ends[i]]
        fellows = members[members != anchors[i]]
        if "closest" in pairing:
            assert descriptors is not None
            theirs, own = (np.asarray(descriptors[each], np.float64) for each in (fellows, anchors[i]))
            fellows = [anchors[i], fellows[np.argmax(theirs @ own)]]
        chosen[i] = rng.choice(fellows)
    return chosen


def hard_negatives(
    anchors: np.ndarray, rows: np.ndarray, labels: np.ndarray, descriptors: np.ndarray, rng: np.random.Generator,
    device: SearchDevice = "cpu",
) -> np.ndarray:  # fmt: skip
    """Draw each anchor's negative, rows ``(A,)``, at random among the 10 most similar images of other classes.

    The search is exact and is widened for an anchor until 10 (or all there are) images of other classes are
    found, however many images its own class has.
    """
    if len(np.unique(labels[rows])) < 2:
        raise UserError("negatives need images of at least two exhibits, here is one; use syn", "pairing")
    database = descriptors if len(rows) == len(descriptors) else descriptors[rows]
    candidates: dict[int, np.ndarray] = {}
    unsettled, k = np.unique(anchors), min(len(rows), 3 * N_NEGATIVES)
    while len(unsettled):
        neighbours = search(database, descriptors[unsettled], k, device if k <= GPU_MAX_K // 2 else "cpu").rows
        is_other = labels[rows[neighbours]] != labels[unsettled][:, None]
        is_settled = (is_other.sum(axis=1) >= N_NEGATIVES) | (k == len(rows))
        for i in np.flatnonzero(is_settled):
            candidates[int(unsettled[i])] = rows[neighbours[i][is_other[i]][:N_NEGATIVES]]
        unsettled, k = unsettled[~is_settled], min(len(rows), 4 * k)
    return np.array([rng.choice(candidates[anchor]) for anchor in anchors.tolist()], dtype=np.int64)


def draw_pairs(
    rows: np.ndarray, labels: np.ndarray, descriptors: np.ndarray | None, options: PairOptions, epoch: int, seed: int,
    device: SearchDevice = "cpu",
) -> np.recarray:  # fmt: skip
    """Draw the pairs of an epoch, from 0: for each anchor a positive and, with ``+neg``, a negative, all shuffled.

    ``descriptors`` are of the weights as they are now, at one scale; ``syn`` needs none.

    Source: Ypsilantis et al., The Met Dataset, NeurIPS 2021, section 4.
    """
    rng = np.random.default_rng((seed, epoch))
    anchors = choose_anchors(rows, options.anchors_per_epoch, rng, labels[rows] if options.balance else None)
    first, second = anchors, positives(anchors, rows, labels, options.pairing, descriptors, rng)
    if options.has_negatives:
        assert descriptors is not None
        negatives = hard_negatives(anchors, rows, labels, descriptors, rng, device)
        first, second = np.concatenate([anchors, anchors]), np.concatenate([second, negatives])
    n, n_views = len(first), options.n_views
    if n_views is None:  # every view of the run is a new one
        views = epoch * 2 * n + np.arange(2 * n).reshape(2, -1)
    else:
        views = rng.integers(n_views, size=(2, n))
        # A synthetic positive shows two different views where there are two.
        same = (first == second) & (views[0] == views[1]) & (n_views > 1)
        views[1][same] = (views[1][same] + rng.integers(1, max(n_views, 2), size=int(same.sum()))) % n_views
    order = rng.permutation(n)
    columns = first, second, np.arange(n) < len(anchors), *views
    return np.rec.fromarrays([column[order] for column in columns], dtype=PAIR)


def deal_batches(n_pairs: int, batch_size: int, rank: int, world_size: int) -> list[np.ndarray]:
    """Cut an epoch into batches of at most ``batch_size`` and give a process its part of each: every pair once.

    All processes get the same number of batches; batches differ in size by at most one pair, and so do the
    processes' parts of a batch.
    """
    n_batches = max(1, -(-n_pairs // batch_size))
    if n_pairs // n_batches < world_size:
        fault = f"{n_pairs} pairs in {n_batches} batches leave a process of {world_size} without a pair"
        raise UserError(f"{batch_size}: {fault}; use fewer processes or larger batches", "batch_pairs")
    batches = np.array_split(np.arange(n_pairs), n_batches)
    return [np.array_split(batch, world_size)[rank] for batch in batches]


class PairBatch(NamedTuple):
    """Pairs of views, uint8 ``(B, 3, H, W)``, or pooled vectors, float32 ``(B, width)``, where the backbone is frozen.

    And whether both show the same exhibit, bool ``(B,)``, and the class of each, int64 ``(B,)``.
    """

    first: Tensor
    second: Tensor
    positive: Tensor
    first_labels: Tensor
    second_labels: Tensor


def as_pairs(batch: Any) -> PairBatch:
    """Read a batch of any loader: ``(first, second, labels)``, or with labels of each, or a `PairBatch`.

    Images are ``(B, 3, H, W)``, uint8 or float from 0 to 1; ``labels``, integers ``(B,)``, say which exhibit a pair
    shows. With labels of each, pairs of two exhibits are negatives.
    """
    if isinstance(batch, PairBatch):
        return batch
    parts = list(batch) if isinstance(batch, (list, tuple)) else []
    if len(parts) not in (3, 4) or not all(isinstance(part, Tensor) for part in parts):
        raise UserError(
            "a batch must be (first, second, labels), or (first, second, first_labels, second_labels), all tensors: "
            "images of each pair and the exhibits that they show"
        )
    first, second, *labels = parts
    if len({len(part) for part in parts}) > 1 or any(each.ndim != 1 for each in labels):
        shapes = ", ".join(str(tuple(part.shape)) for part in parts)
        raise UserError(f"images and labels of a batch must be of one length, and labels 1-D, not {shapes}")
    return PairBatch(first, second, labels[0] == labels[-1], labels[0], labels[-1])


ViewsOf = Callable[[np.ndarray, np.ndarray], Tensor]  # rows and numbers of views, each (B,), to what stands for them


def make_batch(
    pairs: np.recarray, labels: np.ndarray, first: ViewsOf, second: ViewsOf, positions: np.ndarray
) -> PairBatch:
    """Make the batch of the pairs at these positions."""
    chosen = pairs[positions]
    return PairBatch(
        first(chosen.first, chosen.first_view),
        second(chosen.second, chosen.second_view),
        torch.tensor(chosen.positive),
        torch.from_numpy(labels[chosen.first]),
        torch.from_numpy(labels[chosen.second]),
    )
