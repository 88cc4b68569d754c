"""Exact maximum inner product search: float32 products propose candidates, float64 decides their order."""

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from metilr.errors import UserError, amount
from metilr.metrics.functional import DISTRACTOR

logger = logging.getLogger(__name__)

GPU_MAX_K = 2048  # FAISS's limit for selection on a GPU
_MARGIN = 16  # candidates beyond k: enough that float32 rounding seldom leaves a query unsettled
_QUERIES = 4096  # queries a chunk: FAISS's own block; shorter chunks would read the database more often
_CANDIDATES = 2**21  # candidates a chunk: 16 MiB per int64 or float64 array, however wide the search
_SIMILARITIES = 2**24  # float32 similarities a block of a ranking: 64 MiB
_PRODUCTS = 2**17  # products a block: 1 MiB, stays in cache
_TINY = float(np.finfo(np.float32).tiny)  # processors may take what is smaller for 0

SearchDevice = Literal["cpu", "gpu"]


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The k most similar database descriptors of each query, most similar first."""

    similarities: np.ndarray  # inner products, (Q, k) float64, descending
    rows: np.ndarray  # of the database, (Q, k) int64; equal similarities: smaller row first


def search(
    database: np.ndarray, queries: np.ndarray, k: int, device: SearchDevice = "cpu",
    done: Callable[[int], None] = lambda n: None,
) -> Neighbours:  # fmt: skip
    """Find the k largest inner products of queries ``(Q, D)`` over a whole database ``(N, D)``, both float32.

    FAISS proposes ``k`` and some more candidates by float32 products. They are scored again in float64 by a sum whose
    order depends on ``D`` alone and sorted by (similarity descending, row ascending). Equal rows of the database
    therefore tie exactly, and the result is the same for any chunk size, BLAS or device. No row can be missed: a row
    that was not proposed is at most as similar as the last candidate plus the rounding bound; where the k-th neighbour
    does not clear that (say, many copies of one image), the search is widened for this query until it does.

    The database may be memory-mapped and is not copied; on "gpu" each GPU holds a share of it. ``done`` is told how
    many queries were answered since the last time.
    """
    import faiss  # here, as below: the options of a command do without

    database_norms, query_norms = norms(database, "database"), norms(queries, "query")
    check_queries(queries, database.shape, k)
    check_device(device, k)
    database = np.ascontiguousarray(database, dtype=np.float32)  # no copy if it is that already
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    n, width = database.shape
    error = _rounding(width, query_norms, float(database_norms.max()))
    on_cpu: Any = functools.partial(faiss.knn, xb=database, metric=faiss.METRIC_INNER_PRODUCT)
    propose = _gpu_search(database) if device == "gpu" else on_cpu

    similarities, rows = np.empty((len(queries), k)), np.empty((len(queries), k), dtype=np.int64)
    pending, n_candidates = np.arange(len(queries)), min(n, k + _MARGIN)
    while len(pending):
        if device == "gpu" and GPU_MAX_K < n_candidates < n:
            logger.info("%d queries have too many near-ties for the GPU's selection: on CPU", len(pending))
            propose = on_cpu
        unsettled = []
        chunk_size = max(1, min(_QUERIES, _CANDIDATES // n_candidates))
        for start in range(0, len(pending), chunk_size):
            chunk = pending[start : start + chunk_size]
            if n_candidates == n:
                candidates, bound = np.tile(np.arange(n), (len(chunk), 1)), np.full(len(chunk), -np.inf)
            else:
                proposed, candidates = propose(queries[chunk], k=n_candidates)
                bound = proposed[:, -1].astype(np.float64) + error[chunk]
            best = ranked(exact_similarities(database, queries[chunk], candidates), candidates, k)
            similarities[chunk], rows[chunk] = best.similarities, best.rows
            settled = best.similarities[:, -1] > bound
            unsettled.append(chunk[~settled])
            done(int(settled.sum()))
        pending, n_candidates = np.concatenate(unsettled), min(n, 4 * n_candidates)
    return Neighbours(similarities, rows)


def class_ranks(database: np.ndarray, queries: np.ndarray, labels: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Rank, for each query, its class among all classes, each as similar as its most similar row: 1 is the first.

    The ranking is of the whole ``database`` ``(N, D)`` and exact as ``search`` is; equal similarities: the class of the
    smaller row first. ``labels``, ``(N,)``, are the rows' classes, ``target``, ``(Q,)``, those of ``queries``:
    ``(Q, D)``, or ``(Q, V, D)`` of V views, of which the most similar counts. Both arrays of vectors are float32.

    Returns:
        float64 ``(Q,)``: inf where no row shows the class, NaN where target is DISTRACTOR.
    """
    views = queries[:, None] if queries.ndim == 2 else queries
    database_norms, query_norms = norms(database, "database"), norms(views.reshape(-1, views.shape[-1]), "query")
    check_queries(views[:, 0], database.shape, 1)
    if labels.shape != (len(database),):
        raise UserError(f"{labels.shape}: name one of each of the {len(database)} database rows", "labels")
    if target.shape != (len(views),):
        raise UserError(f"{target.shape}: name one of each of the {len(views)} queries", "target")
    error = _rounding(database.shape[1], query_norms, float(database_norms.max())).reshape(views.shape[:2]).max(axis=1)
    by_label = np.argsort(labels, kind="stable")
    starts, ends = (np.searchsorted(labels[by_label], target, side=side) for side in ("left", "right"))
    ranks = np.where(target == DISTRACTOR, np.nan, np.inf)
    ranked_queries = np.flatnonzero((target != DISTRACTOR) & (starts < ends))
    block_size = max(1, _SIMILARITIES // (len(database) * views.shape[1]))
    for start in range(0, len(ranked_queries), block_size):
        block = ranked_queries[start : start + block_size]
        products = views[block].reshape(-1, views.shape[-1]) @ database.T
        for i, near in zip(block, products.reshape(len(block), -1, len(database)).max(axis=1), strict=True):
            own_rows = by_label[starts[i] : ends[i]]  # ascending
            ahead = _rows_ahead(database, views[i], own_rows, near, error[i])
            ranks[i] = 1 + len(np.unique(labels[ahead]))
    return ranks


def _rows_ahead(
    database: np.ndarray, views: np.ndarray, own_rows: np.ndarray, similarities: np.ndarray, error: float
) -> np.ndarray:
    """Return which rows come before all of ``own_rows``, bool ``(N,)``; ``similarities`` are off by up to ``error``."""

    def exactly(rows: np.ndarray) -> np.ndarray:
        return exact_similarities(database, views, np.tile(rows, (len(views), 1))).max(axis=0)

    of_own = exactly(own_rows)
    best, row = of_own.max(), own_rows[of_own.argmax()]
    similarities = similarities.astype(np.float64)
    ahead = similarities > best + error
    unsettled = np.flatnonzero(~ahead & ~(similarities < best - error))
    of_unsettled = exactly(unsettled)
    ahead[unsettled] = (of_unsettled > best) | ((of_unsettled == best) & (unsettled < row))
    return ahead


def _rounding(width: int, query_norms: np.ndarray, largest_norm: float) -> np.ndarray:
    """How far a float32 product of each query with any row can be from the exact one, ``(Q,)``."""
    # |float32 dot product - exact| <= D u |q| |x| for any order of summation (Higham, Accuracy and Stability of
    # Numerical Algorithms, 3.5), u = 2**-24; the 2% cover the norms' and float64's own rounding. On top, each entry of
    # either vector, each product and each sum may be up to _TINY and count as 0.
    error = 1.02 * (width + 2) * 2.0**-24 * query_norms * largest_norm
    return error + 2 * width * _TINY * (1 + query_norms) * (1 + largest_norm)


def exact_similarities(database: np.ndarray, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the inner product of each query with its ``rows (C, R)`` in float64, ``(C, R)``.

    Products of float32 numbers are exact in float64. NumPy's sum over a contiguous last axis adds pairwise in an
    order that depends on the length alone; BLAS adds by a row's place too, and equal rows no longer tie.
    """
    flat_rows, owners = rows.ravel(), np.repeat(np.arange(len(queries)), rows.shape[1])
    exact = np.empty(len(flat_rows))
    block_size = max(1, _PRODUCTS // database.shape[1])
    for start in range(0, len(flat_rows), block_size):
        block = slice(start, start + block_size)
        products = database[flat_rows[block]].astype(np.float64)
        products *= queries[owners[block]]
        products.sum(axis=1, out=exact[block])
    return exact.reshape(rows.shape)


def ranked(similarities: np.ndarray, rows: np.ndarray, k: int) -> Neighbours:
    """Keep each query's k most similar rows of ``(Q, n)``; equal similarities: smaller row first."""
    order = np.lexsort((rows, -similarities), axis=1)[:, :k]
    return Neighbours(np.take_along_axis(similarities, order, axis=1), np.take_along_axis(rows, order, axis=1))


def check_queries(queries: np.ndarray, shape: tuple[int, ...], k: int) -> None:
    """Refuse queries of another width than a database of ``shape`` (N, D), and a k that it cannot serve."""
    n, width = shape
    if queries.shape[1] != width:
        raise UserError(f"queries have width {queries.shape[1]}, the database {width}: take both from one model")
    if not 1 <= k <= n:
        raise UserError(f"{k}: the database has {amount(n, 'image')}; choose k from 1 to {n}", "k")


def check_device(device: SearchDevice, k: int) -> None:
    """Refuse a device that is not there, or that cannot select so many neighbours."""
    if device == "cpu":
        return
    import faiss

    if faiss.get_num_gpus() == 0:
        raise UserError("FAISS sees no GPU to search on: take cpu as the device of the search, or install faiss-gpu")
    if k + _MARGIN > GPU_MAX_K:
        raise UserError(f"{k}: a GPU selects at most {GPU_MAX_K - _MARGIN}; choose less, or search on the CPU", "k")


def device_for(device: SearchDevice, k: int) -> SearchDevice:
    """Where k neighbours can be selected: the CPU where they are more than a GPU selects."""
    if device == "gpu" and k + _MARGIN > GPU_MAX_K:
        logger.info("%d neighbours are too many for the GPU's selection: on CPU", k)
        return "cpu"
    return device


def _gpu_search(database: np.ndarray) -> Any:
    """Spread the database over all GPUs; what is returned searches there as ``faiss.knn`` does."""
    import faiss

    options = faiss.GpuMultipleClonerOptions()
    options.shard = True
    # Cloned while empty, filled from the array: a full CPU index would be a second copy in memory.
    index = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(database.shape[1]), co=options)
    index.add(database)
    return index.search


def norms(descriptors: np.ndarray, name: str) -> np.ndarray:
    """Return the lengths of finite descriptors ``(N, D)``, float64 ``(N,)``; none comes out too short."""
    if descriptors.ndim != 2 or descriptors.shape[1] == 0:
        raise UserError(f"{name} descriptors have shape {descriptors.shape}: expected (rows, width)")
    blocks = (descriptors[i : i + 2**13] for i in range(0, len(descriptors), 2**13))
    squares = [np.einsum("nd,nd->n", block, block) for block in blocks]
    hidden = math.sqrt(descriptors.shape[1] * _TINY)  # length of a vector whose squares all count as 0
    lengths = np.sqrt(np.concatenate(squares, dtype=np.float64) + hidden**2) if squares else np.empty(0)
    if not np.isfinite(lengths).all():
        row = int(np.argmin(np.isfinite(lengths)))
        raise UserError(f"{name} descriptor {row} holds NaN, infinite or huge values: extract it again")
    return lengths
