"""Files that appear whole or not at all, folders for one process at a time; what others wrote, read within limits."""

import contextlib
import csv
import errno
import hashlib
import io
import os
import re
import stat
import uuid
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import yaml

from metilr.errors import UserError, one_line, shown

LOCK = ".lock"
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
    except OSError as error:
        if error.filename == str(temporary):  # a name that the user has never seen
            error.filename, error.filename2 = str(file), None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_picture(file: Path, save: Callable[[IO[bytes]], object]) -> None:
    """Write a picture whole or not at all: by way of memory, since encoders overlook that a disk is full."""
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


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes have left of files that they were writing; nobody else may be writing there."""
    for file in folder.iterdir():
        if re.fullmatch(r"\..+\.[0-9a-f]{32}", file.name):
            file.unlink(missing_ok=True)


def map_array(file: Path, remedy: str) -> np.memmap:
    """Map a .npy file, read-only; ``remedy`` is what a message says to do about a file that is missing or damaged.

    Raises:
        UserError: If the file is missing, cut off, empty, or no array of numbers.
        OSError: If the disk fails, which is no reason to throw the file away.
    """
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy raises many types on damaged headers
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise
        reason = "holds objects" if "pickle" in str(error) else one_line(error)  # NumPy's advice there would be unsafe
        raise UserError(f"{file}: cannot be read ({reason}); {remedy}") from None


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


def _temporary(file: Path) -> Path:
    return file.with_name(f".{file.name}.{uuid.uuid4().hex}")


def refuse_compressed(file: Path) -> None:
    """Refuse a zip archive whose entries are compressed, or together larger than the file: it could fill the memory.

    Raises:
        ValueError: If it is such an archive.
    """
    with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(file) as archive:  # no archive: others will say so
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("its parts are compressed, which PyTorch and NumPy do not do")
        if sum(entry.file_size for entry in entries) > file.stat().st_size:
            raise ValueError("its parts claim to be larger than the file")


def read_npz(file: Path) -> dict[str, np.ndarray]:
    """Read the arrays of an .npz file that ``np.savez`` wrote; none holds objects.

    Raises:
        Exception: Of many types, if it cannot be read, is damaged or something else.
    """
    if file.is_file() and not zipfile.is_zipfile(file):
        raise ValueError("not a .npz file")
    refuse_compressed(file)
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def read_regular(file: Path) -> bytes:
    """Read a whole file; ValueError if it is a folder, a pipe, which would be waited for, or a device."""
    if not stat.S_ISREG(file.stat().st_mode):
        raise ValueError("not a regular file")
    return file.read_bytes()


def read_csv(file: Path, columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """Read a CSV file in UTF-8 that has such columns, others too: its rows, each with the line that it begins in.

    Raises:
        ValueError: If a column is missing, or a row has too many or too few fields, or is no CSV; says the line.
        OSError: If it cannot be read.
    """
    content = read_regular(file)
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


def read_yaml(file: Path) -> Any:
    """Read a YAML file of plain values; aliases, a few of which can stand for gigabytes, are refused.

    Raises:
        ValueError: If it is no such file.
        OSError: If it cannot be read.
    """
    try:
        text = file.read_text(encoding="utf-8")
        if "*" in text and any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise ValueError("it has aliases; write out what they stand for")
        return yaml.safe_load(text)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # PyYAML's constructors raise nearly any type
        raise ValueError(one_line(error)) from error


@contextlib.contextmanager
def alone_in(folder: Path, holder: str, remedy: str) -> Iterator[None]:
    """Hold a folder during the block, or refuse at once if another process does; the lock ends with its holder.

    Of the processes of one run the first one alone must ask.

    Args:
        folder: Is there already.
        holder: Who else would hold it, such as "another run".
        remedy: What to do about it, besides waiting.

    Raises:
        UserError: If another process holds it.
    """
    import filelock

    lock = filelock.FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise UserError(f"{folder}: {holder} is at work there; wait for it, or {remedy}") from None
    try:
        yield
    finally:
        lock.release()
