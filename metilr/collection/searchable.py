"""An index's approximate search on disk, with the rows as they are searched."""

import contextlib
import hashlib
import json
from pathlib import Path

import numpy as np

from metilr.errors import UserError
from metilr.evaluation.database import Searchable
from metilr.evaluation.options import MethodOptions
from metilr.extraction.store import DescriptorStore
from metilr.files import map_array, replaced_file
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


def digest_of_database(store: DescriptorStore, method: MethodOptions, seed: int, whitening: PCAWhitening | None) -> str:
    """A digest of all that decides the searched rows: the store, its images, the visits, the whitening."""
    settings = {
        "store": store.manifest().settings,
        "files": hashlib.sha256(store.files("database").tobytes()).hexdigest(),
        "whitening": None if whitening is None else whitening.sha256(),
        "visits": [method.rows_per_image - 1, method.database_views, seed],
        **({} if method.database_rows == "images" else {"rows": method.database_rows}),
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
