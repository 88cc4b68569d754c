"""An index's rows as they are searched: on disk with an approximate search, or in a Milvus server."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from metilr.collection.index_schema import MILVUS, Index
from metilr.errors import UserError
from metilr.evaluation.database import Searchable
from metilr.evaluation.options import MethodOptions
from metilr.extraction.store import DescriptorStore
from metilr.files import map_array, replaced_file
from metilr.retrieval import milvus
from metilr.retrieval.approximate import ApproximateIndex, build_approximate, check_size
from metilr.retrieval.whitening import PCAWhitening


def save_searchable(database: Searchable, folder: Path, made_from: str) -> None:
    """Write the searched rows, what each shows, and an approximate index; what is there already is kept."""
    check_size(len(database.rows))
    with contextlib.suppress(UserError):
        load_searchable(folder, made_from)
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in (("rows", database.rows), ("columns", np.stack([database.labels, database.images]))):
        with replaced_file(folder / f"{name}.npy") as stream:
            np.save(stream, values)
    build_approximate(database.rows).save(folder, made_from)


def load_searchable(folder: Path, made_from: str) -> Searchable:
    """Open what ``save_searchable`` wrote, reading no row; UserError if it is damaged or made from something else."""
    index = ApproximateIndex.load(folder, folder / "rows.npy", made_from)
    again = f"delete {folder}, or make the index again"
    columns = map_array(folder / "columns.npy", again)
    if columns.shape != (2, len(index.rows)) or columns.dtype != np.int64:
        raise UserError(f"{folder / 'columns.npy'}: does not belong to {len(index.rows):,} rows; {again}")
    labels, images = np.array(columns)
    return Searchable(index.rows, labels, images, index)


def save_to_milvus(
    database: Searchable, uri: str, folder: Path, made_from: str, said: Callable[[int, int], Mapping[str, Any]],
    quiet: bool,
) -> None:  # fmt: skip
    """Write the rows to a server, and what each shows to ``folder``.

    Of what an index was before the server keeps the last, which others may still search, and no more.

    ``said`` gives what a label and an image have beside their row.
    """
    name = _collection(made_from)
    pairs = [*zip(database.labels.tolist(), database.images.tolist(), strict=True)]
    milvus.write_rows(uri, name, database.rows, lambda row: said(*pairs[row]), quiet)
    folder.mkdir(parents=True, exist_ok=True)
    with replaced_file(folder / f"{name}.npy") as stream:
        np.save(stream, np.stack([database.labels, database.images]))
    others = [file for file in folder.glob(f"{milvus.PREFIX}*.npy") if file.stem != name]
    if older := sorted(others, key=lambda file: file.stat().st_mtime_ns)[:-1]:
        milvus.drop(uri, [file.stem for file in older])
        for file in older:
            file.unlink()


def open_in_milvus(folder: Path, uri: str, made_from: str, width: int) -> Searchable:
    """Open what ``save_to_milvus`` wrote; UserError if the server has not all of just these rows."""
    file = folder / f"{_collection(made_from)}.npy"
    if not file.exists():
        reason = f"{folder.parent}: as it is now, with this model and this whitening, it was never written to Milvus"
        raise UserError(f"{uri}: {reason}; run metilr index with this address again, or leave it out here", "milvus")
    columns = np.array(map_array(file, "delete it, and run metilr index with this address again"))
    if columns.ndim != 2 or len(columns) != 2 or columns.dtype != np.int64:
        raise UserError(f"{file}: is damaged; delete it, and run metilr index with this address again")
    search = milvus.MilvusSearch.open(uri, file.stem, columns.shape[1], width)
    return Searchable(np.empty((0, width), np.float32), columns[0], columns[1], search)


def is_in_milvus(output: Path, index: Index, uri: str) -> bool:
    """Whether ``open_in_milvus`` would open an index's rows; UserError if the server cannot be asked."""
    store = DescriptorStore(output / index.store)
    whitening = PCAWhitening.load(output / "whitening.npz") if index.whitening else None
    made_from = digest_of_database(store, index.method, index.elements.seed, whitening, index.labels)
    milvus.connect(uri)
    with contextlib.suppress(UserError):
        open_in_milvus(output / MILVUS, uri, made_from, store.manifest().width if whitening is None else whitening.dim)
        return True
    return False


def _collection(made_from: str) -> str:
    return f"{milvus.PREFIX}{made_from[:32]}"


def digest_of_database(
    store: DescriptorStore, method: MethodOptions, seed: int, whitening: PCAWhitening | None,
    labels: str | None = None,
) -> str:  # fmt: skip
    """A digest of all that decides the searched rows: the store, its images, the visits, the whitening.

    ``labels`` is the name of the file of what is said of the exhibits, where that stands beside the rows.
    """
    settings = {
        "store": store.manifest().settings,
        "files": hashlib.sha256(store.files("database").tobytes()).hexdigest(),
        "whitening": None if whitening is None else whitening.sha256(),
        "visits": [method.rows_per_image - 1, method.database_views, seed],
        **({} if method.database_rows == "images" else {"rows": method.database_rows}),
        **({} if labels is None else {"labels": labels}),
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
