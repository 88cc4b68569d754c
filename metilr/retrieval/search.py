"""Exact maximum inner product search: rounded products find candidates, float64 decides their order."""

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import faiss
import numpy as np

from metilr.bfloat16_candidates import Bfloat16Candidates, has_bfloat16, least_length, underflow
from metilr.errors import UserError

logger = logging.getLogger(__name__)

GPU_MAX_K = 2048  # FAISS's limit for selection on a GPU
_MARGIN = 16  # candidates beyond k: enough that float32 rounding seldom leaves a query unsettled
_BFLOAT16_MARGIN = 64  # the same for bfloat16 and whitened descriptors; what it leaves open is searched in float32
_BFLOAT16_QUERIES = 64  # for fewer queries, rounding the database takes longer than it saves
_BFLOAT16_ROWS = 2**14  # the same for rows
_WORTHWHILE = 0.5  # share of a chunk settled from which bfloat16 saves time: it takes 0.2 to 0.5 of float32's
_QUERIES = 4096  # queries a chunk: FAISS's own block; shorter chunks would read the database more often
_CANDIDATES = 2**21  # candidates a chunk: 16 MiB per int64 or float64 array, however wide the search
_PRODUCTS = 2**17  # products a block: 1 MiB, stays in cache

SearchDevice = Literal["cpu", "gpu"]

# Takes queries (C, D) and a width; returns float32 similarities, descending, and rows, both (C, width).
_Candidates = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The k most similar database descriptors of each query, most similar first.

    Attributes:
        similarities: Inner products, ``(Q, k)`` float64, descending.
        rows: Database rows, ``(Q, k)`` int64; equal similarities: smaller row first.
    """

    similarities: np.ndarray
    rows: np.ndarray


def search(
    database: np.ndarray,
    queries: np.ndarray,
    k: int,
    device: SearchDevice = "cpu",
    done: Callable[[int], None] = lambda n: None,
) -> Neighbours:
    """Find each query's k largest inner products over the whole database.

    ``k`` and some more candidates are proposed by products in bfloat16, where the CPU has such arithmetic and the
    search is large, else by FAISS in float32. They are scored again in float64 by a sum whose order depends on
    ``D`` alone and sorted by (similarity descending, row ascending). Equal rows of the database therefore tie
    exactly, and the result is the same for any chunk size, BLAS or device. No row can be missed: a row that was not
    proposed is at most as similar as the last candidate plus the rounding bound; where the k-th answer does not
    clear that (say, many copies of one image), the search is widened for this query until it does. A database of
    nothing but (nearly) equal descriptors thus costs a float64 product with every row.

    Args:
        database: Descriptors, ``(N, D)`` float32; may be memory-mapped, is not copied.
        queries: Descriptors, ``(Q, D)`` float32.
        k: Neighbours per query, 1 to N.
        device: "cpu", or "gpu" for all GPUs, each of which holds a share of the database.
        done: Told the number of queries that were answered since the last time.

    Returns:
        Similarities and rows, ``(Q, k)`` each.

    Raises:
        UserError: If ``k`` does not fit the database (or the GPU), arrays are not 2-D of one width or not
            finite, or no GPU is there.
    """
    database_norms = norms(database, "database")
    query_norms = norms(queries, "query")
    n, width = database.shape
    if queries.shape[1] != width:
        raise UserError(
            f"query descriptors have width {queries.shape[1]}, database descriptors {width}: take both from one model"
        )
    if not 1 <= k <= n:
        raise UserError(f"--k {k}: the database has {n} images; choose k from 1 to {n}")
    database = np.ascontiguousarray(database, dtype=np.float32)  # no copy if it is that already
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    check_device(device, k)
    by_bfloat16 = device == "cpu" and n >= _BFLOAT16_ROWS and len(queries) >= _BFLOAT16_QUERIES and has_bfloat16()
    proposer = (_coarse_proposer if by_bfloat16 else _proposer)(database, database_norms, queries, query_norms, device)

    similarities = np.empty((len(queries), k))
    rows = np.empty((len(queries), k), dtype=np.int64)
    pending, n_candidates = np.arange(len(queries)), min(n, k + proposer.margin)
    while len(pending):
        if device == "gpu" and GPU_MAX_K < n_candidates < n:
            logger.info("%d queries have too many near-ties for the GPU's selection: on CPU", len(pending))
            proposer = dataclasses.replace(proposer, find=_on_cpu(database))
        unsettled = []
        chunk_size = max(1, min(_QUERIES, _CANDIDATES // n_candidates))
        chunks = np.split(pending, np.arange(chunk_size, len(pending), chunk_size))
        for i, chunk in enumerate(chunks):
            similarities[chunk], rows[chunk], settled = _best(
                proposer, database, queries[chunk], k, n_candidates, proposer.error[chunk]
            )
            unsettled.append(chunk[~settled])
            done(int(settled.sum()))
            if proposer.is_coarse and settled.mean() < _WORTHWHILE:
                unsettled += chunks[i + 1 :]
                break
        pending, n_candidates = np.concatenate(unsettled), min(n, 4 * n_candidates)
        if proposer.is_coarse and len(pending):
            proposer = _proposer(database, database_norms, queries, query_norms, device)
            n_candidates = min(n, k + proposer.margin)
    return Neighbours(similarities, rows)


@dataclass(frozen=True, eq=False)
class _Proposer:
    """What finds candidates, and how far its products can be from the exact ones.

    Attributes:
        find: Finds them.
        error: For each query, ``(Q,)``.
        relative_error: Of the product itself, on top.
        margin: Candidates to ask for beyond k at first.
        is_coarse: Whether queries that are left open are better asked of a finer one than for more candidates: where
            all descriptors resemble each other, thousands lie within the error of bfloat16.
    """

    find: _Candidates
    error: np.ndarray
    relative_error: float = 0.0
    margin: int = _MARGIN
    is_coarse: bool = False


def _coarse_proposer(
    database: np.ndarray, norms: np.ndarray, queries: np.ndarray, query_norms: np.ndarray, device: SearchDevice
) -> _Proposer:
    candidates = Bfloat16Candidates(database, norms)
    return _Proposer(candidates, candidates.errors(queries, query_norms), 2.0**-8, _BFLOAT16_MARGIN, is_coarse=True)


def _proposer(
    database: np.ndarray, norms: np.ndarray, queries: np.ndarray, query_norms: np.ndarray, device: SearchDevice
) -> _Proposer:
    width = database.shape[1]
    # |float32 dot product - exact| <= D u |q| |x| for any order of summation (Higham, Accuracy and Stability
    # of Numerical Algorithms, 3.5), u = 2**-24. The 2% cover the norms' and float64's own rounding.
    largest_norm = float(norms.max(initial=0))
    error = 1.02 * (width + 2) * 2.0**-24 * query_norms * largest_norm + underflow(width, query_norms, largest_norm)
    return _Proposer(_on_gpus(database) if device == "gpu" else _on_cpu(database), error)


def _best(
    proposer: _Proposer, database: np.ndarray, queries: np.ndarray, k: int, n_candidates: int, error: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the k best of n_candidates, ``(C, k)`` twice, and whether no other row can belong to them."""
    if n_candidates == len(database):
        candidates = np.tile(np.arange(n_candidates), (len(queries), 1))
        bound = np.full(len(queries), -np.inf)
    else:
        proposed, candidates = proposer.find(queries, n_candidates)
        last = proposed[:, -1].astype(np.float64)
        bound = last + proposer.relative_error * np.abs(last) + error
    exact = exact_similarities(database, queries, candidates)
    order = np.lexsort((candidates, -exact), axis=1)[:, :k]
    similarities = np.take_along_axis(exact, order, axis=1)
    return similarities, np.take_along_axis(candidates, order, axis=1), similarities[:, -1] > bound


