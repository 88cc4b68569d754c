"""A folder for one process at a time, by a lock that ends with its holder, however that ends.

The lock is the system's (flock) on ``FOLDER/.lock``. The file itself stays and means nothing; what it says, the
holder's process and machine, is for messages. On disks without such locks (some network mounts; Windows) there is
none, and two commands that fill one folder are not kept apart: see docs/reliability.md.
"""

import contextlib
import functools
import os
import platform
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from metilr.errors import UserError

LOCK = ".lock"
_held: set[IO[bytes]] = set()  # by this process


@contextlib.contextmanager
def alone_in(folder: Path, holder: str, remedy: str) -> Iterator[None]:
    """Hold a folder during the block, or refuse at once if another process does.

    Processes forked in the block do not hold it: a loader's workers outlive a killed parent by some seconds. Of the
    processes of one run the first one alone must ask.

    Args:
        folder: Is there already.
        holder: Who else would hold it, such as "another run".
        remedy: What to do about it, besides waiting.

    Raises:
        UserError: If another process holds it, which the message names, or something else has the name of its file.
        OSError: If the lock's file cannot be made.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with _own_file(folder / LOCK) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: {holder} is at work there{_named(file)}; wait for it, or {remedy}") from None
        except OSError:  # a disk without locks
            pass
        _close_in_forks()
        _held.add(file)
        try:
            with contextlib.suppress(OSError):  # a full disk, say: the lock holds all the same
                file.truncate(0)
                file.write(f"process {os.getpid()} on {platform.node()}\n".encode())
            yield
        finally:
            _held.discard(file)


def _own_file(place: Path) -> IO[bytes]:
    """Open the lock's file, which is emptied and written: never another file under its name."""
    try:
        descriptor = os.open(place, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if place.is_symlink():
            raise UserError(f"{place}: is a link, which no command of metilr's makes; delete it") from None
        raise error
    file = os.fdopen(descriptor, "ab+", buffering=0)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        file.close()
        raise UserError(f"{place}: is another file under the name of a lock; delete it")
    return file


def _named(file: IO[bytes]) -> str:
    file.seek(0)
    name = " ".join(file.read(200).decode(errors="replace").split())
    return f" ({name})" if name else ""


@functools.cache  # once a process
def _close_in_forks() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_let_go)


def _let_go() -> None:
    for file in _held:
        file.close()  # the parent's stays open, and with it the lock
    _held.clear()
