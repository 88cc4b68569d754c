"""Processes: which one this is, how several fail and gather together, and the workers that decode."""

import contextlib
import functools
import logging
import multiprocessing.queues
import os
import re
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metilr.errors import UserError, one_line

if TYPE_CHECKING:  # seconds to import, and a command's --help needs none of it
    import pytorch_lightning as pl
    from torch import Tensor

POOL = threading.Lock()


def has_launcher() -> bool:
    """Whether torchrun or SLURM has started one process per device already (not in an interactive SLURM job)."""
    in_slurm = "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")
    return "TORCHELASTIC_RUN_ID" in os.environ or in_slurm


def launched_as_first() -> bool:
    """Whether this process speaks for all: true unless a launcher started it as another than the first."""
    rank = "RANK" if "TORCHELASTIC_RUN_ID" in os.environ else "SLURM_PROCID"
    return not has_launcher() or os.environ[rank] == "0"


def is_first_process() -> bool:
    """Whether this process speaks for all, those that Lightning itself starts included."""
    from lightning_utilities.core import rank_zero

    return int(getattr(rank_zero.rank_zero_only, "rank", 0) or 0) == 0


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Schedulers stop a run with SIGTERM: let it end as by Ctrl-C, instead of in Lightning's own handler."""
    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def process_as_before() -> Iterator[None]:
    """Take back what Lightning's trainer leaves in a process, which may go on to another command.

    That is: who it is among others, PyTorch's settings and threads, and Ctrl-C, which works once only.
    """
    import torch
    from lightning_utilities.core import rank_zero

    only: Any = rank_zero.rank_zero_only
    variables, rank, n_threads = dict(os.environ), getattr(only, "rank", None), torch.get_num_threads()
    benchmark, deterministic = torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(variables)
        if rank is not None:  # else Lightning was not imported yet, and says it once for all
            only.rank = rank
        torch.backends.cudnn.benchmark = benchmark
        torch.use_deterministic_algorithms(deterministic)
        torch.set_num_threads(n_threads)
        if threading.current_thread() is threading.main_thread():  # only that one may set handlers
            signal.signal(signal.SIGINT, interrupt)


UNGUARDED = 64  # exit status of a process that was to describe images, and ran its parent's script


def end_if_unguarded() -> None:
    """End a process that another one has started to work for it, and that runs the other's script from its top."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # as multiprocessing itself asks
        sys.exit(UNGUARDED)


CONTINUE = "finished work is kept, run the same command to continue"
_GONE = r"Connection closed by peer|Connection reset by peer|Broken pipe|Connection refused|remote process exit"
# PyTorch's words on GPUs and CPUs, oneDNN's, NumPy's, Python's and the loader's of libraries.
_NO_MEMORY = (
    r"OutOfMemory|out of memory|llocate memory|not enough memory|Unable to allocate|MemoryError|ALLOC_FAILED|"
    r"failed to map segment|can't start new thread"
)
PARENT_WATCHED_EVERY = 2.0  # seconds
PARENT_VARIABLE = "METILR_PARENT"  # tells a command the process that it is to end with


@contextlib.contextmanager
def faults_in_one_line(less_memory: str | None = None) -> Iterator[None]:
    """Turn an error of another process of this run, which PyTorch hands over as a traceback's text, into a user's.

    That is one of a user there, a failing disk, or its end. ``less_memory`` is what to take where memory does not
    suffice, here or there; without it that error is left as it is.
    """
    try:
        yield
    except Exception as error:
        reason = _reason_in(error)
        if reason is None and less_memory and is_lack_of_memory(error):
            reason = f"memory does not suffice ({one_line(error)}): take {less_memory}; {CONTINUE}"
        if reason is None:
            raise
        raise UserError(reason) from None


def is_lack_of_memory(error: Exception) -> bool:
    """Whether an error, here or in another process's traceback, says that memory does not suffice."""
    return isinstance(error, MemoryError) or re.search(_NO_MEMORY, str(error)) is not None


def _reason_in(error: Exception) -> str | None:
    """The last error in another process's traceback that the user can mend; None if there is none."""
    if getattr(error, "exit_code", None) == UNGUARDED:
        guard = 'put what it does below if __name__ == "__main__":'
        return f"several devices: each of their processes runs your script from its top; {guard}"
    text = str(error)
    if of_users := re.findall(r"^metilr\.\S*Error: (.*)$", text, flags=re.MULTILINE):
        return str(of_users[-1])
    if of_disks := re.findall(r"^\w+Error: \[Errno \d+\] (.*)$", text, flags=re.MULTILINE):
        return f"{of_disks[-1]}; {CONTINUE}"
    if worker := re.search(r"DataLoader worker \(pid(?:\(s\))? [\d, ]+\) (?:is )?(.*)", text):
        how, remedy = worker[1].rstrip(". "), f"Then take fewer num_workers; {CONTINUE}"
        return f"a decoding process was ended ({how}); was memory short, or shared memory (/dev/shm)? {remedy}"
    is_gone = type(error).__name__ == "ProcessExitedException"  # of torch.multiprocessing
    was_cut = isinstance(error, EOFError)  # of a decoding process that ended while its images were on their way
    if not isinstance(error, UserError) and (is_gone or was_cut or re.search(_GONE, text)):
        how = f" ({error})" if is_gone else ""
        return f"a process of this run was ended from outside{how}; was memory short? {CONTINUE.capitalize()}"
    return None


