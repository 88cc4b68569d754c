"""Approximate maximum inner product search: an inverted file of short codes proposes, exact similarities decide.

For databases that are too large to compare every query with every row. The rows are sorted into lists by their nearest
of so many centroids, and each is kept as a product-quantised code of half a byte for 4 dimensions. Of a query's nearest
lists all codes are compared with it; the best candidates are read from the rows on disk and scored again as ``search``
does. What is found has its exact similarity, then, but a row in another list, or behind too many codes, can be missed.

The sizes follow from the number of rows N:

- lists: the power of two nearest to √N on a logarithmic scale. Their number times N products sort the rows into them,
  which is what building takes long for;
- centroids are learned from 40 rows a list (FAISS asks for 39 at least), drawn with a seed;
- a search opens 8 times the square root of the number of lists: 1/2 of them at 100,000 rows, 1/8 at 10 million. More
  lists tell rows apart better, and so the first neighbour is among them everywhere, also where descriptors have no
  structure but their small clusters (see ``benchmarks/approximate_search.py``);
- for k neighbours, 4 k + 64 candidates are scored exactly.

Source: Jégou, Douze and Schmid, Product Quantization for Nearest Neighbor Search, TPAMI 2011; André, Kermarrec and Le
Scouarnec, Quicker ADC, TPAMI 2019 (codes of 4 bits, summed in registers). Differs from FAISS's own re-ranking in that
rows stay on disk and similarities are those of ``search`` to the last bit.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np

from metilr.errors import UserError
from metilr.progress import counted
from metilr.random_rows import RandomRows
from metilr.retrieval.search import Neighbours, exact_similarities, norms, search

MIN_ROWS = 100_000  # an exact search of fewer takes less time than describing a photo
PROBES = 8  # lists that a search opens, over the square root of their number
_WIDE = 8  # a search for more candidates than one in so many rows is exact
_ROWS_A_LIST = 40  # learned from
_ITERATIONS = 10  # of k-means: more gain nothing that can be measured
_DIMS_A_CODE = 4  # dimensions that share 4 bits
_BITS = 4
_CANDIDATES_A_NEIGHBOUR = 4
_MARGIN = 64  # further candidates
_CHUNK = 2**16  # rows added at a time: 128 MiB of width 512
_QUERIES = 1024  # a chunk
_CANDIDATES = 2**20  # scored at a time


@dataclass(frozen=True, eq=False)
class ApproximateIndex:
    """A database with its inverted file.

    Attributes:
        codes: FAISS's ``IndexIVFPQFastScan`` of the rows, in their order.
        rows: The database, float32 ``(N, D)``; may be memory-mapped.
        picked: The same rows, for reading single ones from disk; None: from ``rows``.
    """

    codes: Any
    rows: np.ndarray
    picked: RandomRows | None = None

    def __str__(self) -> str:
        """How it searches, in short."""
        n_lists = self.codes.nlist
        return f"approximate: {_probes(n_lists):,} of {n_lists:,} lists, candidates scored exactly"

    def search(self, queries: np.ndarray, k: int, done: Callable[[int], None] = lambda n: None) -> Neighbours:
        """Find k rows with large inner products with each query, most of them the largest.

        Where the lists opened hold fewer than k rows, more are opened; where the candidates would be more than an
        eighth of all rows, the search is exact.

        Args:
            queries: Descriptors, ``(Q, D)`` float32.
            k: Neighbours per query, 1 to N.
            done: Told the number of queries that were answered since the last time.

        Returns:
            Exact similarities and rows, ``(Q, k)``, most similar first; equal similarities: smaller row first.

        Raises:
            UserError: If k does not fit the database, or the queries are not 2-D of its width or not finite.
        """
        norms(queries, "query")
        n, width = self.rows.shape
        if queries.shape[1] != width:
            raise UserError(
                f"query descriptors have width {queries.shape[1]}, database descriptors {width}: take both from one "
                "model"
            )
        if not 1 <= k <= n:
            raise UserError(f"--k {k}: the database has {n} images; choose k from 1 to {n}")
        n_candidates = _CANDIDATES_A_NEIGHBOUR * k + _MARGIN
        if n_candidates > n // _WIDE:
            return search(self.rows, queries, k, done=done)
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        similarities = np.empty((len(queries), k))
        rows = np.empty((len(queries), k), dtype=np.int64)
        pending, n_probes = np.arange(len(queries)), _probes(self.codes.nlist)
        chunk_size = max(1, min(_QUERIES, _CANDIDATES // n_candidates))
        while len(pending):
            short = []
            for start in range(0, len(pending), chunk_size):
                chunk = pending[start : start + chunk_size]
                candidates = self._candidates(queries[chunk], n_candidates, n_probes)
                enough = (candidates >= 0).sum(axis=1) >= k
                best = self._best(queries[chunk[enough]], candidates[enough], k)
                similarities[chunk[enough]], rows[chunk[enough]] = best.similarities, best.rows
                short.append(chunk[~enough])
                done(int(enough.sum()))
            # All lists together hold every row, so this ends.
            pending, n_probes = np.concatenate(short), min(self.codes.nlist, 4 * n_probes)
        return Neighbours(similarities, rows)

    def _candidates(self, queries: np.ndarray, n: int, n_probes: int) -> np.ndarray:
        """Rows with the best codes, ``(C, n)`` int64; -1 where the lists opened hold no more."""
        options = faiss.SearchParametersIVF()  # not set on the index, which threads may share
        options.nprobe = n_probes
        return self.codes.search(_filled_up(queries), n, params=options)[1]

    def _best(self, queries: np.ndarray, candidates: np.ndarray, k: int) -> Neighbours:
        """Score candidates ``(C, n)`` exactly and keep k."""
        source = self.rows
        if self.picked is not None:
            self.picked.expect(candidates[candidates >= 0])
            source = self.picked.array
        exact = exact_similarities(source, queries, np.maximum(candidates, 0))
        return ranked(np.where(candidates < 0, -np.inf, exact), candidates, k)


def ranked(similarities: np.ndarray, rows: np.ndarray, k: int) -> Neighbours:
    """Keep each query's k most similar rows of ``(Q, n)``; equal similarities: smaller row first."""
    order = np.lexsort((rows, -similarities), axis=1)[:, :k]
    return Neighbours(np.take_along_axis(similarities, order, axis=1), np.take_along_axis(rows, order, axis=1))


