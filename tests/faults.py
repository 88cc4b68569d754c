"""A fault at the n-th operation of a process: it is killed, or the disk fails."""

import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from metilr.extraction.store import RowWriter
from metilr.models import checkpoints

PATH_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link")  # of Python's audit hooks
KILL = "kill"


class Operations:
    """Counts what this process does to the files below a folder, and optimizer steps; meets the fault at one of them.

    Args:
        folder: Other files do not count.
        log: Gets a line for each operation.
        at: Number of the operation to fail, from 0; None: none fails.
        fault: ``"kill"``, or an error's name such as ``"EIO"``, which a disk gives from then on (``lasting``) or once.
        lasting: Whether what follows fails as well, as on a disk that is gone.
    """

    def __init__(self, folder: Path, log: Path, at: int | None, fault: str, lasting: bool = False) -> None:
        self.folder, self.at, self.fault, self.lasting = str(folder), at, fault, lasting
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.n = 0

    def meet(self, name: str, path: object, tear: Callable[[], object] = lambda: None) -> None:
        """Count an operation; if it is the one, leave it torn and fail."""
        text = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
        if text and not str(Path(text).absolute()).startswith(self.folder):
            return
        number, self.n = self.n, self.n + 1
        os.write(self.log, f"{name} {Path(text).name}\n".encode())
        is_due = self.at is not None and (number == self.at or (self.lasting and number > self.at))
        if is_due and self.fault == KILL:
            tear()
            os.kill(os.getpid(), signal.SIGKILL)
        if is_due and name != "step":
            code = getattr(errno, self.fault)
            raise OSError(code, os.strerror(code), *([text] if text else []))

    def install(self) -> None:
        """Watch this process until it ends."""

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            if event in PATH_EVENTS and not isinstance(arguments[0], int):
                self.meet(event.removeprefix("os."), arguments[0])

        fsync, allocate, put, save = os.fsync, os.posix_fallocate, RowWriter._put, torch.save

        def met_fsync(descriptor: int) -> None:
            self.meet("fsync", Path(f"/proc/self/fd/{descriptor}").readlink())
            fsync(descriptor)

        def met_allocate(descriptor: int, offset: int, length: int) -> None:
            self.meet("allocate", Path(f"/proc/self/fd/{descriptor}").readlink())
            allocate(descriptor, offset, length)

        def met_put(writer: RowWriter, name: str, row: int, content: bytes) -> None:
            file = writer._files[name]

            def tear() -> None:
                file.seek(writer._offsets[name] + row * len(content))
                file.write(content[: len(content) // 2])

            self.meet("row", file.name, tear)
            put(writer, name, row, content)

        def met_save(checkpoint: Any, stream: Any) -> None:
            self.meet("save", stream.name, lambda: (stream.write(b"half of a checkpoint"), stream.flush()))
            save(checkpoint, stream)

        os.fsync, os.posix_fallocate, RowWriter._put = met_fsync, met_allocate, met_put
        checkpoints.torch.save = met_save
        register_optimizer_step_pre_hook(lambda *_: self.meet("step", ""))
        sys.addaudithook(audit)
