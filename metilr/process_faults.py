"""What PyTorch says when one of several processes fails or dies, in one line that a user can act on."""

import contextlib
import os
import re
import threading
import time
from collections.abc import Iterator

from torch.multiprocessing.spawn import ProcessExitedException

from metilr.errors import UserError, one_line

CONTINUE = "finished work is kept, run the same command to continue"
_GONE = r"Connection closed by peer|Connection reset by peer|Broken pipe|Connection refused|remote process exit"
# PyTorch's words on GPUs and CPUs, oneDNN's, NumPy's and Python's.
_NO_MEMORY = r"OutOfMemory|out of memory|llocate memory|not enough memory|Unable to allocate|MemoryError"
PARENT_WATCHED_EVERY = 2.0  # seconds


@contextlib.contextmanager
def faults_in_one_line(less_memory: str | None = None) -> Iterator[None]:
    """Turn an error of another process of this run, which arrives as a traceback in a text, into a user's.

    Args:
        less_memory: What to take where memory does not suffice, here or there; None leaves that error as it is.

    Raises:
        UserError: If a process was killed, or met a bad image, a failing disk, too little memory or another user's
            error.
    """
    try:
        yield
    except Exception as error:
        reason = _reason_in(error)
        if reason is None and less_memory and (isinstance(error, MemoryError) or re.search(_NO_MEMORY, str(error))):
            reason = f"memory does not suffice ({one_line(error)}): take {less_memory}; {CONTINUE}"
        if reason is None or (isinstance(error, UserError) and reason == str(error)):
            raise
        raise UserError(reason) from None


def end_with_parent() -> None:
    """End this process soon after the one that started it, whatever it waits for.

    Else it might hold a GPU for hours, waiting in a collective for a process that was killed.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_WATCHED_EVERY)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()


def _reason_in(error: Exception) -> str | None:
    """The last error in a text that the user can mend; None if there is none."""
    text = str(error)
    of_users = re.findall(r"^metilr\.\S*Error: (.*)$", text, flags=re.MULTILINE)
    if of_users:
        return str(of_users[-1])
    if isinstance(error, UserError):
        return text
    of_disks = re.findall(r"^\w+Error: \[Errno \d+\] (.*)$", text, flags=re.MULTILINE)
    if of_disks:
        return f"{of_disks[-1]}; {CONTINUE}"
    worker = re.search(r"DataLoader worker \(pid(?:\(s\))? [\d, ]+\) (.*)", text)
    if worker:
        how = re.sub(r"^is ", "was ", worker[1]).rstrip(". ")
        return f"a decoding process {how}; was memory short? Then take fewer --num_workers; {CONTINUE}"
    if isinstance(error, ProcessExitedException) or re.search(_GONE, text):
        how = f" ({error})" if isinstance(error, ProcessExitedException) else ""
        return f"a process of this run was ended from outside{how}; was memory short? {CONTINUE.capitalize()}"
    return None
