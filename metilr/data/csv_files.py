"""Tables in CSV files: read strictly, and written so that no spreadsheet takes a name for a formula."""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from metilr.errors import one_line, shown
from metilr.files import regular

# Text that spreadsheets run, or that may begin a line of its own; after apostrophes too, so that one can be taken off.
_RISKY = re.compile(r"'*[=+\-@\uff1d\uff0b\uff0d\uff20]|.*[\x00-\x1f\x7f-\x9f\u2028\u2029]", re.DOTALL)


def as_csv(rows: Iterable[Iterable[object]]) -> str:
    """Write rows as CSV, risky text behind an apostrophe as OWASP advises; numbers stay as they are."""
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
    if repeated := [name for name in header if name and header.count(name) > 1]:
        raise ValueError(f"line 1: names {shown(repeated[0])} twice; remove one")
    for line, cells in rows[1:]:
        if len(cells) != len(header):
            said = f"{len(cells)} fields where the first line has {len(header)}"
            raise ValueError(f"line {line}: has {said}; put a name with commas into quotes")
        if odd := [cell for cell in cells if cell[:1].isspace() and cell.lstrip().startswith('"')]:
            raise ValueError(f"line {line}: {shown(odd[0])} has a blank before its quote; remove the blank")
    return [(line, dict(zip(header, cells, strict=True))) for line, cells in rows[1:]]
