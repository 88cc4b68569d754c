"""Rows of a file that are wanted here and there: each is asked of the disk before it is waited for."""

import mmap
from pathlib import Path

import numpy as np

from metilr.errors import UserError
from metilr.files import map_array


class RandomRows:
    """A matrix in a .npy file, memory-mapped for reading single rows.

    An ordinary map reads a neighbourhood of 128 KiB with every row of 2 KiB, and one row after the other. This one
    reads the row alone, and as many at once as the disk takes.

    Args:
        file: float32 ``(N, D)``, C order.

    Attributes:
        array: The matrix.

    Raises:
        UserError: If the file is missing, cut off or holds something else.
    """

    def __init__(self, file: Path) -> None:
        plain = open_rows(file)
        self.array: np.ndarray = plain
        self._map: mmap.mmap | None = None
        if hasattr(mmap, "MADV_RANDOM"):  # not on Windows
            with file.open("rb") as stream:
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            self._map.madvise(mmap.MADV_RANDOM)
            self.array = np.ndarray(plain.shape, plain.dtype, buffer=self._map, offset=plain.offset)
            self._offset = plain.offset

    def expect(self, rows: np.ndarray) -> None:
        """Have the disk begin to read some rows, ``(R,)`` int64; those in memory already cost next to nothing."""
        if self._map is None:
            return
        n_bytes = self.array.strides[0]
        starts = self._offset + n_bytes * np.unique(rows)
        first = starts // mmap.PAGESIZE * mmap.PAGESIZE  # the call takes whole pages
        for start, length in zip(first.tolist(), (starts + n_bytes - first).tolist(), strict=True):
            self._map.madvise(mmap.MADV_WILLNEED, start, length)


def open_rows(file: Path) -> np.memmap:
    """Map a matrix of a .npy file, float32 ``(N, D)``, read-only.

    Raises:
        UserError: If the file is missing, cut off or holds something else.
    """
    rows = map_array(file, "make it again")
    if rows.ndim != 2 or rows.dtype != np.float32 or not rows.size or not rows.flags.c_contiguous:
        raise UserError(f"{file}: holds {rows.dtype} of shape {rows.shape}, not float32 rows; make it again")
    return rows
