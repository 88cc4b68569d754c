"""The database as it is searched, on disk beside its approximate index: none of it is made again to answer photos."""

import contextlib
import hashlib
import json
from pathlib import Path

import numpy as np

from metilr.approximate_files import load_approximate, save_approximate
from metilr.approximate_search import ApproximateIndex, build_codes, check_size
from metilr.errors import UserError
from metilr.evaluation.database import Searchable
from metilr.evaluation.options import Method
from metilr.extraction.store import CHUNK_ROWS, DescriptorStore
from metilr.files import replaced_file
from metilr.progress import counted
from metilr.random_rows import open_rows
from metilr.retrieval.whitening import PCAWhitening

APPROXIMATE = "approximate"  # folder within that of an index
_ROWS = "rows.npy"
_DECIDES = ("database_views", "visits", "dba", "hubness")  # of a method: what becomes of the database


def save_searchable(database: Searchable, folder: Path, made_from: str, quiet: bool = False) -> None:
    """Write the searched rows with what they show, and an approximate index of them; what is there already is kept.

    Args:
        database: Without background and offset.
        folder: Is made if need be.
        made_from: See ``digest_of_database``.
        quiet: Show no progress.

    Raises:
        UserError: If the rows are too few for it to make sense.
    """
    assert database.background is None and not database.has_offset
    check_size(len(database.rows))
    with contextlib.suppress(UserError):
        load_searchable(folder, made_from)
        return
    folder.mkdir(parents=True, exist_ok=True)
    _write_rows(folder / _ROWS, database.rows, quiet)
    for name, values in (("labels", database.labels), ("images", database.images)):
        with replaced_file(folder / f"{name}.npy") as stream:
            np.save(stream, values)
    rows = open_rows(folder / _ROWS)
    save_approximate(ApproximateIndex(build_codes(rows, quiet=quiet), rows), folder, made_from)


def load_searchable(folder: Path, made_from: str) -> Searchable:
    """Open what ``save_searchable`` wrote; reads the codes, and of the rows a few.

    Raises:
        UserError: If a file is missing, damaged, or was made from something else; names it.
    """
    index = load_approximate(folder, folder / _ROWS, made_from)
    labels, images = (_column(folder / f"{name}.npy", len(index.rows)) for name in ("labels", "images"))
    return Searchable(index.rows, labels, images, approximate=index)


def digest_of_database(store: DescriptorStore, method: Method, seed: int, whitening: PCAWhitening | None) -> str:
    """A digest of all that decides the searched rows: the store, its images, the whitening, the method.

    Args:
        store: Holds the database's descriptors.
        method: How photos are compared with them.
        seed: Of simulated visits.
        whitening: Applied to descriptors; None for none.
    """
    settings = {
        "store": store.manifest()["settings"],
        "files": hashlib.sha256(store.files("database").tobytes()).hexdigest(),
        "whitening": None if whitening is None else whitening.sha256(),
        "seed": seed,
        **{name: getattr(method, name) for name in _DECIDES},
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _write_rows(file: Path, rows: np.ndarray, quiet: bool) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False, "shape": rows.shape}
    with replaced_file(file) as stream, counted("writing rows", len(rows), "rows", quiet) as done:
        np.lib.format.write_array_header_1_0(stream, header)
        for start in range(0, len(rows), CHUNK_ROWS):
            chunk = np.ascontiguousarray(rows[start : start + CHUNK_ROWS], dtype=np.float32)
            stream.write(chunk.data)
            done(len(chunk))


def _column(file: Path, n: int) -> np.ndarray:
    try:
        values = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{file}: cannot be read ({error}); delete {file.parent}, or make the index again") from None
    if values.shape != (n,) or values.dtype != np.int64:
        raise UserError(f"{file}: does not belong to {n:,} rows; delete {file.parent}, or make the index again")
    return values
