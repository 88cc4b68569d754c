"""Tables in CSV and Parquet files: read strictly, and written so that no spreadsheet takes a name for a formula."""

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from metilr.data.exhibit import squeezed
from metilr.errors import UserError, one_line, shown
from metilr.files import regular

# Text that spreadsheets run, or that may begin a line of its own; after apostrophes too, so that one can be taken off.
_RISKY = re.compile(r"'*[=+\-@\uff1d\uff0b\uff0d\uff20]|.*[\x00-\x1f\x7f-\x9f\u2028\u2029]", re.DOTALL)

PARQUET = b"PAR1"
MOST_VALUES = 50_000_000  # of a Parquet file; the Met's Open Access table has 26 million
# Under which names a table keeps them, in small letters without blanks and signs; of several the first counts.
IMAGE_NAMES = ("path", "imagepath", "file", "filename", "image", "imageurl", "primaryimage", "url")
EXHIBIT_NAMES = ("exhibit", "exhibitid", "objectid", "id", "accessionnumber", "inventorynumber", "objectnumber")


def as_csv(rows: Iterable[Iterable[object]]) -> str:
    """Write rows as CSV, risky text behind an apostrophe as OWASP advises; numbers stay as they are, None is empty."""
    text = io.StringIO()
    writer = csv.writer(text)  # lines end in CR LF: with LF alone it would leave a CR within a cell unquoted
    writer.writerows(
        [f"'{each}" if isinstance(each, str) and _RISKY.match(each) else each for each in row] for row in rows
    )
    return text.getvalue()


def original(cell: str) -> str:
    """The text that ``as_csv`` has written as such a cell."""
    return cell[1:] if cell.startswith("'") and _RISKY.match(cell[1:]) else cell


def read_csv(file: Path, columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """Read a CSV file in UTF-8 that has such columns, others too: its rows, each with the line that it begins in.

    Raises:
        ValueError: If a column is missing, or a row has too many or too few fields, or is no CSV; says the line.
        OSError: If it cannot be read.
    """
    content = regular(file).read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line}: is not in UTF-8; save it as CSV in UTF-8") from None
    reader, line, rows = csv.reader(io.StringIO(text, newline=""), strict=True), 1, []
    try:
        for cells in reader:
            rows += [(line, cells)] if cells else []
            line = reader.line_num + 1
    except csv.Error as error:
        remedy = "a quote is left open, or one within a name is not written twice"
        raise ValueError(f"line {line}: is no CSV ({one_line(error)}): {remedy}") from None
    header = rows[0][1] if rows else []
    if any(header.count(column) != 1 for column in columns):
        raise ValueError(f"its first line must be {','.join(columns)}, each once, with commas between")
    if repeated := [name for name, n in Counter(header).items() if name and n > 1]:
        raise ValueError(f"line 1: names {shown(repeated[0])} twice; remove one")
    for line, cells in rows[1:]:
        if len(cells) != len(header):
            said = f"{len(cells)} fields where the first line has {len(header)}"
            raise ValueError(f"line {line}: has {said}; put a name with commas into quotes")
    return [(line, dict(zip(header, cells, strict=True))) for line, cells in rows[1:]]


def read_table(file: Path) -> list[tuple[int, dict[str, str]]]:
    """Read a CSV file in UTF-8 or a Parquet file: its rows, each with its line or number, all values as text.

    Raises:
        UserError: If it is neither, or damaged; says where.
    """
    try:
        with regular(file).open("rb") as stream:
            is_parquet = stream.read(len(PARQUET)) == PARQUET
        return _read_parquet(file) if is_parquet else read_csv(file, ())
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except ValueError as error:
        raise UserError(str(error) if isinstance(error, UserError) else f"{file}: {error}") from None


def _read_parquet(file: Path) -> list[tuple[int, dict[str, str]]]:
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError:
        raise UserError(f"{file}: is a Parquet file, which needs pyarrow: pip install 'metilr[parquet]'") from None
    try:
        table = parquet.ParquetFile(file)
        n_values = table.metadata.num_rows * table.metadata.num_columns
        if n_values > MOST_VALUES:  # a few bytes can stand for billions of rows
            raise UserError(f"{file}: has {n_values:,} values; at most {MOST_VALUES:,} are read")
        rows = table.read().to_pylist()
    except (ArrowException, OSError) as error:
        raise ValueError(f"cannot be read as Parquet ({one_line(error)})") from None
    return [(number, {name: _text(value) for name, value in row.items()}) for number, row in enumerate(rows, start=1)]


def _text(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():  # what pandas makes of numbers beside a missing one
        value = int(value)
    return "" if value is None else str(value)


def column_of(row: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    """The column of a table that has the first of such names; None if it has none of them."""
    by_name = {squeezed(column): column for column in reversed(list(row))}
    return next((by_name[name] for name in names if name in by_name), None)
