"""Descriptors as the cheap half reads them: from one or several stores or pickles, side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metilr.data.ground_truth import QUERY_FILES, GroundTruth
from metilr.descriptors import CHUNK_ROWS, DescriptorStore
from metilr.errors import UserError
from metilr.files import file_sha256
from metilr.reference_format import read_reference_descriptors


@dataclass(frozen=True, eq=False)
class Descriptors:
    """Rows of all splits in ground-truth order, not yet concatenated.

    Attributes:
        parts: By split, one matrix per source, each ``(n, D_i)``; memory-mapped where they come from a store.
        made: By split, which rows exist, bool ``(n,)``; the others' images could not be decoded.
        origins: By source, what made it: for results and reports.
    """

    parts: Mapping[str, Sequence[np.ndarray]]
    made: Mapping[str, np.ndarray]
    origins: Sequence[Mapping[str, Any]]

    @property
    def width(self) -> int:
        """Dimensions of the concatenation."""
        return sum(part.shape[1] for part in self.parts["database"])


def open_descriptors(paths: Sequence[Path], ground_truth: GroundTruth) -> Descriptors:
    """Open stores and reference pickles that describe the images of one ground truth.

    Args:
        paths: Each a store's folder or a ``descriptors.pkl``.
        ground_truth: Tells how many rows each split must have, and in which order.

    Raises:
        UserError: If one cannot be read, is unfinished, was made for other images, has a wrong number of
            rows or different widths, or holds NaN or infinite values.
    """
    opened = [
        _open_store(Path(path), ground_truth) if Path(path).is_dir() else _open_pickle(Path(path), ground_truth)
        for path in paths
    ]
    return Descriptors(
        parts={split: [part for one in opened for part in one.parts[split]] for split in ground_truth.paths},
        made={split: np.logical_and.reduce([one.made[split] for one in opened]) for split in ground_truth.paths},
        origins=[origin for one in opened for origin in one.origins],
    )


def _open_store(path: Path, ground_truth: GroundTruth) -> Descriptors:
    store = DescriptorStore(path)
    manifest = store.manifest()
    if not manifest["complete"]:
        raise UserError(f"{path}: is not finished; run the evaluation that makes it again to complete it")
    found = manifest["settings"].get("ground_truth", {})
    for split in ground_truth.paths:
        if found.get(split) != ground_truth.digests[split]:
            raise UserError(
                f"{path}: was made for another {split} file than {ground_truth.root}/ground_truth has; "
                "give the --root and --database that it was made with"
            )
    parts = {split: [store.rows(split)] for split in ground_truth.paths}
    _check(path, {split: part[0] for split, part in parts.items()}, ground_truth)
    made = {split: store.made(split) for split in ground_truth.paths}
    origin = {"store": str(path), **manifest["settings"], "made_with": manifest.get("made_with", [])}
    return Descriptors(parts, made, [origin])


def _open_pickle(path: Path, ground_truth: GroundTruth) -> Descriptors:
    matrices = read_reference_descriptors(path)
    _check(path, matrices, ground_truth)
    made = {split: np.ones(len(matrix), dtype=bool) for split, matrix in matrices.items()}
    origin = {"pickle": str(path), "sha256": file_sha256(path)}
    return Descriptors({split: [matrix] for split, matrix in matrices.items()}, made, [origin])


def _check(path: Path, matrices: Mapping[str, np.ndarray], ground_truth: GroundTruth) -> None:
    for split, matrix in matrices.items():
        if matrix.ndim != 2 or not matrix.size:
            raise UserError(f"{path}: {split} has shape {matrix.shape}, but must have rows and columns")
    width = matrices["database"].shape[1]
    for split, matrix in matrices.items():
        expected = len(ground_truth.paths[split])
        if len(matrix) != expected:
            hint = "" if split in QUERY_FILES else "; give the --database (full or mini) that it was made with"
            raise UserError(f"{path}: {split} has {len(matrix):,} rows, the ground truth {expected:,} images{hint}")
        if matrix.shape[1] != width:
            raise UserError(f"{path}: {split} has shape {matrix.shape}, but the database's width is {width}")
        for start in range(0, len(matrix), CHUNK_ROWS):
            finite = np.isfinite(matrix[start : start + CHUNK_ROWS]).all(axis=1)
            if not finite.all():
                raise UserError(
                    f"{path}: {split} row {start + int(finite.argmin())} holds NaN or infinite values; extract it again"
                )
