"""Whitening of descriptors: an affine map, learned on the database and applied to all that is compared."""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from metilr.errors import UserError, one_line
from metilr.files import read_npz, replaced_file

DEFAULT_DIM = 512  # the paper's: GAP of R18SWSL fine-tuned falls from 36.1 to 34.1 at 256 dimensions
PAIR_SHRINKAGE = 0.05  # by GAP on val of one small museum; between 0.02 and 0.1 it hardly matters there
_BLOCK_ROWS = 4096  # 64 MiB in float64 at width 2048; longer blocks are no faster
_LARGEST = 1e100  # of a number in a whitening: products of it stay finite
_SAME_MAGNITUDE = 1e-6  # far above eigh's rounding, far below any difference that carries meaning


@dataclass(frozen=True, eq=False)
class PCAWhitening:
    """An affine map that decorrelates descriptors and gives their directions equal variance; all in float64."""

    mean: np.ndarray  # of the database's descriptors, (D,)
    projection: np.ndarray  # eigenvectors divided by eigenvalue**(shrinkage / 2), (D, dim)
    eigenvalues: np.ndarray  # of the covariance, descending, (D,); the first dim belong to projection
    shrinkage: float  # 1 is whitening, 0 is plain PCA
    n: int  # descriptors it was learned on
    supported_dim: int  # numerical rank of the covariance, the largest dim that the data supports

    format: ClassVar[str] = "metilr.PCAWhitening/1"

    def __post_init__(self) -> None:
        """Refuse parts that do not fit each other: they may come from a file."""
        width, arrays = len(self.mean), (self.mean, self.projection, self.eigenvalues)
        if [array.shape for array in arrays] != [(width,), (width, self.projection.size // max(width, 1)), (width,)]:
            raise ValueError("its arrays do not fit each other")
        if not all(array.dtype == np.float64 and (np.abs(array) < _LARGEST).all() for array in arrays):  # NaN neither
            raise ValueError("its arrays are not finite float64")
        counts = [getattr(self, field.name) for field in dataclasses.fields(self) if field.type is int]
        are_whole = all(type(count) is int and count >= 1 for count in counts)
        if not are_whole or not 1 <= self.dim <= self.supported_dim <= width:
            raise ValueError("its numbers do not fit its arrays")
        if type(self.shrinkage) is not float or not 0 <= self.shrinkage <= 1:
            raise ValueError("its shrinkage is not in [0, 1]")

    @property
    def dim(self) -> int:
        """Width of whitened descriptors."""
        return self.projection.shape[1]

    def transform(self, x: np.ndarray) -> np.ndarray:
        """Whiten and L2-normalise descriptors ``(n, D)``: L2((x - mean) @ projection), ``(n, dim)`` float32.

        Computed in float64 in blocks of rows: the directions of small variance are differences of nearly equal
        numbers, which float32 sums would lose. Only the result is rounded to float32. ``x`` may be memory-mapped, and
        is never copied whole. A descriptor equal to the mean has no direction and stays zero.
        """
        if x.ndim != 2 or x.shape[1] != len(self.mean):
            fault = f"descriptors have shape {x.shape}, but the whitening was learned on width {len(self.mean)}"
            raise UserError(f"{fault}: learn it on descriptors of the same model, or do without")
        whitened = np.empty((len(x), self.dim), dtype=np.float32)
        for start, block in _row_blocks(x):
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
        """Write everything to one ``.npz`` file, whole or not at all; its folder is made if need be."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = parts_of_whitening(self)
        with replaced_file(Path(path)) as file:
            np.savez(file, format=np.array(self.format), **arrays)

    @staticmethod
    def load(path: str | Path) -> "PCAWhitening":
        """Read what ``save`` wrote, of either kind; no pickle code is run."""
        try:
            parts = read_npz(Path(path))
            return whitening_from_parts(str(parts["format"]), parts)
        except Exception as error:  # damaged archives and headers raise nearly any type
            why = one_line(error)
            raise UserError(f"{path} cannot be read as a whitening that metilr saved ({why}): learn it anew") from error


@dataclass(frozen=True, eq=False)
class LearnedWhitening(PCAWhitening):
    """PCA of the database where differences within pairs have equal variance in all directions.

    ``eigenvalues`` are of the database's covariance there, and ``projection`` is not divided by them; ``shrinkage`` is
    the weight of the identity in the covariance of differences, in (0, 1].
    """

    n_pairs: int  # it was learned on

    format: ClassVar[str] = "metilr.LearnedWhitening/1"


def parts_of_whitening(whitening: PCAWhitening) -> dict[str, np.ndarray]:
    """All that a whitening consists of, by name."""
    return {field.name: np.asarray(getattr(whitening, field.name)) for field in dataclasses.fields(whitening)}


def whitening_from_parts(kind: str, parts: Mapping[str, np.ndarray]) -> PCAWhitening:
    """Put together what ``parts_of_whitening`` took apart; ``kind`` is the class's ``format``.

    Parts of strangers that are missing or do not fit raise KeyError, ValueError, or another type.
    """
    whitening = {each.format: each for each in (PCAWhitening, LearnedWhitening)}[kind]
    wanted = {field.name: parts[field.name] for field in dataclasses.fields(whitening)}
    arguments: dict[str, Any] = {name: part if part.ndim else part.item() for name, part in wanted.items()}
    return whitening(**arguments)


def fit_pca_whitening(chunks: Iterable[np.ndarray], dim: int | None = None, shrinkage: float = 1.0) -> PCAWhitening:
    """Learn PCA-whitening in one pass over descriptors that need not fit in memory.

    Covariance divided by n, its ``dim`` largest eigenvalues, eigenvectors divided by
    eigenvalue**(shrinkage / 2). Sums are float64 of descriptors minus the first block's mean, so that a
    large common offset cancels nothing; memory is a block of rows and a few ``D x D`` matrices, however
    long a chunk is. The result depends on how rows are cut into chunks by float64 rounding only.

    Rank: the number of eigenvalues above ``max(n, D)`` x float64 epsilon x the largest one, at most n - 1.
    Beyond it an eigenvector is noise that dividing by the root of its eigenvalue would blow up.
    Sign: in each eigenvector the first component whose magnitude is the largest (to 1e-6) is positive.

    ``chunks`` are any number of pieces, each ``(n_i, D)`` float32; without ``dim``, ``min(DEFAULT_DIM, rank)``
    dimensions are kept. ``shrinkage`` 1 is whitening, 0 plain PCA, between them part of the way.

    Source: Jégou and Chum, Negative evidences and co-occurrences in image retrieval, ECCV 2012; the Met
    benchmark's code. Differs from scikit-learn's ``PCA(whiten=True)``, which divides by n - 1 and does
    not L2-normalise.
    """
    if not 0 <= shrinkage <= 1:
        raise UserError(f"{shrinkage}: choose a number from 0 (PCA) to 1 (whitening)", "shrinkage")
    n, mean, covariance = _mean_and_covariance(chunks)
    eigenvalues, kept, rank = _leading(covariance, n, dim, DEFAULT_DIM)
    projection = kept / eigenvalues[: kept.shape[1]] ** (shrinkage / 2)
    return PCAWhitening(mean, projection, eigenvalues, float(shrinkage), n, rank)


def fit_learned_whitening(
    database: Iterable[np.ndarray], differences: Iterable[np.ndarray], dim: int | None = None,
    shrinkage: float = PAIR_SHRINKAGE,
) -> LearnedWhitening:  # fmt: skip
    """Learn a whitening from pairs of descriptors that show the same exhibit, in one pass over each input.

    Let C be the mean of d dᵀ over the pairs' differences d, and t = trace(C) / D. The metric is
    S = (1 - shrinkage) C + shrinkage t I: directions in which photographs of one exhibit differ count less. The
    projection is S^(-1/2) E, E the ``dim`` leading eigenvectors of S^(-1/2) covariance(database) S^(-1/2). All in
    float64. Because the identity is in S, fewer pairs than dimensions will do.

    Both inputs come in pieces as for ``fit_pca_whitening``; a pair counts once, in either direction. Without ``dim``
    as many dimensions are kept as the database supports. ``shrinkage`` 1 is plain PCA.

    Source: Mikolajczyk and Matas, Improving Descriptors for Fast Tree Matching by Optimal Linear Projection, ICCV
    2007; Radenović et al., Fine-tuning CNN Image Retrieval with No Human Annotation, TPAMI 2019, section 4.2. Differs
    in the shrinkage.
    """
    if not 0 < shrinkage <= 1:
        raise UserError(f"{shrinkage}: choose a number above 0, at most 1", "shrinkage")
    n_pairs, offset, scatter = _mean_and_covariance(differences, "pair", least=1)
    n, mean, covariance = _mean_and_covariance(database)
    within = scatter + np.outer(offset, offset)  # about zero, not about the mean
    width = len(mean)
    if len(within) != width:
        raise UserError(f"pairs have width {len(within)}, the database {width}: take descriptors of one model")
    scale = np.trace(within) / width
    if scale == 0:
        raise UserError("all pairs consist of equal descriptors: there is nothing to learn from; whiten by pca")
    variances, directions = np.linalg.eigh((1 - shrinkage) * within + shrinkage * scale * np.eye(width))
    inverse_root = (directions / np.sqrt(variances)) @ directions.T
    eigenvalues, kept, rank = _leading(inverse_root @ covariance @ inverse_root, n, dim, width)
    return LearnedWhitening(mean, inverse_root @ kept, eigenvalues, float(shrinkage), n, rank, n_pairs)


def _leading(covariance: np.ndarray, n: int, dim: int | None, most: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Return all eigenvalues, descending, the leading ``dim`` eigenvectors, ``(D, dim)``, and the numerical rank.

    Of the covariance ``(D, D)`` of n descriptors; without ``dim`` as many as it supports, but no more than ``most``.
    """
    eigenvalues, eigenvectors = np.linalg.eigh(covariance)  # for symmetric matrices: never complex
    eigenvalues, eigenvectors = eigenvalues[::-1].copy(), eigenvectors[:, ::-1]
    width = len(eigenvalues)
    tolerance = max(n, width) * np.finfo(np.float64).eps * max(float(eigenvalues[0]), 0.0)
    rank = min(int((eigenvalues > tolerance).sum()), n - 1)
    if rank == 0:
        raise UserError(f"all {n} database descriptors are the same: there is nothing to whiten; check the model")
    dim = min(most, rank) if dim is None else dim
    if not 1 <= dim <= rank:
        raise UserError(f"{dim}: {n} database descriptors of width {width} support 1 to {rank}", "dim")
    kept = eigenvectors[:, :dim]
    magnitudes = np.abs(kept)
    # Not plain argmax: of two equal magnitudes, rounding would choose another one on another machine.
    first_largest = (magnitudes >= magnitudes.max(axis=0) * (1 - _SAME_MAGNITUDE)).argmax(axis=0)
    return eigenvalues, kept * np.sign(kept[first_largest, np.arange(dim)]), rank


def _mean_and_covariance(
    chunks: Iterable[np.ndarray], name: str = "database descriptor", least: int = 2
) -> tuple[int, np.ndarray, np.ndarray]:
    """Stream over descriptors; return their number, mean ``(D,)`` and covariance / n ``(D, D)``."""
    n = 0
    shift = total = scatter = np.empty(0)
    for chunk in chunks:
        if chunk.ndim != 2 or (n > 0 and chunk.shape[1] != len(shift)):
            shapes = f"{chunk.shape} and (n, {len(shift)})"
            raise UserError(f"descriptors to whiten come in shapes {shapes}: take stores of one model and size")
        for _, block in _row_blocks(chunk):
            if not np.isfinite(block).all():
                row = n + int(np.argmin(np.isfinite(block).all(axis=1)))
                raise UserError(f"{name} {row} holds NaN or infinite values: extract it again")
            if n == 0:
                shift = block.mean(axis=0)
                total, scatter = np.zeros_like(shift), np.zeros((len(shift), len(shift)))
            block -= shift
            total += block.sum(axis=0)
            scatter += block.T @ block
            n += len(block)
    if n < least:
        raise UserError(f"whitening needs at least {least} {name}s, here {n}: do without")
    offset = total / n
    return n, shift + offset, scatter / n - np.outer(offset, offset)


def _row_blocks(x: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the first row and a float64 copy of each block of rows ``(n, D)``."""
    for start in range(0, len(x), _BLOCK_ROWS):
        yield start, np.array(x[start : start + _BLOCK_ROWS], dtype=np.float64)
