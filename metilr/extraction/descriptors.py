"""Descriptors as the cheap half reads them: from stores or the reference code's pickles, side by side, with views."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metilr.data.ground_truth import QUERY_FILES, GroundTruth
from metilr.data.views import View
from metilr.errors import UserError, amount
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

    An image counts as described if it is in each of them, and has all of its ``views``, where they are wanted.

    Raises:
        UserError: If one is damaged, unfinished, of other images or another size, not finite, or lacks a view.
    """
    opened = []
    for path in map(Path, paths):
        if path.is_dir():
            opened.append(_open_store(DescriptorStore(path), ground_truth, views))
        elif views:
            kind = views[0].settings()["kind"]
            remedy = "describe the images, or leave out the options that need them"
            raise UserError(f"{path}: holds no {kind}, which a store can hold; {remedy}", "descriptors")
        else:
            matrices = read_reference_descriptors(path)
            _check_shapes(path, matrices, {split: len(paths) for split, paths in ground_truth.paths.items()})
            _check_lengths(path, matrices)
            is_valid = {split: np.ones(len(matrix), dtype=bool) for split, matrix in matrices.items()}
            parts = {split: [matrix] for split, matrix in matrices.items()}
            opened.append(Descriptors(parts, is_valid, [{"pickle": str(path), "sha256": file_sha256(path)}]))
    is_valid = {split: np.logical_and.reduce([one.is_valid[split] for one in opened]) for split in opened[0].is_valid}
    for view in views:
        for split, source in view.of.items():
            is_valid[source] &= is_valid[split].reshape(-1, view.n).all(axis=1)
            is_valid[split] = np.repeat(is_valid[source], view.n)
    parts = {split: [part for one in opened for part in one.parts[split]] for split in is_valid}
    return Descriptors(parts, is_valid, [origin for one in opened for origin in one.origins])


def views_store(store: DescriptorStore, view: View) -> tuple[DescriptorStore, dict[str, Any]]:
    """Where views of a store's images are kept, whether they are there or not, and the settings that make them."""
    manifest = store.manifest()
    digests = {split: manifest.digests.get(split) for split in view.of.values()}
    settings = {**manifest.settings, "ground_truth": digests, "view": view.settings()}
    kind = settings["view"]["kind"].replace(" ", "_")
    return DescriptorStore(store.path / f"{kind}-{settings_fingerprint(settings)}"), settings


def _open_store(store: DescriptorStore, ground_truth: GroundTruth, views: Sequence[View]) -> Descriptors:
    store.require_complete()
    manifest, splits = store.manifest(), list(ground_truth.paths)
    for split in splits:
        if manifest.digests.get(split) != ground_truth.digests[split]:
            raise UserError(
                f"{store.path}: was made for another {split} file than {ground_truth.root}/ground_truth has; "
                "give the root and database that it was made with"
            )
    rows: dict[str, np.ndarray] = {split: store.descriptors(split) for split in splits}
    _check_shapes(store.path, rows, {split: len(paths) for split, paths in ground_truth.paths.items()})
    _check_undamaged(store, splits)
    is_valid = {split: store.is_valid(split) for split in splits}
    files = b"".join(store.files(split).tobytes() for split in splits)
    origin = {
        "store": str(store.path), **manifest.settings, "made_with": manifest.made_with,
        "image_files": hashlib.sha256(files).hexdigest(),  # of their sizes: images exchanged for others show
    }  # fmt: skip
    for view in views:
        of_view, settings = views_store(store, view)[0], view.settings()
        if not of_view.exists:
            details = f"of {settings['shares']}" if "shares" in settings else f"with seed {settings['seed']}"
            missing = f"{store.path}: holds no descriptors of {view.n} {settings['kind']} an image {details}"
            remedy = f"run the evaluation that made it (root, store {store.path}) or metilr index with the same options"
            raise UserError(f"{missing}; {remedy}, which adds them", "descriptors")
        of_view.require_complete()
        rows_of_view = {split: of_view.descriptors(split) for split in view.of}
        expected = {split: len(ground_truth.paths[source]) * view.n for split, source in view.of.items()}
        _check_shapes(of_view.path, {"database": rows["database"][:1], **rows_of_view}, expected)
        _check_undamaged(of_view, list(view.of))
        rows.update(rows_of_view)
        is_valid.update({split: of_view.is_valid(split) for split in view.of})
        made = {**settings, "store": str(of_view.path), "made_with": of_view.manifest().made_with}
        origin["views"] = [*origin.get("views", []), made]
    return Descriptors({split: [matrix] for split, matrix in rows.items()}, is_valid, [origin])


def _check_shapes(path: Path, matrices: Mapping[str, np.ndarray], counts: Mapping[str, int]) -> None:
    width = matrices["database"].shape[-1] if matrices["database"].ndim else 0
    for split, matrix in matrices.items():
        if matrix.ndim != 2 or not matrix.size:
            raise UserError(f"{path}: {split} has shape {matrix.shape}, but must have rows and columns")
        expected = counts.get(split, len(matrix))
        if len(matrix) != expected:
            hint = "" if split in QUERY_FILES else "; give the database (full or mini) that it was made with"
            raise UserError(f"{path}: {split} has {len(matrix):,} rows, the ground truth {expected:,} images{hint}")
        if matrix.shape[1] != width:
            raise UserError(f"{path}: {split} has shape {matrix.shape}, but the database's width is {width}")


def _check_undamaged(store: DescriptorStore, splits: Sequence[str]) -> None:
    for split in splits:
        rows = np.flatnonzero(store.damaged(split)).tolist()
        if rows:
            which = f"{', '.join(map(str, rows[:3]))}{', ...' if len(rows) > 3 else ''}"
            raise UserError(
                f"{store.path}: {amount(len(rows), f'{split} row')} ({which}) not as written; "
                f"run the evaluation that made it (with its root and store {store.path}), which makes them anew"
            )


def _check_lengths(path: Path, matrices: Mapping[str, np.ndarray]) -> None:
    """Refuse, by its number, a row that has no direction in float32, in which rows are compared."""
    for split, matrix in matrices.items():
        for start in range(0, len(matrix), CHUNK_ROWS):
            with np.errstate(over="ignore"):
                lengths = np.linalg.norm(matrix[start : start + CHUNK_ROWS].astype(np.float32).astype(float), axis=1)
            is_good = np.isfinite(lengths) & (lengths > 0)
            if not is_good.all():
                row = int(is_good.argmin())
                held = "zeros alone" if lengths[row] == 0 else "NaN, or infinite values"
                raise UserError(f"{path}: {split} row {start + row} holds {held} (in float32); extract it again")
