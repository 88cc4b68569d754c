"""Files that appear whole or not at all, on disks that several machines may share, and their digests.

Temporary names are random: two containers on two machines often have the same process number.
"""

import contextlib
import errno
import hashlib
import io
import os
import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from metilr.errors import UserError, one_line

CHUNK = 1 << 20  # bytes hashed at a time


def file_sha256(path: Path, report: Callable[[int], None] = lambda done: None) -> str:
    """Return a file's sha256 as 64 hexadecimal digits; ``report`` is called with the bytes read so far."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            report(file.tell())
    return digest.hexdigest()


def write_atomically(file: Path, text: str) -> None:
    """Write a text file so that a reader sees the old content or the new, never a part.

    Raises:
        OSError: If it cannot be written; names it.
    """
    with replaced_file(file) as stream:
        stream.write(text.encode())


@contextlib.contextmanager
def replaced_file(file: Path) -> Iterator[IO[bytes]]:
    """Open a file to write that takes the old one's place when the block ends well, on disk by then.

    Raises:
        OSError: If it cannot be written; names it.
    """
    temporary = _temporary(file)
    try:
        with named(file), temporary.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
        _push_names(file.parent)
    except OSError as error:
        if error.filename == str(temporary):  # a name that the user has never seen
            error.filename, error.filename2 = str(file), None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_picture(file: Path, save: Callable[[IO[bytes]], object]) -> None:
    """Write a picture whole or not at all.

    Args:
        file: Where to.
        save: Writes the picture to a stream. Not to the file: encoders overlook that a full disk took a part only.

    Raises:
        OSError: If it cannot be written; names it.
    """
    content = io.BytesIO()
    save(content)
    with replaced_file(file) as stream:
        stream.write(content.getbuffer())


@contextlib.contextmanager
def new_file(file: Path) -> Iterator[IO[bytes]]:
    """Open a file to write that gets its name when the block ends well, and never takes another file's place.

    Raises:
        FileExistsError: At the block's end, if somebody else has put a file there.
    """
    temporary = _temporary(file)
    try:
        with temporary.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        try:
            os.link(temporary, file)
        except FileExistsError:
            raise
        except (OSError, AttributeError):  # no hard links here: claim the name, then replace what is ours
            file.open("xb").close()
            temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def named(file: str | Path) -> Iterator[None]:
    """Let an error of the disk say which file it met: those of writing and flushing do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(file)) from None
        raise


def rename_on_disk(file: Path, target: Path) -> None:
    """Give a finished file its name, with its content on disk before and the name after."""
    with file.open("rb") as stream, named(file):
        os.fsync(stream.fileno())
    file.replace(target)
    _push_names(target.parent)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes have left of files that they were writing; nobody else may be writing there."""
    for file in folder.iterdir():
        if re.fullmatch(r"\..+\.[0-9a-f]{32}", file.name):
            file.unlink(missing_ok=True)


def flush(folder: Path) -> None:
    """Have all files below a folder on disk, with their names: a machine that goes down after that keeps them."""
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            _push_names(path)
        else:
            with path.open("rb") as stream, named(path):
                os.fsync(stream.fileno())


def flush_all() -> None:
    """Have everything on disk that this machine has written: for many small files far quicker than each by itself."""
    if hasattr(os, "sync"):
        os.sync()


def map_array(file: Path, remedy: str | Callable[[Exception], str]) -> np.memmap:
    """Map a .npy file, read-only; its header may claim what it likes.

    Args:
        file: The file.
        remedy: What the message says to do; may depend on the error.

    Raises:
        UserError: If the file is missing, cut off, empty, or no array of numbers.
    """
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy raises many types on damaged headers
        reason = "holds objects" if "pickle" in str(error) else one_line(error)  # NumPy's advice there would be unsafe
        advice = remedy if isinstance(remedy, str) else remedy(error)
        raise UserError(f"{file}: cannot be read ({reason}); {advice}") from None


def reserve_array(file: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Take the disk space of a .npy file, which is made, zero-filled, if it is not there.

    Several processes may do so at once: all get the one file, whose content nobody replaces.

    Raises:
        OSError: If the disk is too full; now, and not after hours of writing.
    """
    if not file.exists():
        with contextlib.suppress(FileExistsError), new_file(file) as stream:  # made by another process meanwhile
            np.lib.format.write_array_header_1_0(
                stream, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
            )
            stream.truncate(stream.tell() + int(np.prod(shape)) * dtype.itemsize)
    with file.open("r+b") as stream:
        _allocate(stream.fileno(), os.fstat(stream.fileno()).st_size)


def _allocate(descriptor: int, n_bytes: int) -> None:
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, n_bytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # the file system cannot promise space
            raise


def _push_names(folder: Path) -> None:
    """Have a renaming on disk, where the system can: a machine that goes down now keeps the new file."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _temporary(file: Path) -> Path:
    return file.with_name(f".{file.name}.{uuid.uuid4().hex}")
