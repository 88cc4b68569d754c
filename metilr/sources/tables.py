"""A catalogue in a table, CSV or Parquet: a row an image, or a row an exhibit."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metilr.data.csv_files import read_csv
from metilr.data.exhibit import squeezed
from metilr.errors import UserError, one_line
from metilr.files import regular

PARQUET = b"PAR1"
# Under which names a table keeps them, in small letters without blanks and signs; of several the first counts.
IMAGE_NAMES = ("path", "imagepath", "file", "filename", "image", "imageurl", "primaryimage", "url")
EXHIBIT_NAMES = ("exhibit", "exhibitid", "objectid", "id", "accessionnumber", "inventorynumber", "objectnumber")


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
        rows = parquet.ParquetFile(file).read().to_pylist()
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
