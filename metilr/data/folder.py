"""A museum's own images in a plain folder, sorted by exhibit."""

import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple, NoReturn

import numpy as np

from metilr.data.ground_truth import GroundTruth, is_place_below, is_text, nfc
from metilr.errors import UserError, shown
from metilr.files import read_csv

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
OTHER_SUFFIXES = frozenset({  # of images that are not read
    ".arw", ".avif", ".cr2", ".cr3", ".dng", ".eps", ".heic", ".heif", ".j2k", ".jp2", ".jpe", ".jpx", ".jxl", ".nef",
    ".orf", ".pgm", ".ppm", ".psd", ".raf", ".raw", ".rw2", ".svg", ".tga",
})  # fmt: skip
CSV_COLUMNS = ("path", "exhibit")


class FoundImages(NamedTuple):
    """A folder's image files, in the order of their paths, and what looks like more images, in words ("" if none)."""

    files: list[Path]
    left_aside: str


def find_images(folder: Path) -> FoundImages:
    """List a folder's images with its sub-folders'.

    Told by their endings. Names that begin with a dot are passed over; links to folders are not followed.

    Raises:
        UserError: If the folder is missing or holds no image, or it or a sub-folder cannot be listed.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name a folder of images")
    paths: list[Path] = []
    others: Counter[str] = Counter()
    for parent, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        others["links to folders"] += sum(Path(parent, name).is_symlink() for name in folders)
        visible = [Path(parent, name) for name in names if not name.startswith(".")]
        paths += [path for path in visible if path.suffix.lower() in IMAGE_SUFFIXES]
        others.update(path.suffix.lower() for path in visible if path.suffix.lower() in OTHER_SUFFIXES)
    left_aside = ", ".join(f"{n:,} {what}" for what, n in sorted(others.items()) if n)
    if not paths:
        besides = f" (but {left_aside})" if left_aside else ""
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        remedy = f"name a folder with {suffixes} files whose names do not begin with a dot"
        raise UserError(f"{folder}: no images inside{besides}; {remedy}")
    return FoundImages(sorted(paths), left_aside)


def _raise(error: OSError) -> NoReturn:
    """Stop: what lies in a folder that cannot be listed would be left out without a word."""
    raise UserError(f"{error.filename}: cannot be listed ({error.strerror}); make it readable, or move it elsewhere")


@dataclass(frozen=True)
class Catalogue:
    """Which images, by their paths relative to a folder, show which exhibit, by name."""

    folder: Path
    paths: tuple[str, ...]
    exhibits: tuple[str, ...]
    left_aside: str = ""  # see FoundImages

    @property
    def names(self) -> tuple[str, ...]:
        """Each exhibit's name once, sorted: those of the labels 0, 1, and so on."""
        return tuple(sorted(set(self.exhibits)))

    def ground_truth(self) -> GroundTruth:
        """The same as a ground truth that has a database and no queries; exhibit ids are labels."""
        label_of = {name: label for label, name in enumerate(self.names)}
        content = json.dumps([self.paths, self.exhibits])
        return GroundTruth(
            root=self.folder,
            database="full",
            paths={"database": self.paths},
            labels={"database": np.array([label_of[name] for name in self.exhibits], dtype=np.int64)},
            exhibit_ids=np.arange(len(label_of)),
            digests={"database": hashlib.sha256(content.encode()).hexdigest()},
            folder=".",
        )


def read_catalogue(folder: Path, csv: Path | None = None) -> Catalogue:
    """List the images of a folder and what they show. Opens no image.

    Without ``csv``, a sub-folder is an exhibit, with all that lies below it, and an image beside the sub-folders is an
    exhibit of its own, named as the file without its ending. Names that begin with a dot are passed over.

    A ``csv`` names them instead: columns ``path`` (relative to the folder) and ``exhibit``; others are passed over.

    Raises:
        UserError: If there are no images, fewer than 2 exhibits, two that have one name, a name that is not UTF-8, a
            sub-folder that cannot be listed, or the CSV file is malformed.
    """
    folder = Path(folder).absolute()
    _refuse_odd_name(folder)
    catalogue = _from_folder(folder) if csv is None else _from_csv(folder, Path(csv))
    if len(catalogue.names) < 2:
        name = " ".join(catalogue.names[0].split())[:60]
        hint = "give each exhibit a sub-folder" if csv is None else "list more"
        raise UserError(f"{csv or folder}: has one exhibit, {name}; recognising needs at least 2: {hint}")
    return catalogue


def _refuse_odd_name(path: Path) -> None:
    if not is_text(str(path)):
        raise UserError(f"{path}: its name is not UTF-8, which an index cannot hold; rename it")


def _from_folder(folder: Path) -> Catalogue:
    images = find_images(folder)
    paths = [path.relative_to(folder) for path in images.files]
    exhibits = [nfc(path.parts[0] if len(path.parts) > 1 else path.stem) for path in paths]
    taken = {nfc(path.parts[0]): path for path in paths if len(path.parts) > 1}
    for path, exhibit in zip(paths, exhibits, strict=True):
        _refuse_odd_name(folder / path)
        if len(path.parts) == 1 and taken.setdefault(exhibit, path) != path:
            remedy = f"put {path} into a sub-folder, or name exhibits by a csv"
            raise UserError(f"{folder}: {taken[exhibit]} and {path} both make an exhibit {exhibit}; {remedy}")
    return Catalogue(folder, tuple(path.as_posix() for path in paths), tuple(exhibits), images.left_aside)


def _from_csv(folder: Path, csv: Path) -> Catalogue:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name the folder that the paths in {csv} are relative to")
    try:
        rows = [(line, row["path"], row["exhibit"]) for line, row in read_csv(csv, CSV_COLUMNS)]
    except FileNotFoundError:
        raise UserError(f"{csv}: no such file", "csv") from None
    except ValueError as error:
        raise UserError(f"{csv}: {error}", "csv") from None
    if not rows:
        raise UserError(f"{csv}: lists no images", "csv")
    seen: dict[str, int] = {}
    for line, path, exhibit in rows:
        fault = None
        if broken := [name for name in (path, exhibit) if name.splitlines() not in ([], [name])]:
            fault = f"{shown(broken[0])} has a line break within; remove it, or close a quote before it"
        elif not is_place_below(path):
            fault = f"path {shown(path)} must name a file below {folder}"
        elif not exhibit.strip():
            fault = "names no exhibit"
        elif not is_text(exhibit):
            fault = f"exhibit {shown(exhibit)} cannot be a name"
        elif (first := seen.setdefault(nfc(str(PurePosixPath(path))), line)) != line:
            fault = f"{shown(path)} is listed already in line {first}; remove one"
        if fault:
            raise UserError(f"{csv}: line {line}: {fault}", "csv")
    return Catalogue(folder, tuple(path for _, path, _ in rows), tuple(nfc(exhibit.strip()) for _, _, exhibit in rows))
