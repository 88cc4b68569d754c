"""Tables in CSV files, read strictly."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from metilr.errors import one_line, shown
from metilr.files import regular


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
    for line, cells in rows[1:]:
        if len(cells) != len(header):
            said = f"{len(cells)} fields where the first line has {len(header)}"
            raise ValueError(f"line {line}: has {said}; put a name with commas into quotes")
        if odd := [cell for cell in cells if cell[:1].isspace() and cell.lstrip().startswith('"')]:
            raise ValueError(f"line {line}: {shown(odd[0])} has a blank before its quote; remove the blank")
    return [(line, dict(zip(header, cells, strict=True))) for line, cells in rows[1:]]
