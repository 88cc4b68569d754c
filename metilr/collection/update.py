"""Descriptors of an index's images: those that earlier ones already have are taken over, by the images' content."""

import contextlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from metilr.data.views import View
from metilr.distributed import launched_as_first
from metilr.extraction.describe import describe_images, image_sizes, store_settings
from metilr.extraction.descriptors import views_store
from metilr.extraction.options import ExtractionOptions
from metilr.extraction.store import DescriptorStore, settings_fingerprint
from metilr.files import read_json, write_atomically
from metilr.models.embedder import Embedder
from metilr.sources.catalogue import Catalogue

KEYS = "images.json"  # in a store: path and digest of each row's image


def describe_catalogue(
    embedder: Embedder, catalogue: Catalogue, output: Path, kind: str, extraction: ExtractionOptions,
    console: Console, views: Sequence[View] = (),
) -> DescriptorStore:  # fmt: skip
    """Describe images, and views of them, but for those that another store in the index has.

    Args:
        embedder: What describes them.
        catalogue: The images, with the digests of their content.
        output: The index.
        kind: What the store's name begins with; it ends in a digest of all images, so that another state of them has
            another store, and the index stays as it is until that is finished.
        extraction: How they are described.
        console: Is told what is done.
        views: Of each image.
    """
    path = output / f"{kind}-{settings_fingerprint([catalogue.paths, catalogue.exhibits, catalogue.sha256])}"
    truth, store = catalogue.ground_truth(), DescriptorStore(path)
    if launched_as_first() and not (store.exists and store.is_complete):
        settings = store_settings(embedder, truth, extraction.resize_to, extraction.precision, extraction.engine)
        sizes = image_sizes(truth)["database"]
        store.prepare(settings, {"database": len(sizes)}, embedder.dim)
        write_atomically(path / KEYS, json.dumps([*zip(catalogue.paths, catalogue.sha256, strict=True)]) + "\n")
        keys = _keys(path)
        for other in (DescriptorStore(each) for each in _stores(output, kind) if each != path):
            known = _keys(other.path)
            _take_over(store, other, "database", keys, known, sizes, 1)
            for view in views:
                of_view, view_settings = views_store(store, view)
                [split] = view.of
                of_view.prepare(view_settings, {split: len(sizes) * view.n}, embedder.dim)
                _take_over(of_view, views_store(other, view)[0], split, keys, known, sizes, view.n)
    return describe_images(embedder, truth, path, extraction, console, views)


def _take_over(
    store: DescriptorStore, other: DescriptorStore, split: str, keys: Sequence[tuple[str, str]],
    known: Sequence[tuple[str, str]], sizes: np.ndarray, n_views: int,
) -> None:  # fmt: skip
    """Copy the rows of images that both stores have, if the same settings made them."""
    if not other.exists:
        return
    before, now = ({**each.manifest().settings, "ground_truth": None} for each in (other, store))
    if before != now:
        return
    row_of = {key: row for row, key in enumerate(known)}
    is_there = other.is_valid(split) & ~other.damaged(split)
    is_pending = store.pending(split, np.repeat(sizes, n_views), retry_bad=True)
    descriptors = other.descriptors(split)
    for made_with in other.manifest().made_with:
        store.begin(made_with)
    with contextlib.closing(store.writer()) as writer:
        for row, key in enumerate(keys):
            for view in range(n_views if key in row_of and key[1] else 0):
                mine, theirs = row * n_views + view, row_of[key] * n_views + view
                if is_pending[mine] and is_there[theirs]:
                    writer.write(split, mine, descriptors[theirs], int(sizes[row]))


def remove_other_stores(output: Path, current: Mapping[str, str]) -> None:
    """Remove the descriptors of what an index held before; ``current`` has the store that stays, by kind."""
    for kind, name in current.items():
        for path in _stores(output, kind):
            if path.name != name:
                shutil.rmtree(path)


def _stores(output: Path, name: str) -> list[Path]:
    """Stores in an index; that of metilr 0.1's has no digest in its name."""
    named = re.compile(rf"{re.escape(name)}(-[0-9a-f]{{12}})?")
    return sorted(path for path in output.iterdir() if path.is_dir() and named.fullmatch(path.name))


def _keys(path: Path) -> list[tuple[str, str]]:
    """Path and digest of each row's image; none for a store that does not say them."""
    try:
        return [(str(image), str(digest)) for image, digest in read_json(path / KEYS)]
    except (FileNotFoundError, ValueError, TypeError):
        return []
