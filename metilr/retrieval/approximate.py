"""Approximate search of databases too large to compare every query with every row: FAISS proposes, float64 decides.

FAISS sorts the rows into lists by their nearest of about √N centroids, learned from 40 rows a list, and keeps each as
a code of half a byte for 4 dimensions. A search opens lists**0.75 lists: 1/4 of them at 100,000 rows, 1/8 at 10
million; more lists tell rows apart better. The best 4 k + 32 candidates by code are read from the rows, which may stay
on disk, and scored as ``search`` does. So what is found has its exact similarity; but a row can be missed.

Source: Jégou et al., Product Quantization for Nearest Neighbor Search, TPAMI 2011; André et al., Quicker ADC, TPAMI
2019 (codes of 4 bits, summed in registers).
"""

import hashlib
import json
import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from metilr.errors import UserError, one_line
from metilr.files import file_sha256, map_array, read_json, replaced_file, write_atomically
from metilr.progress import counted
from metilr.retrieval.search import Neighbours, check_queries, exact_similarities, norms, ranked, search

MIN_ROWS = 100_000  # an exact search of fewer takes less time than describing a photo
_CHUNK = 2**16  # rows added at a time: 128 MiB of width 512
_CANDIDATES = 2**17  # scored at a time
_SCHEMA, _INDEX, _NOTE = "metilr.approximate/3", "index.faiss", "approximate.json"


