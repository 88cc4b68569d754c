"""The image files of a folder."""

import errno
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple, NoReturn

from metilr.errors import UserError

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
OTHER_SUFFIXES = frozenset({
    ".arw", ".avif", ".cr2", ".cr3", ".dng", ".eps", ".heic", ".heif", ".j2k", ".jp2", ".jpe", ".jpx", ".jxl", ".nef",
    ".orf", ".pgm", ".ppm", ".psd", ".raf", ".raw", ".rw2", ".svg", ".tga",
})  # fmt: skip
"""Of images that are not read."""

NO_FILE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG})
"""What a system says of a name under which no file can be had: of the image, not of the disk."""


def file_size(path: Path) -> int | None:
    """Bytes of a file; None if none can be had under that name.

    Raises:
        OSError: If the disk, not the name, is at fault.
    """
    try:
        return path.stat().st_size
    except OSError as error:
        if error.errno in NO_FILE:
            return None
        raise


class FoundImages(NamedTuple):
    """What a folder holds.

    Attributes:
        files: Its images with its sub-folders', in the order of their paths.
        left_aside: What looks like more images, in words that end a sentence; empty if there is nothing.
    """

    files: list[Path]
    left_aside: str


def find_images(folder: Path) -> FoundImages:
    """List a folder's images with its sub-folders', in the order of their paths.

    Told by their endings. Names that begin with a dot are passed over; links to folders are not followed.

    Raises:
        UserError: If the folder is missing or holds no image, or it or a sub-folder cannot be listed.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name a folder of images")
    paths: list[Path] = []
    others: Counter[str] = Counter()
    for parent, folders, names in os.walk(folder, onerror=_cannot_list):
        folders[:] = [name for name in folders if not name.startswith(".")]
        others["links to folders"] += sum(Path(parent, name).is_symlink() for name in folders)
        for name in names:
            suffix = Path(name).suffix.lower()
            if name.startswith("."):
                continue
            if suffix in IMAGE_SUFFIXES:
                paths.append(Path(parent, name))
            elif suffix in OTHER_SUFFIXES:
                others[suffix] += 1
    left_aside = ", ".join(f"{n:,} {what}" for what, n in sorted(others.items()) if n)
    if not paths:
        besides = f" (but {left_aside})" if left_aside else ""
        raise UserError(
            f"{folder}: no images inside{besides}; name a folder with {', '.join(sorted(IMAGE_SUFFIXES))} files whose "
            "names do not begin with a dot"
        )
    return FoundImages(sorted(paths), left_aside)


def _cannot_list(error: OSError) -> NoReturn:
    """Stop: what lies in there would be left out without a word."""
    raise UserError(
        f"{error.filename}: cannot be listed ({error.strerror}); make it readable, or move it elsewhere"
    ) from None
