"""The images in a folder, and what else lies there."""

import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, NoReturn

from metilr.data.decode import FAILING_MACHINE, FORMATS, begins_as_image
from metilr.errors import UserError

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
    ending = ending_of(file)
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


def ending_of(file: Path) -> str:
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
