"""A museum's own images with their exhibits, from a folder or from a table of local files."""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np

from metilr.data.decode import FAILING_MACHINE
from metilr.data.exhibit import Exhibit, exhibit_of
from metilr.data.folder import ending_of, find_images
from metilr.data.ground_truth import GroundTruth, as_name, is_place_below, is_text, nfc
from metilr.data.tables import EXHIBIT_NAMES, IMAGE_NAMES, column_of, read_table
from metilr.errors import UserError, amount, amount_is, shown
from metilr.files import file_sha256
from metilr.progress import tracked

READERS = 4  # threads that read images for their digests


@dataclass(frozen=True)
class Catalogue:
    """Which images, by their paths relative to a folder, show which exhibit, by name.

    Attributes:
        about: What is said of exhibits, by name; of some or all.
        name: Of the whole, where it has a better one than the folder's.
        left_aside: What else the source holds, in words.
        failed: Why images are missing, by their addresses.
        sha256: Of each image's content, in order; empty where there is no file, or none were made.
    """

    folder: Path
    paths: tuple[str, ...]
    exhibits: tuple[str, ...]
    about: Mapping[str, Exhibit] = field(default_factory=dict)
    name: str = ""
    left_aside: str = ""
    failed: Mapping[str, str] = field(default_factory=dict)
    sha256: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Each exhibit's name once, sorted: those of the labels 0, 1, and so on."""
        return tuple(sorted(set(self.exhibits)))

    def ground_truth(self) -> GroundTruth:
        """The same as a ground truth that has a database and no queries; exhibit ids are labels."""
        label_of = {name: label for label, name in enumerate(self.names)}
        content = json.dumps([self.paths, self.exhibits])
        return GroundTruth(
            root=self.folder, database="full", paths={"database": self.paths},
            labels={"database": np.array([label_of[name] for name in self.exhibits], dtype=np.int64)},
            exhibit_ids=np.arange(len(label_of)), digests={"database": hashlib.sha256(content.encode()).hexdigest()},
            folder=".",
        )  # fmt: skip

    def with_digests(self, quiet: bool = False) -> "Catalogue":
        """The same with ``sha256``: reads all images."""
        truth = self.ground_truth()

        def digest(path: str) -> str:
            try:
                return file_sha256(truth.image(path))
            except (OSError, ValueError) as error:
                if isinstance(error, OSError) and error.errno in FAILING_MACHINE:
                    raise
                return ""  # the describing says what is wrong with it

        with ThreadPoolExecutor(READERS) as pool:
            digests = pool.map(digest, self.paths)
            return replace(self, sha256=(*tracked(digests, "reading images", len(self.paths), "images", quiet),))


