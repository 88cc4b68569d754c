"""Unpacking of archives from elsewhere: nothing lands outside its folder, and a killed run is continued."""

import contextlib
import gzip
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any, NamedTuple

from metilr.errors import UserError

CHUNK = 1 << 20  # bytes copied at a time
MAX_FILE = 1 << 28  # bytes; the largest file of the official archives, a JSON, has some tens of millions
MAX_READ = 1 << 24  # bytes that a header may claim for itself: tarfile reads it into memory at once
MAX_GROWTH = 100  # bytes of files for each of the archive; text reaches 20, a bomb 1,000
ROOM = 1 << 20  # bytes of files that are always allowed: a small archive is mostly headers
MAX_NAME = 200  # bytes of a part of a path; file systems take 255
BLOCK = 512  # tar's
DAMAGE = (  # what a broken archive makes Python's readers raise
    tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError, IndexError, OverflowError, RecursionError,
)  # fmt: skip


class DamagedArchive(UserError):
    """An archive that is not whole, or no archive at all."""


class HostileArchive(UserError):
    """An archive with a member that has no business in it."""


class Unpacked(NamedTuple):
    """What an archive held.

    Attributes:
        files: Number of files that were wanted.
        left_out: Number of files of other kinds.
    """

    files: int
    left_out: int


def unpack(
    archive: Path,
    folder: Path,
    depth: int,
    suffix: str,
    done: int = 0,
    report: Callable[[int, int], None] = lambda members, compressed: None,
) -> Unpacked:
    """Write the files of a .tar.gz into a folder, each whole or not at all.

    A file gets its name when all of it is written; until then it lies in the folder as ``.ARCHIVE.member``.
    Files of other endings, and those whose name begins with a dot, are left out.

    Args:
        archive: The .tar.gz.
        folder: Where the files go; made if need be.
        depth: A file's place in the folder are the last so many parts of its path in the archive.
        suffix: Ending of the files that are wanted.
        done: Members that an earlier run has dealt with, as it reported: of these, files that are there in their
            full size are kept.
        report: Called before each member with the number of those dealt with, and the bytes of the archive that
            have been read. What it raises ends the unpacking.

    Raises:
        HostileArchive: If a member is a link, a device or a pipe, its path is absolute or leads upwards, it lies
            in another place than the others, or it is too large to be true. What was unpacked before stays.
        UserError: If a link lies in a file's way below the folder.
        DamagedArchive: If the archive ends early or cannot be read.
        OSError: If a file cannot be written; it names the file.
    """
    files = left_out = unpacked_bytes = 0
    allowed = ROOM + MAX_GROWTH * archive.stat().st_size
    temporary = folder / f".{archive.name}.member"
    top: PurePosixPath | None = None
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _damage_named(archive), archive.open("rb") as raw:
            for i, (member, content) in enumerate(_members(raw)):
                report(i, raw.tell())
                _refuse_unsafe(archive, member)
                unpacked_bytes += member.size
                if not 0 <= member.size <= MAX_FILE or unpacked_bytes > allowed:
                    raise _hostile(archive, member, f"claims {member.size:,} bytes, too many to be true")
                path = PurePosixPath(member.name)
                if member.isdir():
                    continue
                if path.suffix.lower() != suffix or path.name.startswith("."):
                    left_out += 1
                    continue
                place = PurePosixPath(*path.parts[-depth:])
                top = path.parents[depth - 1] if top is None and len(path.parts) >= depth else top
                if len(path.parts) < depth or path.parents[depth - 1] != top:
                    raise _hostile(archive, member, "lies in another folder than the files before it")
                target = folder / place
                if i >= done or _size(target) != member.size:
                    _refuse_way_out(archive, member, folder, place)
                    _write(content, temporary, target)
                files += 1
    finally:
        temporary.unlink(missing_ok=True)
    return Unpacked(files, left_out)


def _members(raw: IO[bytes]) -> Iterator[tuple[tarfile.TarInfo, IO[bytes] | None]]:
    """The members in their order, each with its content; the end is checked for being the archive's own."""
    with gzip.GzipFile(fileobj=raw) as stream:
        bounded: Any = _Bounded(stream)
        tar: Any = tarfile.TarFile(fileobj=bounded)
        while (member := tar.next()) is not None:
            tar.members.clear()  # or 400,000 of them stay in memory
            yield member, tar.extractfile(member) if member.isreg() and not member.issparse() else None
        if bounded.last != bytes(BLOCK):  # tarfile takes a broken header for the end
            raise EOFError("no end mark")
        padding = 0
        while rest := stream.read(CHUNK):  # to its checksum
            padding += len(rest)
            if padding > MAX_READ:
                raise ValueError("goes on after its end mark")


@contextlib.contextmanager
def _damage_named(archive: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DamagedArchive(
            f"{archive}: is damaged or no .tar.gz ({reason}); delete it, and the same command gets it again"
        ) from error


class _Bounded:
    """A stream for tarfile that refuses to be read in pieces larger than honest headers."""

    def __init__(self, stream: gzip.GzipFile) -> None:
        self.stream, self.last = stream, b""
        self.seek, self.tell = stream.seek, stream.tell

    def read(self, n: int = -1) -> bytes:
        if not 0 <= n <= MAX_READ:
            raise ValueError(f"a header of {n:,} bytes")
        self.last = self.stream.read(n)
        return self.last


def _refuse_unsafe(archive: Path, member: tarfile.TarInfo) -> None:
    """Refuse what is neither a plain file nor a folder below the archive's top."""
    if member.issym() or member.islnk():
        raise _hostile(archive, member, f"is a link to {member.linkname!r}")
    if not (member.isreg() or member.isdir()) or member.issparse():
        raise _hostile(archive, member, "is no plain file")
    windows = PureWindowsPath(member.name)  # takes / and \ for what they are
    if windows.root or ".." in windows.parts or ":" in member.name:  # the last begins a drive or a hidden stream
        raise _hostile(archive, member, "leads out of the folder")
    too_long = any(len(os.fsencode(part)) > MAX_NAME for part in PurePosixPath(member.name).parts)
    if too_long or "\0" in member.name or (member.isreg() and not member.name.strip("./")):
        raise _hostile(archive, member, "has no usable name")


def _refuse_way_out(archive: Path, member: tarfile.TarInfo, folder: Path, place: PurePosixPath) -> None:
    """Refuse a file in the way of which a link lies: it would be written elsewhere. The folder itself may be one."""
    between = folder
    for part in place.parts:
        between = between / part
        if between.is_symlink():
            raise UserError(f"{between}: is a link in the way of {archive}'s member {member.name!r}; remove the link")
    data_filter = getattr(tarfile, "data_filter", None)  # Python 3.10.12, 3.11.4 and later
    if data_filter is not None:
        try:
            data_filter(member.replace(name=str(place), deep=False), str(folder))
        except tarfile.FilterError as error:
            raise _hostile(archive, member, str(error)) from error


def _hostile(archive: Path, member: tarfile.TarInfo, what: str) -> HostileArchive:
    return HostileArchive(
        f"{archive}: member {member.name!r} {what}; this is not the published archive: delete it and get it elsewhere"
    )


def _write(content: IO[bytes] | None, temporary: Path, target: Path) -> None:
    assert content is not None  # a plain file
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("wb") as file:
            while chunk := content.read(CHUNK):
                file.write(chunk)
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(target)  # a failing write does not tell
        raise
    temporary.replace(target)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return -1
