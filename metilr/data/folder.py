"""A museum's own images in a plain folder, sorted by exhibit."""

import hashlib
import json
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple, NoReturn

import numpy as np

from metilr.data.csv_files import read_csv
from metilr.data.decode import FAILING_MACHINE, FORMATS, begins_as_image
from metilr.data.ground_truth import GroundTruth, as_name, is_place_below, is_text, nfc
from metilr.errors import UserError, shown

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
RAW_SUFFIXES = frozenset({  # of cameras: TIFF files whose first image is a thumbnail
    ".3fr", ".arw", ".cr2", ".dcr", ".dng", ".erf", ".fff", ".iiq", ".kdc", ".mef", ".mos", ".nef", ".nrw", ".pef",
    ".rwl", ".sr2", ".srf", ".srw",
})  # fmt: skip
UNFINISHED_SUFFIXES = frozenset({".crdownload", ".download", ".filepart", ".part", ".partial", ".tmp"})
SYSTEM_NAMES = frozenset({  # of folders and files that systems make, besides those that begin with a dot
    "#recycle", "#snapshot", "$recycle.bin", "@eadir", "@recycle", "__macosx", "desktop.ini", "ehthumbs.db",
    "lost+found", "system volume information", "thumbs.db",
})  # fmt: skip
READERS = 8  # threads that read first bytes: the time goes into waiting for the disk
MOST_KINDS = 9  # of what is left aside that are named
CSV_COLUMNS = ("path", "exhibit")


class FoundImages(NamedTuple):
    """A folder's image files, in the order of their paths, and what else is there, in words ("" if nothing)."""

    files: list[Path]
    left_aside: str


def find_images(folder: Path) -> FoundImages:
    """List a folder's images with its sub-folders'.

    A file with an image's ending is taken for one unopened, another if its first bytes are an image's. Folders and
    files of the system, names that begin with a dot, links to folders and unfinished downloads are left aside.

    Raises:
        UserError: If the folder is missing or holds no image, or it or a sub-folder cannot be listed.
        OSError: If the disk fails.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name a folder of images")
    paths: list[Path] = []
    unclear: list[Path] = []
    others: Counter[str] = Counter()
    for parent, folders, names in os.walk(folder, onerror=_raise):
        others["system folder"] += sum(map(_is_systems, folders))
        others["system file"] += sum(map(_is_systems, names))
        folders[:] = [name for name in folders if not _is_systems(name)]
        others["linked folder"] += sum(Path(parent, name).is_symlink() for name in folders)
        for path in (Path(parent, name) for name in names if not _is_systems(name)):
            (paths if path.suffix.lower() in IMAGE_SUFFIXES else unclear).append(path)
    with ThreadPoolExecutor(READERS) as pool:
        for path, kind in zip(unclear, pool.map(_other_kind, unclear), strict=True):
            if kind is None:
                paths.append(path)
            else:
                others[kind] += 1
    left_aside = _in_words(others)
    if not paths:
        besides = f" (but {left_aside})" if left_aside else ""
        raise UserError(f"{folder}: no images inside{besides}; name a folder that holds {', '.join(FORMATS)} files")
    return FoundImages(sorted(paths), left_aside)


def _is_systems(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def _other_kind(file: Path) -> str | None:
    """What a file is that has no image's ending, in words; None if it is an image for all that."""
    ending = _ending(file)
    try:
        if ending not in UNFINISHED_SUFFIXES | RAW_SUFFIXES and begins_as_image(file):
            return None
    except ValueError:
        return "pipe or device"
    except OSError as error:
        if error.errno in FAILING_MACHINE:
            raise
        return "not readable"
    return ending or "without an ending"


def _ending(file: Path) -> str:
    """What a name ends in, in small letters, where that looks as if it told a kind: .jpg, and not that of "No. 7"."""
    return file.suffix.lower() if re.fullmatch(r"\.[A-Za-z0-9]*[A-Za-z]\w*", file.suffix[:20], re.ASCII) else ""


def _in_words(others: Counter[str]) -> str:
    named = sorted(others.items(), key=lambda each: (-each[1], each[0]))[:MOST_KINDS]
    rest = others.total() - sum(n for _, n in named)
    words = [
        f"{n:,} {kind}{'s' if n > 1 and kind.endswith(('file', 'folder')) else ''}" for kind, n in sorted(named) if n
    ]
    return ", ".join([*words, *([f"{rest:,} of other kinds"] if rest else [])])


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
    """List the images of a folder and what they show. Opens no file that has an image's ending.

    Without ``csv``, a sub-folder is an exhibit, with all that lies below it, and an image beside the sub-folders is an
    exhibit of its own, named as the file without its ending. ``find_images`` says what is passed over.

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
    exhibits = [
        as_name(path.parts[0] if len(path.parts) > 1 else path.name[: len(path.name) - len(_ending(path))])
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
        elif not as_name(exhibit):
            fault = "names no exhibit"
        elif not is_text(exhibit):
            fault = f"exhibit {shown(exhibit)} cannot be a name"
        elif (first := seen.setdefault(nfc(str(PurePosixPath(path))), line)) != line:
            fault = f"{shown(path)} is listed already in line {first}; remove one"
        if fault:
            raise UserError(f"{csv}: line {line}: {fault}", "csv")
    return Catalogue(folder, tuple(path for _, path, _ in rows), tuple(as_name(exhibit) for _, _, exhibit in rows))
