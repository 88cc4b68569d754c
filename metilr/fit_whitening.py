"""Learning a whitening: in one pass over the database's descriptors, or over pairs too."""

from collections.abc import Iterable

import numpy as np

from metilr.errors import UserError
from metilr.whitening import DEFAULT_DIM, LearnedWhitening, PCAWhitening, row_blocks

PAIR_SHRINKAGE = 0.05
"""By GAP on val of one small museum; between 0.02 and 0.1 it hardly matters there."""
_SAME_MAGNITUDE = 1e-6  # far above eigh's rounding, far below any difference that carries meaning


def fit_pca_whitening(chunks: Iterable[np.ndarray], dim: int | None = None, shrinkage: float = 1.0) -> PCAWhitening:
    """Learn PCA-whitening in one pass over descriptors that need not fit in memory.

    Covariance divided by n, its ``dim`` largest eigenvalues, eigenvectors divided by
    eigenvalue**(shrinkage / 2). Sums are float64 of descriptors minus the first block's mean, so that a
    large common offset cancels nothing; memory is a block of rows and a few ``D x D`` matrices, however
    long a chunk is. The result depends on how rows are cut into chunks by float64 rounding only.

    Rank: the number of eigenvalues above ``max(n, D)`` x float64 epsilon x the largest one, at most n - 1.
    Beyond it an eigenvector is noise that dividing by the root of its eigenvalue would blow up.
    Sign: in each eigenvector the first component whose magnitude is the largest (to 1e-6) is positive.

    Args:
        chunks: Descriptors in any number of pieces, each ``(n_i, D)`` float32.
        dim: Dimensions to keep. None keeps ``min(DEFAULT_DIM, rank)``; see ``supported_dim`` of the result.
        shrinkage: 1 is whitening, 0 is plain PCA, between them part of the way.

    Returns:
        The whitening, in float64.

    Raises:
        UserError: If ``dim`` passes the rank (the largest possible is named), ``shrinkage`` lies outside
            [0, 1], there are fewer than 2 descriptors, all are the same, or one holds NaN or infinity.

    Source: Jégou and Chum, Negative evidences and co-occurrences in image retrieval, ECCV 2012; the Met
    benchmark's code. Differs from scikit-learn's ``PCA(whiten=True)``, which divides by n - 1 and does
    not L2-normalise.
    """
    if not 0 <= shrinkage <= 1:
        raise UserError(f"--whitening_shrinkage {shrinkage}: choose a number from 0 (PCA) to 1 (whitening)")
    if dim is not None and dim < 1:
        raise UserError(f"--whitening_dim {dim}: choose a number of dimensions from 1")
    n, mean, covariance = _mean_and_covariance(chunks)
    eigenvalues, eigenvectors = _principal(covariance)
    rank = _rank(eigenvalues, n, dim)
    dim = min(DEFAULT_DIM, rank) if dim is None else dim

    kept = _with_fixed_signs(eigenvectors[:, :dim])
    return PCAWhitening(
        mean=mean,
        projection=kept / eigenvalues[:dim] ** (shrinkage / 2),
        eigenvalues=eigenvalues,
        shrinkage=float(shrinkage),
        n=n,
        supported_dim=rank,
    )


