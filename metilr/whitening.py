"""Whitening of descriptors: an affine map, applied to all that is compared, saved and loaded."""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from metilr.errors import UserError, one_line
from metilr.files import replaced_file
from metilr.zip_files import read_npz

DEFAULT_DIM = 512
"""The paper's: GAP of R18SWSL fine-tuned falls from 36.1 to 34.1 at 256 dimensions."""
_BLOCK_ROWS = 4096  # 64 MiB in float64 at width 2048; longer blocks are no faster
_LARGEST = 1e100  # of a number in a saved whitening: products of it stay finite


@dataclass(frozen=True, eq=False)
class PCAWhitening:
    """An affine map that decorrelates descriptors and gives their directions equal variance.

    Attributes:
        mean: Mean of the database's descriptors, ``(D,)`` float64.
        projection: Eigenvectors divided by eigenvalue**(shrinkage / 2), ``(D, dim)`` float64.
        eigenvalues: All eigenvalues of the covariance, descending, ``(D,)`` float64; the first ``dim``
            belong to the columns of ``projection``.
        shrinkage: 1 is whitening, 0 is plain PCA.
        n: Number of descriptors it was learned on.
        supported_dim: Numerical rank of the covariance, the largest ``dim`` that the data supports. After a
            fit with ``dim=None``, ``dim < DEFAULT_DIM`` says that the data (or ``D``) allowed no more.
    """

    mean: np.ndarray
    projection: np.ndarray
    eigenvalues: np.ndarray
    shrinkage: float
    n: int
    supported_dim: int

    format: ClassVar[str] = "metilr.PCAWhitening/1"

    @property
    def dim(self) -> int:
        """Width of whitened descriptors."""
        return self.projection.shape[1]

    def transform(self, x: np.ndarray) -> np.ndarray:
        """Whiten and L2-normalise descriptors: L2((x - mean) @ projection).

        Computed in float64 in blocks of rows: the directions of small variance are differences of nearly
        equal numbers, which float32 sums would lose. Only the result is rounded to float32. A descriptor
        equal to the mean has no direction and stays zero.

        Args:
            x: Descriptors, ``(n, D)``; may be memory-mapped, is never copied whole.

        Returns:
            Unit descriptors, ``(n, dim)`` float32.

        Raises:
            UserError: If the width differs from ``D``, or a descriptor holds NaN or infinity.
        """
        width = len(self.mean)
        if x.ndim != 2 or x.shape[1] != width:
            raise UserError(
                f"descriptors have shape {x.shape}, but the whitening was learned on width {width}: "
                "learn it on descriptors of the same model (--whitening pca) or take --whitening none"
            )
        whitened = np.empty((len(x), self.dim), dtype=np.float32)
        for start, block in row_blocks(x):
            projected = (block - self.mean) @ self.projection
            norms = np.linalg.norm(projected, axis=1, keepdims=True)
            if not np.isfinite(norms).all():
                row = start + int(np.argmin(np.isfinite(norms[:, 0])))
                raise UserError(f"descriptor {row} holds NaN or infinite values: extract it again")
            whitened[start : start + len(block)] = projected / np.where(norms > 0, norms, 1)
        return whitened

    def sha256(self) -> str:
        """A digest of the mean and the projection, which decide what ``transform`` gives."""
        return hashlib.sha256(self.mean.tobytes() + np.ascontiguousarray(self.projection).tobytes()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write everything to one ``.npz`` file, whole or not at all.

        Args:
            path: File to write; its folder is made if need be.

        Raises:
            UserError: If the file cannot be written.
        """
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replaced_file(path) as file:
                arrays: dict[str, Any] = parts_of_whitening(self)
                np.savez(file, format=np.array(self.format), **arrays)
        except OSError as error:
            raise UserError(f"cannot write the whitening to {path} ({error}): name another place") from error

    @staticmethod
    def load(path: str | Path) -> "PCAWhitening":
        """Read what ``save`` wrote, of either kind; no pickle code is run.

        Args:
            path: File that ``save`` wrote.

        Raises:
            UserError: If the file is missing, truncated, or not a whitening of metilr.
        """
        try:
            parts = read_npz(Path(path))
            return whitening_from_parts(str(parts["format"]), parts)
        except MemoryError:
            raise
        except Exception as error:  # damaged archives and headers raise nearly any type
            why = one_line(error)
            raise UserError(f"{path} cannot be read as a whitening that metilr saved ({why}): learn it anew") from error

    def _check(self) -> None:
        width = len(self.mean)
        if self.projection.ndim != 2 or self.mean.shape != (width,) or self.eigenvalues.shape != (width,):
            raise ValueError("its arrays have wrong shapes")
        if self.projection.shape[0] != width or not 1 <= self.dim <= self.supported_dim <= width:
            raise ValueError("its arrays do not fit each other")
        for array in (self.mean, self.projection, self.eigenvalues):
            if array.dtype != np.float64 or not (np.abs(array) < _LARGEST).all():  # which NaN is not, either
                raise ValueError("its arrays are not finite float64")
        if not 0 <= self.shrinkage <= 1:
            raise ValueError("its shrinkage is not in [0, 1]")


@dataclass(frozen=True, eq=False)
class LearnedWhitening(PCAWhitening):
    """PCA of the database where differences within pairs have equal variance in all directions.

    Attributes:
        eigenvalues: Of the database's covariance there, descending, ``(D,)`` float64; ``projection`` is not divided by
            them.
        shrinkage: Weight of the identity in the covariance of differences, in (0, 1].
        n_pairs: Number of pairs it was learned on.
    """

    n_pairs: int

    format: ClassVar[str] = "metilr.LearnedWhitening/1"


def parts_of_whitening(whitening: PCAWhitening) -> dict[str, np.ndarray]:
    """All that a whitening consists of, by name."""
    return {field.name: np.asarray(getattr(whitening, field.name)) for field in dataclasses.fields(whitening)}


def whitening_from_parts(kind: str, parts: Mapping[str, np.ndarray]) -> PCAWhitening:
    """Put together what ``parts_of_whitening`` took apart.

    Raises:
        ValueError: If the kind is unknown, or the parts do not fit each other.
        KeyError: If one is missing.
    """
    kinds = {each.format: each for each in (PCAWhitening, LearnedWhitening)}
    if kind not in kinds:
        raise ValueError(f"its format is {kind}, not {' or '.join(kinds)}")
    wanted = {field.name: parts[field.name] for field in dataclasses.fields(kinds[kind])}
    arguments: dict[str, Any] = {name: part if part.ndim else part.item() for name, part in wanted.items()}
    for name in {"n", "supported_dim", "n_pairs"} & arguments.keys():
        if type(arguments[name]) is not int or arguments[name] < 1:
            raise ValueError(f"its {name} is no number from 1 up")
    if type(arguments["shrinkage"]) is not float:
        raise ValueError("its shrinkage is no number")
    for name in ("mean", "projection", "eigenvalues"):
        if not isinstance(arguments[name], np.ndarray):
            raise ValueError(f"its {name} is no array")
    whitening = kinds[kind](**arguments)
    whitening._check()
    return whitening


def row_blocks(x: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the first row and a float64 copy of each block of rows ``(n, D)``."""
    for start in range(0, len(x), _BLOCK_ROWS):
        yield start, np.array(x[start : start + _BLOCK_ROWS], dtype=np.float64)