def check_size(n: int) -> None:
    """Refuse a database for which an approximate search makes no sense.

    Raises:
        UserError: If an exact search is fast enough.
    """
    if n < MIN_ROWS:
        raise UserError(
            f"--approximate: {n:,} rows are few; below {MIN_ROWS:,} an exact search takes less time than describing "
            "the photo, and misses nothing: leave it out"
        )


def count_lists(n: int) -> int:
    """How many lists n rows are sorted into."""
    return 2 ** round(math.log2(n) / 2)


def build_codes(rows: np.ndarray, seed: int = 0, quiet: bool = True) -> Any:
    """Learn the lists and codes of a database and fill them, reading a bounded number of rows at a time.

    The same rows, seed and FAISS on the same kind of processor give the same codes.

    Args:
        rows: Descriptors, ``(N, D)`` float32; may be memory-mapped.
        seed: Of the rows that are learned from.
        quiet: Show no progress.

    Returns:
        FAISS's index, for ``ApproximateIndex``.

    Raises:
        UserError: If the rows are too few for it to make sense, not 2-D or not finite.
    """
    norms(rows[:1], "database")
    n = len(rows)
    check_size(n)
    n_lists = count_lists(n)
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(n, min(n, _ROWS_A_LIST * n_lists), replace=False))
    sample = _filled_up(np.asarray(rows[chosen], dtype=np.float32))
    centroids = _learn_centroids(sample, n_lists, rng, quiet)
    quantizer = faiss.IndexFlatIP(sample.shape[1])
    quantizer.add(centroids)
    codes = faiss.IndexIVFPQFastScan(
        quantizer, sample.shape[1], n_lists, sample.shape[1] // _DIMS_A_CODE, _BITS, faiss.METRIC_INNER_PRODUCT
    )
    codes.train(sample)
    del sample
    with counted("filling the lists", n, "rows", quiet) as done:
        for start in range(0, n, _CHUNK):
            chunk = np.asarray(rows[start : start + _CHUNK], dtype=np.float32)
            _refuse_unusable(chunk, start)
            codes.add(_filled_up(chunk))
            done(len(chunk))
    return codes


def _learn_centroids(sample: np.ndarray, n_lists: int, rng: np.random.Generator, quiet: bool) -> np.ndarray:
    """Spherical k-means, ``(n_lists, D)``: the sample's directions are what is sorted."""
    _refuse_unusable(sample, None)
    centroids = sample[np.sort(rng.choice(len(sample), n_lists, replace=False))]
    with counted("learning the lists", _ITERATIONS, "passes", quiet) as done:
        for _ in range(_ITERATIONS):  # one by one: they can be watched, and interrupted
            means = faiss.Kmeans(
                sample.shape[1],
                n_lists,
                niter=1,
                spherical=True,
                seed=int(rng.integers(2**31)),
                min_points_per_centroid=1,
                max_points_per_centroid=len(sample),  # the sample is one already
            )
            means.train(sample, init_centroids=centroids)
            assert means.centroids is not None
            centroids = means.centroids
            done(1)
    return centroids


def _refuse_unusable(chunk: np.ndarray, start: int | None) -> None:
    finite = np.isfinite(chunk).all(axis=1)
    if not finite.all():
        which = "" if start is None else f" {start + int(np.argmin(finite))}"
        raise UserError(f"database descriptor{which} holds NaN or infinite values: extract it again")


def _probes(n_lists: int) -> int:
    return min(n_lists, round(PROBES * math.sqrt(n_lists)))


def code_width(width: int) -> int:
    """Dimensions of rows as they are coded: filled up to whole codes with zeros."""
    return width + -width % _DIMS_A_CODE


def _filled_up(rows: np.ndarray) -> np.ndarray:
    """Rows with zeros behind them, so that codes share their width evenly; inner products stay the same."""
    missing = code_width(rows.shape[1]) - rows.shape[1]
    return np.ascontiguousarray(np.pad(rows, ((0, 0), (0, missing))) if missing else rows)