def exact_similarities(database: np.ndarray, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the inner product of each query with its rows, ``(C, R)``, in float64.

    Products of float32 numbers are exact in float64. NumPy's sum over a contiguous last axis adds pairwise in
    an order that depends on the length alone; BLAS adds by a row's place too, and equal rows no longer tie.
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


def _on_cpu(database: np.ndarray) -> _Candidates:
    """Search the array where it lies, on all cores."""
    return lambda queries, k: faiss.knn(queries, database, k, metric=faiss.METRIC_INNER_PRODUCT)


def check_device(device: SearchDevice, k: int) -> None:
    """Refuse a device that is not there, or that cannot select so many neighbours.

    Raises:
        UserError: If FAISS sees no GPU, or k passes what a GPU selects.
    """
    if device == "cpu":
        return
    if faiss.get_num_gpus() == 0:
        raise UserError(
            "--search_device gpu: FAISS sees no GPU; take --search_device cpu, or install faiss-gpu and "
            "check nvidia-smi and CUDA_VISIBLE_DEVICES"
        )
    if k + _MARGIN > GPU_MAX_K:
        raise UserError(
            f"--k {k}: a GPU selects at most {GPU_MAX_K - _MARGIN}; choose a smaller k or --search_device cpu"
        )


def device_for(device: SearchDevice, k: int) -> SearchDevice:
    """Where k neighbours can be selected: the CPU where they are more than a GPU selects."""
    if device == "gpu" and k + _MARGIN > GPU_MAX_K:
        logger.info("%d neighbours are too many for the GPU's selection: on CPU", k)
        return "cpu"
    return device


def _on_gpus(database: np.ndarray) -> _Candidates:
    """Spread the database over all GPUs in float32 and search there."""
    options = faiss.GpuMultipleClonerOptions()
    options.shard = True
    # Cloned while empty, filled from the array: a full CPU index would be a second copy in memory.
    index = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(database.shape[1]), co=options)
    index.add(database)
    return index.search


def norms(descriptors: np.ndarray, name: str) -> np.ndarray:
    """Return the lengths of descriptors ``(N, D)``, float64 ``(N,)``, in one pass; none comes out too short.

    Raises:
        UserError: If they are no table of finite numbers; ``name`` says which these are.
    """
    if descriptors.ndim != 2 or descriptors.shape[1] == 0:
        raise UserError(f"{name} descriptors have shape {descriptors.shape}: expected (rows, width)")
    block_size = 2**13
    squares = [
        np.einsum("nd,nd->n", block, block)
        for block in (descriptors[i : i + block_size] for i in range(0, len(descriptors), block_size))
    ]
    least = least_length(descriptors.shape[1])  # of entries whose squares are too small for float32
    norms = np.sqrt(np.concatenate(squares, dtype=np.float64) + least**2) if squares else np.empty(0)
    if not np.isfinite(norms).all():
        row = int(np.argmin(np.isfinite(norms)))
        raise UserError(f"{name} descriptor {row} holds NaN, infinite or huge values: extract it again")
    return norms
