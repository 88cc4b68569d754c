"""Candidates of an exact search from bfloat16 products, with a bound of what rounding can hide.

On CPUs with bfloat16 arithmetic such products take a half to a fifth of the time of float32 ones.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

_ROWS = 8192  # of the database at a time: 64 MiB of products with 4,096 queries
_GROUP = 64  # products whose maximum alone is looked at first
_PENDING = 2**22  # entries of a merge at a time: some 50 MiB
_TINY = float(np.finfo(np.float32).tiny)  # below it processors may take a number for 0, and bfloat16 products do


def least_length(width: int) -> float:
    """Length that a vector may have although all squares of its entries count as 0."""
    return math.sqrt(width * _TINY)


def underflow(width: int, query_norms: np.ndarray, largest_norm: float) -> np.ndarray:
    """How much of an inner product can be lost with all that is too small for float32, ``(Q,)``.

    Entries of either vector, products and sums: each of them may be up to ``_TINY`` and count as 0.
    """
    lost: np.ndarray = 2 * width * _TINY * (1 + query_norms) * (1 + largest_norm)
    return lost


def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices itself, adding in float32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class Bfloat16Candidates:
    """Proposes each query's rows of largest rounded inner product.

    Rounding moves an inner product by at most |q - q'| |x| + |q'| |x - x'| (Cauchy and Schwarz; q' and x' are the
    rounded vectors, whose errors are measured, not estimated), the sum in float32 by at most D u |q'| |x'|, u = 2**-24
    for each of product and sum, the rounding of the result by 2**-8 of it, and ``underflow`` is lost.

    Args:
        database: Float32 ``(N, D)``, finite; read in blocks, never copied whole.
        norms: Length of each row, ``(N,)``.
    """

    def __init__(self, database: np.ndarray, norms: np.ndarray) -> None:
        self.database = database
        self.largest_norm = float(norms.max(initial=0))
        self.largest_error = float(_rounding_error(database).max(initial=0))

    def __call__(self, queries: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Find candidates.

        Args:
            queries: Float32 ``(C, D)``.
            width: Candidates of each, at most N.

        Returns:
            Rounded inner products, float32, descending, and rows, int64; ``(C, width)`` each.
        """
        rounded = _tensor(queries).bfloat16()
        best = _Best(len(queries), width)
        for i, start in enumerate(range(0, len(self.database), _ROWS)):
            block = _tensor(self.database[start : start + _ROWS]).bfloat16()
            best.add(rounded @ block.T, start)
            # The more rows were seen, the fewer are new among the best: merge at 1, 2, 4, 8 ... blocks.
            if i & (i + 1) == 0 or best.n_pending > _PENDING:
                best.merge()
        best.merge()
        return best.similarities.numpy(), best.rows.numpy()

    def errors(self, queries: np.ndarray, query_norms: np.ndarray) -> np.ndarray:
        """How far a product can be from the exact one, but for the rounding of the result, ``(C,)`` float64."""
        width = queries.shape[1]
        rounding = _rounding_error(queries)
        largest = self.largest_norm + self.largest_error
        summed = (query_norms + rounding) * largest * 2 * (width + 2) * 2.0**-24
        rounded = rounding * self.largest_norm + (query_norms + rounding) * self.largest_error
        # The 1% covers the rounding of the norms themselves.
        errors: np.ndarray = 1.01 * (rounded + summed) + underflow(width, query_norms, self.largest_norm)
        return errors


class _Best:
    """The entries of largest value so far of each query, and those that wait to be merged with them."""

    def __init__(self, n_queries: int, width: int) -> None:
        self.similarities = torch.full((n_queries, width), -torch.inf)
        self.rows = torch.full((n_queries, width), -1)
        self.pending: list[tuple[Tensor, Tensor, Tensor]] = []  # query, row, value

    @property
    def n_pending(self) -> int:
        return sum(len(owners) for owners, _, _ in self.pending)

    def add(self, products: Tensor, first_row: int) -> None:
        """Take in the products with a block of rows, ``(C, rows)``; what cannot be among the best is dropped."""
        n_queries, n_rows = products.shape
        if first_row == 0:  # nothing is known yet, so nothing can be dropped
            width = min(n_rows, self.rows.shape[1])
            best, self.rows[:, :width] = products.topk(width, dim=1)
            self.similarities[:, :width] = best.float()
            return
        if n_rows % _GROUP:
            products = F.pad(products, (0, -n_rows % _GROUP), value=-torch.inf)
        groups = products.view(n_queries, -1, _GROUP)
        thresholds = self.similarities[:, -1]
        # A rounded value above the threshold is so in bfloat16 too: thresholds are such values themselves.
        owners, places = (groups.amax(dim=2) > thresholds.bfloat16()[:, None]).nonzero(as_tuple=True)
        for part in range(0, len(owners), _PENDING // _GROUP):
            owner, place = owners[part : part + _PENDING // _GROUP], places[part : part + _PENDING // _GROUP]
            values = groups[owner, place].float()
            which, column = (values > thresholds[owner, None]).nonzero(as_tuple=True)
            rows = first_row + place[which] * _GROUP + column
            self.pending.append((owner[which], rows, values[which, column]))
            if self.n_pending > _PENDING:
                self.merge()
                thresholds = self.similarities[:, -1]

    def merge(self) -> None:
        """Bring the best up to date."""
        if not self.n_pending:
            return
        owners, rows, values = (torch.cat(parts) for parts in zip(*self.pending, strict=True))
        self.pending = []
        owners, order = owners.sort(stable=True)
        rows, values = rows[order], values[order]
        counts = owners.bincount(minlength=len(self.rows))
        ends = counts.cumsum(0)
        places = torch.arange(len(owners)) - (ends - counts)[owners]
        step = max(1, _PENDING // int(counts.max()))
        for first in range(0, len(self.rows), step):
            last = min(first + step, len(self.rows))
            part = slice(int(ends[first] - counts[first]), int(ends[last - 1]))
            longest = int(counts[first:last].max())
            new_values = torch.full((last - first, longest), -torch.inf)
            new_rows = torch.full((last - first, longest), -1)
            new_values[owners[part] - first, places[part]] = values[part]
            new_rows[owners[part] - first, places[part]] = rows[part]
            all_values = torch.cat([self.similarities[first:last], new_values], dim=1)
            best, chosen = all_values.topk(self.rows.shape[1], dim=1)
            self.similarities[first:last] = best
            self.rows[first:last] = torch.cat([self.rows[first:last], new_rows], dim=1).gather(1, chosen)


def _rounding_error(vectors: np.ndarray) -> np.ndarray:
    """How far each of some vectors moves by rounding to bfloat16, ``(n,)`` float64; a block at a time."""
    moved = np.empty(len(vectors))
    for start in range(0, len(vectors), _ROWS):
        exact = _tensor(vectors[start : start + _ROWS])
        moved[start : start + _ROWS] = (exact - exact.bfloat16().float()).norm(dim=1)
    return moved + least_length(vectors.shape[1])


def _tensor(vectors: np.ndarray) -> Tensor:
    """The same numbers; a copy of what may not be written to, such as rows of a mapped file."""
    return torch.from_numpy(np.require(vectors, requirements="W"))
