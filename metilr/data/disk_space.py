"""Whether the disk has room for archives and their files, before the first byte is downloaded."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from metilr.data.archives import Archive
from metilr.errors import UserError
from metilr.fetch import downloaded_part
from metilr.transfer import MOST, FetchError, remote_size

RESERVE = 1_000_000_000  # bytes that a download of unknown size leaves free


@dataclass(frozen=True)
class Need:
    """Bytes that will be written.

    Attributes:
        archives: Of the archives, without what is there already.
        files: Of their files.
        estimated: The archives whose size is estimated.
        unknown: Those whose size is unknown, so that they are not counted.
    """

    archives: int
    files: int
    estimated: tuple[str, ...]
    unknown: tuple[str, ...]

    def described(self) -> str:
        """One line that says what is known and what is estimated."""
        notes = [f"{', '.join(self.estimated)} estimated"] if self.estimated else []
        notes += (
            [f"{', '.join(self.unknown)} of unknown size and not counted (at most {shown_bytes(MOST)} each)"]
            if self.unknown
            else []
        )
        files = f"about {shown_bytes(self.files)} of files (estimated from the archives)"
        return f"{shown_bytes(self.archives)} of archives{''.join(f', {note}' for note in notes)}; {files}"


def find_need(archives: Sequence[Archive], root: Path, folder: Path, base: str) -> Need:
    """Add up what downloading and unpacking will write; the server is asked where no size is published.

    Args:
        archives: Those that are to be obtained.
        root: The data root; of files that an earlier run unpacked there only the rest is needed.
        folder: Where archives go, or are already.
        base: Address that archive names are appended to.
    """
    to_load = to_unpack = 0
    estimated: list[str] = []
    unknown: list[str] = []
    answers = True
    for archive in archives:
        path = folder / archive.name
        size = path.stat().st_size if path.is_file() else archive.size
        if size is None and answers:
            try:
                size = remote_size(base + archive.name)
            except FetchError as error:  # the download will say so, if it persists
                answers = error.status is not None or not error.passing
        if size is None:
            (unknown if archive.about is None else estimated).append(archive.name)
            size = archive.about or 0
        there = size if path.is_file() else downloaded_part(path)
        to_load += max(0, size - there)
        to_unpack += max(0, int(size * archive.growth) - _bytes_below(root / archive.folder))
    return Need(to_load, to_unpack, tuple(estimated), tuple(unknown))


def require_space(need: Need, archives: Path, files: Path) -> None:
    """Refuse to begin what the disk has no room for.

    Args:
        need: What will be written.
        archives: Folder of the archives.
        files: Folder of their files; may lie on another disk.

    Raises:
        UserError: If a disk has less room.
    """
    needs = {archives: need.archives, files: need.files}
    if archives.stat().st_dev == files.stat().st_dev:
        needs = {archives: need.archives + need.files}
    for folder, needed in needs.items():
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise UserError(
                f"{folder}: {shown_bytes(free)} free, {shown_bytes(needed)} needed ({need.described()}); free some, "
                "or name another place with --root"
            )


def require_reserve(folder: Path, name: str) -> None:
    """Refuse to go on with a download whose size nobody tells, so that nobody could ask whether there is room for it.

    Raises:
        UserError: If the disk is nearly full.
    """
    free = shutil.disk_usage(folder).free
    if free < RESERVE:
        raise UserError(
            f"{folder}: {shown_bytes(free)} free, and the server does not tell the size of {name}; free at least "
            f"{shown_bytes(RESERVE)}, or name another place with --root"
        )


def shown_bytes(n: int) -> str:
    """A number of bytes in a unit that suits it."""
    size, unit = float(n), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"


def _bytes_below(folder: Path) -> int:
    return sum((Path(parent) / name).lstat().st_size for parent, _, names in os.walk(folder) for name in names)
