"""Descriptors as the cheap half reads them: from one or several stores or pickles, side by side, with their views."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metilr.data.ground_truth import QUERY_FILES, GroundTruth
from metilr.data.views import View
from metilr.errors import UserError
from metilr.extraction.reference_pickle import read_reference_descriptors
from metilr.extraction.store import CHUNK_ROWS, DescriptorStore, settings_fingerprint
from metilr.files import file_sha256


@dataclass(frozen=True, eq=False)
class Descriptors:
    """Rows of all splits in ground-truth order, not yet concatenated; splits of views beside those of images.

    Attributes:
        parts: By split, one matrix per source, each ``(n, D_i)``; memory-mapped where they come from a store. View v of
            image i is row ``i * n_views + v`` of its split.
        is_valid: By split, which rows have a descriptor, bool ``(n,)``; the others' images could not be decoded.
        origins: By source, what made it: for results and reports.
    """

    parts: Mapping[str, Sequence[np.ndarray]]
    is_valid: Mapping[str, np.ndarray]
    origins: Sequence[Mapping[str, Any]]

    @property
    def width(self) -> int:
        """Dimensions of the concatenation."""
        return sum(part.shape[1] for part in self.parts["database"])


def open_descriptors(paths: Sequence[Path], ground_truth: GroundTruth, views: Sequence[View] = ()) -> Descriptors:
    """Open stores and reference pickles that describe the images of one ground truth.

    Args:
        paths: Each a store's folder or a ``descriptors.pkl``.
        ground_truth: Tells how many rows each split must have, and in which order.
        views: To be opened beside the images; an image without all of its views counts as not made.

    Raises:
        UserError: If one cannot be read, is unfinished, was made for other images, has a wrong number of
            rows or different widths, or holds NaN or infinite values, or views are wanted that it does not have.
    """
    opened = [
        _open_store(Path(path), ground_truth, views) if Path(path).is_dir() else _open_pickle(Path(path), ground_truth)
        for path in paths
    ]
    pickles = [path for path in paths if not Path(path).is_dir()]
    if views and pickles:
        raise UserError(
            f"{pickles[0]}: holds no {views[0].settings()['kind']}, which a store can hold; describe the images, or "
            "leave out the options that need them",
            "descriptors",
        )
    made = {split: np.logical_and.reduce([one.is_valid[split] for one in opened]) for split in opened[0].is_valid}
    for view in views:
        for split, source in view.of.items():
            made[source] &= made[split].reshape(-1, view.n).all(axis=1)
            made[split] = np.repeat(made[source], view.n)
    return Descriptors(
        parts={split: [part for one in opened for part in one.parts[split]] for split in made},
        is_valid=made,
        origins=[origin for one in opened for origin in one.origins],
    )


def views_store(store: DescriptorStore, view: View) -> tuple[DescriptorStore, dict[str, Any]]:
    """Where views of a store's images are kept, whether they are there or not, and the settings that make them."""
    settings = dict(store.manifest()["settings"])
    settings["ground_truth"] = {split: settings["ground_truth"][split] for split in view.of.values()}
    settings["view"] = view.settings()
    kind = settings["view"]["kind"].replace(" ", "_")
    return DescriptorStore(store.path / f"{kind}-{settings_fingerprint(settings)}"), settings


def _open_store(path: Path, ground_truth: GroundTruth, views: Sequence[View]) -> Descriptors:
    store = DescriptorStore(path)
    manifest = store.manifest()
    if not manifest["complete"]:
        raise UserError(f"{path}: is not finished; run the evaluation that makes it again to complete it")
    found = manifest["settings"].get("ground_truth", {})
    for split in ground_truth.paths:
        if found.get(split) != ground_truth.digests[split]:
            raise UserError(
                f"{path}: was made for another {split} file than {ground_truth.root}/ground_truth has; "
                "give the root and database that it was made with"
            )
    matrices: dict[str, np.ndarray] = {split: store.descriptors(split) for split in ground_truth.paths}
    _check(path, matrices, {split: len(paths) for split, paths in ground_truth.paths.items()})
    made = {split: store.is_valid(split) for split in ground_truth.paths}
    made_of_views = []
    for view in views:
        of_view = _open_views(store, view)
        made_with = of_view.manifest().get("made_with", [])
        made_of_views.append({**view.settings(), "store": str(of_view.path), "made_with": made_with})
        expected = {split: len(ground_truth.paths[source]) * view.n for split, source in view.of.items()}
        rows = {split: of_view.descriptors(split) for split in view.of}
        _check(of_view.path, {"database": matrices["database"][:1], **rows}, expected)
        matrices.update(rows)
        made.update({split: of_view.is_valid(split) for split in view.of})
    parts = {split: [matrix] for split, matrix in matrices.items()}
    files = [store.files(split).tobytes() for split in ground_truth.paths]
    origin = {
        "store": str(path), **manifest["settings"], "made_with": manifest.get("made_with", []),
        "image_files": hashlib.sha256(b"".join(files)).hexdigest(),  # of their sizes: images exchanged for others show
    }  # fmt: skip
    if made_of_views:
        origin["views"] = made_of_views
    return Descriptors(parts, made, [origin])


def _open_views(store: DescriptorStore, view: View) -> DescriptorStore:
    found, settings = views_store(store, view)
    details = (
        f"of {settings['view']['shares']}" if "shares" in settings["view"] else f"with seed {settings['view']['seed']}"
    )
    kind = f"{view.n} {settings['view']['kind']} an image {details}"
    if not (found.path / "manifest.json").exists():
        raise UserError(
            f"{store.path}: holds no descriptors of {kind}; run the evaluation that made it (with its root and store "
            f"{store.path}) with the same options, which adds them",
            "descriptors",
        )
    if not found.is_complete:
        raise UserError(f"{found.path}: is not finished; run the evaluation that makes it again to complete it")
    return found


def _open_pickle(path: Path, ground_truth: GroundTruth) -> Descriptors:
    matrices = read_reference_descriptors(path)
    _check(path, matrices, {split: len(paths) for split, paths in ground_truth.paths.items()})
    made = {split: np.ones(len(matrix), dtype=bool) for split, matrix in matrices.items()}
    origin = {"pickle": str(path), "sha256": file_sha256(path)}
    return Descriptors({split: [matrix] for split, matrix in matrices.items()}, made, [origin])


def _check(path: Path, matrices: Mapping[str, np.ndarray], counts: Mapping[str, int]) -> None:
    for split, matrix in matrices.items():
        if matrix.ndim != 2 or not matrix.size:
            raise UserError(f"{path}: {split} has shape {matrix.shape}, but must have rows and columns")
    width = matrices["database"].shape[1]
    for split, matrix in matrices.items():
        expected = counts.get(split, len(matrix))
        if len(matrix) != expected:
            hint = "" if split in QUERY_FILES else "; give the database (full or mini) that it was made with"
            raise UserError(f"{path}: {split} has {len(matrix):,} rows, the ground truth {expected:,} images{hint}")
        if matrix.shape[1] != width:
            raise UserError(f"{path}: {split} has shape {matrix.shape}, but the database's width is {width}")
        for start in range(0, len(matrix), CHUNK_ROWS):
            finite = np.isfinite(matrix[start : start + CHUNK_ROWS]).all(axis=1)
            if not finite.all():
                raise UserError(
                    f"{path}: {split} row {start + int(finite.argmin())} holds NaN or infinite values; extract it again"
                )