@dataclass(frozen=True, eq=False)
class ApproximateIndex:
    """FAISS's index of a database, and the database, float32 ``(N, D)``, which may be memory-mapped."""

    index: Any
    rows: np.ndarray

    def __str__(self) -> str:
        n_lists = faiss.extract_index_ivf(self.index).nlist
        return f"approximate: {round(n_lists**0.75):,} of {n_lists:,} lists, candidates scored exactly"

    def search(self, queries: np.ndarray, k: int, done: Callable[[int], None] = lambda n: None) -> Neighbours:
        """Find k rows with large inner products with each query, most of them the largest.

        Takes, returns and refuses what ``metilr.retrieval.search.search`` does. Where the candidates would be more
        than an eighth of all rows, the search is exact; where the lists opened hold fewer than k, all are opened.
        """
        norms(queries, "query")
        check_queries(queries, self.rows.shape, k)
        n_candidates, n_lists = 4 * k + 32, faiss.extract_index_ivf(self.index).nlist
        if n_candidates > len(self.rows) // 8:
            return search(self.rows, queries, k, done=done)
        similarities, rows = np.empty((len(queries), k)), np.empty((len(queries), k), dtype=np.int64)
        for part in np.array_split(np.arange(len(queries)), 1 + len(queries) * n_candidates // _CANDIDATES):
            chunk = np.ascontiguousarray(queries[part], dtype=np.float32)
            candidates = self._candidates(chunk, n_candidates, round(n_lists**0.75))
            short = (candidates >= 0).sum(axis=1) < k
            if short.any():
                candidates[short] = self._candidates(chunk[short], n_candidates, n_lists)
            _read_ahead(self.rows, candidates)
            exact = exact_similarities(self.rows, chunk, np.maximum(candidates, 0))
            best = ranked(np.where(candidates < 0, -np.inf, exact), candidates, k)
            similarities[part], rows[part] = best.similarities, best.rows
            done(len(part))
        return Neighbours(similarities, rows)

    def _candidates(self, queries: np.ndarray, n: int, n_opened: int) -> Any:
        """Rows with the best codes, ``(C, n)`` int64; -1 where the lists opened hold no more."""
        kinds: Any = faiss  # FAISS's type stubs know no arguments of these
        opened = kinds.SearchParametersIVF(nprobe=n_opened)  # not set on the index, which threads may share
        return self.index.search(queries, n, params=kinds.SearchParametersPreTransform(index_params=opened))[1]

    def save(self, folder: Path, made_from: str = "") -> None:
        """Write FAISS's index into a folder; ``made_from`` is a digest of what the rows were made from."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _NOTE).unlink(missing_ok=True)  # written last: with it the index is whole
        with replaced_file(folder / _INDEX) as stream:
            faiss.write_index(self.index, str(stream.name))
        note = {**_note(folder, self.rows, made_from), "faiss": faiss.__version__}
        write_atomically(folder / _NOTE, json.dumps(note, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path, rows_file: Path, made_from: str = "") -> "ApproximateIndex":
        """Read what ``save`` wrote, and map the rows that it was built over, a .npy file."""
        again = f"delete {folder} to search exactly, or make the index again"
        rows = map_array(rows_file, again)
        try:
            note = dict(read_json(folder / _NOTE))
            expected = _note(folder, rows, made_from)
            if {name: note.get(name) for name in expected} != expected:  # FAISS would read what is damaged, too
                reason = "is damaged, or was made from other descriptors or with other options than are here"
                raise UserError(f"{folder}: {reason}; {again}")
            return cls(faiss.read_index(str(folder / _INDEX)), rows)
        except UserError:
            raise
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"{folder}: its index cannot be read ({one_line(error)}); {again}") from None


def _note(folder: Path, rows: np.ndarray, made_from: str) -> dict[str, Any]:
    """What tells an index and the rows that it belongs to: a digest of all of the one, and of some of the others."""
    some = np.ascontiguousarray(rows[:: -(-len(rows) // 64)]).tobytes()
    return {
        "schema": _SCHEMA, "made_from": made_from, "shape": [*rows.shape], "type": str(rows.dtype),
        "index": file_sha256(folder / _INDEX), "rows": hashlib.sha256(some).hexdigest(),
    }  # fmt: skip


def build_approximate(rows: np.ndarray, seed: int = 0, quiet: bool = True) -> ApproximateIndex:
    """Learn lists and codes from a sample of rows ``(N, D)`` drawn with a seed, and fill them chunk by chunk.

    The same rows, seed and FAISS on the same kind of processor give the same index.
    """
    norms(rows[:1], "database")
    check_size(len(rows))
    n_lists = 2 ** round(math.log2(len(rows)) / 2)
    coded_width = rows.shape[1] + -rows.shape[1] % 4  # zeros behind a row change no inner product
    factory = f"Pad{coded_width},IVF{n_lists},PQ{coded_width // 4}x4fs"
    index = faiss.index_factory(rows.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    chosen = np.random.default_rng(seed).choice(len(rows), min(len(rows), 40 * n_lists), replace=False)
    with counted("learning and filling the lists", len(rows), "rows", quiet) as done:
        index.train(_usable(rows[np.sort(chosen)]))
        for start in range(0, len(rows), _CHUNK):
            chunk = _usable(rows[start : start + _CHUNK])
            index.add(chunk)
            done(len(chunk))
    return ApproximateIndex(index, rows)


def check_size(n: int) -> None:
    """Refuse a database of so few rows that an exact search is fast enough."""
    if n < MIN_ROWS:
        reason = f"{n:,} rows are few; below {MIN_ROWS:,} an exact search is fast, and misses nothing"
        raise UserError(f"{reason}: leave approximate out")


def _usable(rows: np.ndarray) -> np.ndarray:
    if not np.isfinite(rows).all():
        raise UserError("database descriptors hold NaN or infinite values: extract them again")
    return np.ascontiguousarray(rows, dtype=np.float32)


def _read_ahead(rows: np.ndarray, wanted: np.ndarray) -> None:
    """Have the disk begin to read rows of a mapped file all at once: one after the other takes 50 times as long."""
    if isinstance(rows, np.memmap) and isinstance(rows.base, mmap.mmap) and hasattr(mmap, "MADV_WILLNEED"):
        starts = (rows.offset + rows.strides[0] * np.unique(wanted[wanted >= 0])) // mmap.PAGESIZE * mmap.PAGESIZE
        for start in starts.tolist():
            rows.base.madvise(mmap.MADV_WILLNEED, start, rows.strides[0] + mmap.PAGESIZE)
