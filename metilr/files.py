"""Files that appear whole or not at all, folders for one process at a time; what others wrote, read within limits."""

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import stat
import uuid
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import yaml

from metilr.errors import UserError, one_line, shown

LOCK = ".lock"
CHUNK = 1 << 20  # bytes hashed at a time


def regular(file: Path) -> Path:
    """The file, to be read; ValueError if it is a folder, a pipe, which would be waited for, or a device."""
    if not stat.S_ISREG(file.stat().st_mode):
        raise ValueError("not a regular file")
    return file


def file_sha256(path: Path, report: Callable[[int], None] = lambda done: None) -> str:
    """Return a file's sha256 as 64 hexadecimal digits; ``report`` is called with the bytes read so far."""
    digest = hashlib.sha256()
    with regular(path).open("rb") as file:
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


def replaced_file(file: Path) -> contextlib.AbstractContextManager[IO[bytes]]:
    """Open a file to write that takes the old one's place when the block ends well, on disk by then.

    Raises:
        OSError: If it cannot be written; names it.
    """
    return _beside(file, Path.replace)


def new_file(file: Path) -> contextlib.AbstractContextManager[IO[bytes]]:
    """Open a file to write that gets its name when the block ends well, and never takes another file's place.

    Raises:
        FileExistsError: At the block's end, if somebody else has put a file there.
    """
    return _beside(file, _link)


@contextlib.contextmanager
def _beside(file: Path, put: Callable[[Path, Path], object]) -> Iterator[IO[bytes]]:
    """Open a file beside another, and ``put`` it in its place when the block ends well."""
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        with named(file), temporary.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        put(temporary, file)
    except OSError as error:
        if error.filename == str(temporary):  # a name that the user has never seen
            error.filename, error.filename2 = str(file), None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _link(temporary: Path, file: Path) -> None:
    try:
        os.link(temporary, file)
    except FileExistsError:
        raise
    except (OSError, AttributeError):  # no hard links here: claim the name, then replace what is ours
        file.open("xb").close()
        temporary.replace(file)


def write_picture(file: Path, save: Callable[[IO[bytes]], object]) -> None:
    """Write a picture whole or not at all: by way of memory, since encoders overlook that a disk is full."""
    content = io.BytesIO()
    save(content)
    with replaced_file(file) as stream:
        stream.write(content.getbuffer())


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
        return np.load(regular(file), mmap_mode="r", allow_pickle=False)
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
    if hasattr(os, "posix_fallocate"):
        with file.open("r+b") as stream:
            try:
                os.posix_fallocate(stream.fileno(), 0, file.stat().st_size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # the file system cannot promise space
                    raise


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
    if not zipfile.is_zipfile(regular(file)):
        raise ValueError("not a .npz file")
    refuse_compressed(file)
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def read_json(file: Path) -> Any:
    """Read a file as ``parse_json`` does; ValueError too if it is no regular file."""
    return parse_json(regular(file).read_bytes())


def parse_json(content: bytes) -> Any:
    """What JSON says; ValueError if it is no JSON, is nested too deep, or an object has a key twice."""
    try:
        return json.loads(content, object_pairs_hook=_without_repeats)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
        raise ValueError(f"an object has the key {shown(twice)} twice: {shown(content)}")
    return content


def read_yaml(file: Path) -> Any:
    """Read a YAML file of plain values; aliases, a few of which can stand for gigabytes, and repeated keys are refused.

    Raises:
        ValueError: If it is no such file.
        OSError: If it cannot be read.
    """
    try:
        text = regular(file).read_text(encoding="utf-8")
        if "*" in text and any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise ValueError("it has aliases; write out what they stand for")
        return yaml.load(text, _StrictLoader)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # PyYAML's constructors raise nearly any type
        raise ValueError(one_line(error)) from error


class _StrictLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [str(key.value) for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise ValueError(f"it has the key {shown(twice[0])} twice; remove one")
        return super().construct_mapping(node, deep)


def check_config(file: str) -> Mapping[str, Any]:
    """Read a YAML file of options, or refuse it."""
    try:
        content = read_yaml(Path(file))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file", "config") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as YAML ({one_line(error)})", "config") from None
    if not isinstance(content, dict) or "config" in content:
        raise UserError(f"{file}: must hold options, one a line, each as NAME: VALUE, and config none", "config")
    return content


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
