"""What no hostile file may do: run code, write elsewhere, take memory or time, or fail in another way than said."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from metilr.errors import UserError

SECONDS = 20  # of processor time for one case: a machine that is busy or asleep is no hang
ROOM = 1 << 30  # bytes of address space beyond what the process has already
STARTS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "shutil.rmtree")
WRITES = ("os.rename", "os.link", "os.symlink", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod")

_folder = Path()  # of the test: where its cases may write
_is_on = False  # while a case runs
_broken: list[str] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if not _is_on:
        return
    if event in STARTS:
        _broken.append(f"{event} {arguments[:2]}")
    elif event == "open" and isinstance(arguments[0], (str, bytes)) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        _check_place(event, arguments[0])
    elif event in WRITES:
        for name in arguments[: 2 if event in ("os.rename", "os.link", "os.symlink") else 1]:
            _check_place(event, name)


def _check_place(event: str, name: Any) -> None:
    place = Path(os.fsdecode(name)).resolve()
    if place != _folder and _folder not in place.parents and str(place) != os.devnull:
        _broken.append(f"{event} {place}")


sys.addaudithook(_watch)


class Hang(BaseException):
    """A case took too long."""


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Watch the cases of a test: they may write into a folder, and nothing else."""
    global _folder
    before = signal.signal(signal.SIGPROF, _stop)
    _broken.clear()
    try:
        _folder = folder.resolve()
        with _little_memory(), mock.patch.object(sys, "dont_write_bytecode", True):  # of what a case imports first
            yield
    finally:
        signal.signal(signal.SIGPROF, before)
    assert not _broken, _broken[:3]


@contextlib.contextmanager
def refusal(file: Path | str) -> Iterator[list[str]]:
    """Run one case; it may end in a ``UserError`` of one line that names the file.

    Yields:
        A list that holds the message afterwards, if there is one.
    """
    global _is_on
    said: list[str] = []
    _is_on = True
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield said
    except UserError as error:
        said.append(str(error))
        assert str(file) in said[0], said[0]
        assert "\n" not in said[0] and len(said[0]) < 1500, said[0]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        _is_on = False


def _stop(*_: object) -> None:
    raise Hang


@contextlib.contextmanager
def _little_memory() -> Iterator[None]:
    """Have whatever asks for gigabytes end in a ``MemoryError``, which no reader may raise."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):  # not on Linux: the other guards remain
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