def fit_learned_whitening(
    database: Iterable[np.ndarray],
    differences: Iterable[np.ndarray],
    dim: int | None = None,
    shrinkage: float = PAIR_SHRINKAGE,
) -> LearnedWhitening:
    """Learn a whitening from pairs of descriptors that show the same exhibit, in one pass over each input.

    Let C be the mean of d dᵀ over the pairs' differences d, and t = trace(C) / D. The metric is
    S = (1 - shrinkage) C + shrinkage t I: directions in which photographs of one exhibit differ count less. The
    projection is S^(-1/2) E, E the ``dim`` leading eigenvectors of S^(-1/2) covariance(database) S^(-1/2). All in
    float64. Because the identity is in S, fewer pairs than dimensions will do.

    Args:
        database: Descriptors in any number of pieces, each ``(n_i, D)`` float32.
        differences: Of pairs, the same form; a pair counts once, in either direction.
        dim: Dimensions to keep; None: as many as the database supports.
        shrinkage: Weight of the identity, above 0, at most 1 (1: plain PCA).

    Returns:
        The whitening.

    Raises:
        UserError: If ``dim`` passes the rank of the database, ``shrinkage`` is out of range, there is no pair or the
            differences are all zero, there are fewer than 2 descriptors, or one holds NaN or infinity.

    Source: Mikolajczyk and Matas, Improving Descriptors for Fast Tree Matching by Optimal Linear Projection, ICCV
    2007; Radenović et al., Fine-tuning CNN Image Retrieval with No Human Annotation, TPAMI 2019, section 4.2. Differs
    in the shrinkage.
    """
    if not 0 < shrinkage <= 1:
        raise UserError(f"--pair_shrinkage {shrinkage}: choose a number above 0, at most 1")
    if dim is not None and dim < 1:
        raise UserError(f"--whitening_dim {dim}: choose a number of dimensions from 1")
    n_pairs, offset, scatter = _mean_and_covariance(differences, "pair", least=1)
    n, mean, covariance = _mean_and_covariance(database)
    within = scatter + np.outer(offset, offset)  # about zero, not about the mean
    width = len(mean)
    if len(within) != width:
        raise UserError(f"pairs have width {len(within)}, the database {width}: take descriptors of one model")
    scale = np.trace(within) / width
    if scale == 0:
        raise UserError("all pairs consist of equal descriptors: there is nothing to learn from; take --whitening pca")
    variances, directions = np.linalg.eigh((1 - shrinkage) * within + shrinkage * scale * np.eye(width))
    inverse_root = (directions / np.sqrt(variances)) @ directions.T
    eigenvalues, eigenvectors = _principal(inverse_root @ covariance @ inverse_root)
    rank = _rank(eigenvalues, n, dim)
    dim = rank if dim is None else dim
    return LearnedWhitening(
        mean=mean,
        projection=inverse_root @ _with_fixed_signs(eigenvectors[:, :dim]),
        eigenvalues=eigenvalues,
        shrinkage=float(shrinkage),
        n=n,
        supported_dim=rank,
        n_pairs=n_pairs,
    )


def _principal(covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues, descending, ``(D,)``, and eigenvectors in columns, ``(D, D)``."""
    eigenvalues, eigenvectors = np.linalg.eigh(covariance)  # for symmetric matrices: never complex
    return eigenvalues[::-1].copy(), eigenvectors[:, ::-1]


def _rank(eigenvalues: np.ndarray, n: int, dim: int | None) -> int:
    """Numerical rank, refusing a ``dim`` beyond it."""
    width = len(eigenvalues)
    tolerance = max(n, width) * np.finfo(np.float64).eps * max(float(eigenvalues[0]), 0.0)
    rank = min(int((eigenvalues > tolerance).sum()), n - 1)
    if rank == 0:
        raise UserError(
            f"all {n} database descriptors are the same: there is nothing to whiten; check the model and its weights"
        )
    if dim is not None and dim > rank:
        raise UserError(
            f"--whitening_dim {dim}: {n} database descriptors of width {width} support at most {rank}; "
            f"choose {rank} or fewer, or leave the option out"
        )
    return rank


def _mean_and_covariance(
    chunks: Iterable[np.ndarray], name: str = "database descriptor", least: int = 2
) -> tuple[int, np.ndarray, np.ndarray]:
    """Stream over descriptors; return their number, mean ``(D,)`` and covariance / n ``(D, D)``."""
    n = 0
    shift = total = scatter = np.empty(0)
    for chunk in chunks:
        if chunk.ndim != 2 or (n > 0 and chunk.shape[1] != len(shift)):
            raise UserError(
                f"descriptors to whiten come in shapes {chunk.shape} and (n, {len(shift)}): "
                "take stores of one model and size"
            )
        for _, block in row_blocks(chunk):
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
        raise UserError(f"whitening needs at least {least} {name}s, here {n}: take --whitening none")
    offset = total / n
    return n, shift + offset, scatter / n - np.outer(offset, offset)


def _with_fixed_signs(eigenvectors: np.ndarray) -> np.ndarray:
    """Make positive the first component of each column that is as large as its largest."""
    magnitudes = np.abs(eigenvectors)
    # Not plain argmax: of two equal magnitudes, rounding would choose another one on another machine.
    first_largest = (magnitudes >= magnitudes.max(axis=0) * (1 - _SAME_MAGNITUDE)).argmax(axis=0)
    return eigenvectors * np.sign(eigenvectors[first_largest, np.arange(eigenvectors.shape[1])])
