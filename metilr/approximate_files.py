"""An approximate index on disk: the codes, and a note of what they belong to. The rows lie where they lay."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from metilr.approximate_search import ApproximateIndex, code_width
from metilr.errors import UserError, one_line, shown
from metilr.files import file_sha256, replaced_file, write_atomically
from metilr.random_rows import RandomRows, open_rows

SCHEMA = "metilr.approximate/1"
NOTE = "approximate.json"
_CODES = "codes.faiss"
_CHECKED_ROWS = 64  # compared with the rows at hand: reading all of them would take as long as a search


def save_approximate(index: ApproximateIndex, folder: Path, made_from: str = "") -> None:
    """Write an index's codes into a folder, whole or not at all: the note comes last.

    Args:
        index: Whose rows are, or will be, in a .npy file.
        folder: Is made if need be.
        made_from: What the rows were made from, a digest; ``load_approximate`` compares it.

    Raises:
        OSError: If a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NOTE).unlink(missing_ok=True)
    with replaced_file(folder / _CODES) as stream:
        faiss.write_index(index.codes, str(stream.name))
    n, width = index.rows.shape
    note = {
        "schema": SCHEMA,
        "rows": n,
        "width": width,
        "lists": index.codes.nlist,
        "codes_sha256": file_sha256(folder / _CODES),
        "rows_sample": _sample_digest(index.rows),
        "made_from": made_from,
        "faiss": faiss.__version__,
    }
    write_atomically(folder / NOTE, json.dumps(note, indent=1) + "\n")


def load_approximate(folder: Path, rows_file: Path, made_from: str = "") -> ApproximateIndex:
    """Read what ``save_approximate`` wrote, refusing what does not fit together.

    Args:
        folder: Holds the codes.
        rows_file: The rows that they were built over, a .npy file.
        made_from: What the rows must have been made from.

    Raises:
        UserError: If a file is missing, damaged, or of other rows; names it.
    """
    again = f"delete {folder} to search exactly, or make the index again"
    note_file, codes_file = folder / NOTE, folder / _CODES
    try:
        note = json.loads(note_file.read_text(encoding="utf-8"))
        if note["schema"] != SCHEMA:
            raise ValueError(f"its schema is {shown(note['schema'])}")
        expected, n_lists = (note["rows"], note["width"]), note["lists"]
        digests = note["codes_sha256"], note["rows_sample"], note["made_from"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else one_line(error)
        raise UserError(f"{note_file}: cannot be read ({reason}); {again}") from None
    if digests[2] != made_from:
        raise UserError(f"{note_file}: was made from other descriptors or with other options than are here; {again}")
    rows = open_rows(rows_file)
    if rows.shape != expected or _sample_digest(rows) != digests[1]:
        raise UserError(f"{rows_file}: holds other rows than {codes_file} was built over; {again}")
    try:
        if file_sha256(codes_file) != digests[0]:
            raise ValueError("it is not the file that was saved")
        codes = _read_codes(codes_file)
        if (codes.ntotal, codes.d) != (len(rows), code_width(rows.shape[1])) or codes.nlist != n_lists:
            raise ValueError("it is of another size than its note says")
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        raise UserError(f"{codes_file}: cannot be read ({one_line(error)}); {again}") from None
    return ApproximateIndex(codes, rows, RandomRows(rows_file))


def _read_codes(file: Path) -> Any:
    """Read FAISS's file; the note's digest tells accidents, but whoever made both could have made anything."""
    with _parts_of_at_most(file.stat().st_size):
        codes = faiss.read_index(str(file))
    if not isinstance(codes, faiss.IndexIVFPQFastScan):
        raise ValueError(f"it holds a {type(codes).__name__}")
    return codes


@contextlib.contextmanager
def _parts_of_at_most(n_bytes: int) -> Iterator[None]:
    """Have FAISS refuse what claims to be larger than the file, where it can: it would take the memory first."""
    if not hasattr(faiss, "set_deserialization_vector_byte_limit"):
        yield
        return
    before = faiss.get_deserialization_vector_byte_limit()
    faiss.set_deserialization_vector_byte_limit(n_bytes)
    try:
        yield
    finally:
        faiss.set_deserialization_vector_byte_limit(before)


def _sample_digest(rows: np.ndarray) -> str:
    """A digest of some rows, evenly spread, the first and the last among them."""
    places = np.linspace(0, len(rows) - 1, _CHECKED_ROWS).astype(np.int64)
    return hashlib.sha256(np.ascontiguousarray(rows[places], dtype=np.float32).tobytes()).hexdigest()