def read_catalogue(folder: Path, table: Path | None = None) -> Catalogue:
    """List the images of a folder and what they show. Opens no file that has an image's ending.

    A sub-folder is an exhibit, with all that lies below it, and an image beside the sub-folders is an exhibit of its
    own, named as the file without its ending. ``find_images`` says what is passed over.

    A ``table``, CSV or Parquet, that has a column of paths (relative to the folder) names images and exhibits in place
    of the sub-folders; one that has none tells about them, a row an exhibit.

    Raises:
        UserError: If there are no images, fewer than 2 exhibits, two that have one name, a name that is not UTF-8, a
            sub-folder that cannot be listed, or the table is malformed.
    """
    folder = Path(folder).absolute()
    _refuse_odd_name(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name a folder of images")
    rows = [] if table is None else rows_of(table)
    if table is None:
        catalogue = _from_folder(folder)
    elif column_of(rows[0].values, IMAGE_NAMES):
        catalogue = from_rows(folder, table, rows)
    else:
        catalogue = _told_about(_from_folder(folder), rows)
    refuse_one_exhibit(catalogue, str(table or folder), "give each exhibit a sub-folder" if not table else "list more")
    return catalogue


def refuse_one_exhibit(catalogue: Catalogue, source: str, hint: str) -> None:
    """Refuse a catalogue that leaves nothing to recognise."""
    if len(catalogue.names) < 2:
        name = " ".join(catalogue.names[0].split())[:60]
        raise UserError(f"{source}: has one exhibit, {name}; recognising needs at least 2: {hint}")


def _refuse_odd_name(path: Path) -> None:
    if not is_text(str(path)):
        raise UserError(f"{path}: its name is not UTF-8, which an index cannot hold; rename it")


def _from_folder(folder: Path) -> Catalogue:
    images = find_images(folder)
    paths = [path.relative_to(folder) for path in images.files]
    exhibits = [
        as_name(path.parts[0] if len(path.parts) > 1 else path.name[: len(path.name) - len(ending_of(path))])
        for path in paths
    ]
    taken = {as_name(path.parts[0]): path for path in paths if len(path.parts) > 1}
    for path, exhibit in zip(paths, exhibits, strict=True):
        _refuse_odd_name(folder / path)
        if not exhibit:
            raise UserError(f"{folder / path}: the name of its exhibit is blank; rename it")
        if len(path.parts) == 1 and taken.setdefault(exhibit, path) != path:
            remedy = f"put {path} into a sub-folder, or name exhibits by a csv"
            raise UserError(f"{folder}: {taken[exhibit]} and {path} both make an exhibit {exhibit}; {remedy}")
    return Catalogue(folder, tuple(path.as_posix() for path in paths), tuple(exhibits), left_aside=images.left_aside)


@dataclass(frozen=True)
class Row:
    """A row of a table: its line or number, the image that it names, if any, its exhibit, and all its values."""

    line: int
    image: str
    exhibit: str
    values: Mapping[str, str]

    def about(self) -> Exhibit:
        """What it says of its exhibit besides names."""
        known = column_of(self.values, IMAGE_NAMES), column_of(self.values, EXHIBIT_NAMES)
        return exhibit_of({name: value for name, value in self.values.items() if name not in known})


def rows_of(table: Path) -> list[Row]:
    """Read a table of images or of exhibits.

    Raises:
        UserError: If it is malformed, has no rows or no column of exhibits, or a row names none; says the line.
    """
    rows = read_table(table)
    if not rows:
        raise UserError(f"{table}: lists no images", "csv")
    image, exhibit = (column_of(rows[0][1], names) for names in (IMAGE_NAMES, EXHIBIT_NAMES))
    if exhibit is None:
        columns = f"path,exhibit (or {', '.join(EXHIBIT_NAMES[1:4])} for exhibit), with commas between"
        raise UserError(f"{table}: has no column of exhibits; its first line must be like {columns}", "csv")
    made = []
    for line, values in rows:
        row = Row(line, values[image] if image else "", as_name(values[exhibit]), values)
        fault = None
        names = (row.image, values[exhibit])
        if broken := [each for each in names if each.splitlines() not in ([], [each])]:
            fault = f"{shown(broken[0])} has a line break within; remove it, or close a quote before it"
        elif odd := [each for each in names if each[:1].isspace() and each.lstrip().startswith('"')]:
            fault = f"{shown(odd[0])} has a blank before its quote; remove the blank"
        elif not row.exhibit:
            fault = "names no exhibit"
        elif not is_text(row.exhibit):
            fault = f"exhibit {shown(row.exhibit)} cannot be a name"
        if fault:
            raise UserError(f"{table}: line {line}: {fault}", "csv")
        made.append(row)
    return made


def from_rows(folder: Path, table: Path, rows: list[Row]) -> Catalogue:
    """The catalogue of a table that names files below a folder; rows that name none are left aside."""
    rows, n_all = with_images(table, rows), len(rows)
    aside = f"{amount(n_all - len(rows), 'row')} without an image" if len(rows) < n_all else ""
    seen: dict[str, int] = {}
    for row in rows:
        if not is_place_below(row.image):
            fault = f"path {shown(row.image)} must name a file below {folder}"
        elif (first := seen.setdefault(nfc(str(PurePosixPath(row.image))), row.line)) != row.line:
            fault = f"{shown(row.image)} is listed already in line {first}; remove one"
        else:
            continue
        raise UserError(f"{table}: line {row.line}: {fault}", "csv")
    paths, exhibits = tuple(row.image for row in rows), tuple(row.exhibit for row in rows)
    return Catalogue(folder, paths, exhibits, about_rows(rows), left_aside=aside)


def with_images(table: Path | str, rows: list[Row]) -> list[Row]:
    """The rows of a table that name an image; UserError if none does."""
    if not (named := [row for row in rows if row.image]):
        columns = ", ".join(IMAGE_NAMES)
        raise UserError(f"{table}: names no image; a column like {columns} must, or give it as csv beside a folder")
    return named


def about_rows(rows: list[Row]) -> dict[str, Exhibit]:
    """What a table says of its exhibits: of several rows the first counts."""
    first = {row.exhibit: row for row in reversed(rows)}
    return {name: about for name, row in first.items() if (about := row.about()) != Exhibit()}


def _told_about(catalogue: Catalogue, rows: list[Row]) -> Catalogue:
    about = about_rows([row for row in rows if row.exhibit in {*catalogue.names}])
    missing = [name for name in catalogue.names if name not in about]
    aside = [catalogue.left_aside] if catalogue.left_aside else []
    if missing:
        aside.append(f"{amount_is(len(missing), 'exhibit')} not in the table ({', '.join(missing[:3])})")
    return replace(catalogue, about=about, left_aside="; ".join(aside))