def end_with_parent(parent: int | None = None) -> None:
    """End this process soon after the one that started it, of that number if given, whatever it waits for.

    Else it might hold a GPU for hours, waiting in a collective for a process that was killed.
    """
    parent = parent or os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_WATCHED_EVERY)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()


@contextlib.contextmanager
def agree(trainer: "pl.Trainer") -> Iterator[None]:
    """Let a user's mistake or a disk's fault that one process meets in the block end all of them, in the same words.

    Without it the others would wait in their next collective for a process that is gone.
    """
    failed: tuple[str, str | None] | None = None
    try:
        with faults_in_one_line():
            yield
    except UserError as error:
        failed = error.message, error.parameter
    except OSError as error:
        failed = f"{error.filename or 'disk'}: {error.strerror}", None
    all_failed: list[tuple[str, str | None] | None] = [failed]
    if trainer.world_size > 1:
        from torch import distributed

        all_failed = [None] * trainer.world_size
        distributed.all_gather_object(all_failed, failed)
    for first in filter(None, all_failed):
        raise UserError(*first)


def hidden(trainer: "pl.Trainer") -> bool | None:
    """What tqdm's ``disable`` takes: a bar in the first process, and there on a terminal alone."""
    return None if trainer.is_global_zero else True


HINTS = (
    "does not have many workers", "persistent_workers=True",  # there is one pass
    "infer the batch indices",  # batches carry their rows themselves
    "module\\(s\\) in eval mode at the start of training",  # as it should be
    "Checkpoint directory .* exists and is not empty", "lr_scheduler.step",
    "does not have a `val_dataloader`", "You defined a `validation_step`", "TensorFloat32",
    "sync_dist=True",  # the logged values are the same in all processes
    "`isinstance\\(treespec, LeafSpec\\)` is deprecated", "all_gather is deprecated",
)  # fmt: skip


def quieten_lightning() -> None:
    """Keep hints out of this process's terminal."""
    for module in ("pytorch_lightning.utilities.rank_zero", "lightning_fabric.utilities.rank_zero",
                   "pytorch_lightning.trainer.connectors.signal_connector"):  # fmt: skip
        logging.getLogger(module).setLevel(logging.WARNING)
    for hint in HINTS:
        warnings.filterwarnings("ignore", message=f".*{hint}")


@contextlib.contextmanager
def pool_of(n_threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads for what is one thread's work each, PyTorch's too; of several callers one has them at a time.

    They are kept, since malloc keeps memory for each thread that ever was.
    """
    import torch

    with POOL:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield _threads(n_threads)
        except BaseException:  # the next caller must not meet what this one has left
            _threads(n_threads).shutdown(cancel_futures=True)
            _threads.cache_clear()
            raise
        finally:
            torch.set_num_threads(before)


@functools.cache
def _threads(n: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n)


if hasattr(os, "register_at_fork"):  # a forked process has none of them
    os.register_at_fork(after_in_child=_threads.cache_clear)


def default_workers(n_processes: int) -> int:
    """Decoding processes beside each of so many processes: the cores that this one may use, at most 8."""
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, n_cores // n_processes))


def start_worker(worker: int) -> None:
    """What a decoding process does first, as a DataLoader's ``worker_init_fn``.

    Ctrl-C reaches the whole group, and workers end when their parent does. SIGTERM, of a scheduler or of the parent,
    ends them without a complaint. One that cannot pass its batch on says so: its parent would wait for ever. Where
    shared memory is short, as in a container, batches go through pipes, which takes up to three times as long.
    """
    import cv2
    import torch

    cv2.setNumThreads(0)  # in this one; 1 would wait, after a fork, for threads that it has not got
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    multiprocessing.queues.Queue._on_queue_feeder_error = _tell_parent  # type: ignore[attr-defined]
    if free_shared_memory() < LEAST_SHARED_MEMORY:
        ForkingPickler.register(torch.Tensor, _copied)


LEAST_SHARED_MEMORY = 2**30  # bytes; Docker gives a container 64 MB


def free_shared_memory() -> int:
    """Bytes that processes can still share tensors in; as many as one likes where there is no /dev/shm."""
    return shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else sys.maxsize


def _copied(tensor: "Tensor") -> tuple[Callable[..., Any], tuple[Any, ...]]:
    import torch

    return torch.from_numpy, (tensor.numpy(),)


def _tell_parent(queue: Any, error: Exception, item: Any) -> None:
    """Send, in place of a batch that the queue could not take, what a DataLoader raises in the parent."""
    from torch._utils import ExceptionWrapper

    remedy = "is shared memory (/dev/shm) full? Then take fewer num_workers"
    try:
        raise UserError(f"a decoding process cannot pass its images on ({one_line(error)}): {remedy}; {CONTINUE}")
    except UserError:  # its traceback goes along
        queue.put((item[0], ExceptionWrapper()))
