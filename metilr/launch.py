"""Which process this is: the only one, or one of several that torchrun or SLURM started."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_utilities.core import rank_zero


def has_launcher() -> bool:
    """Whether a launcher has started one process per device already."""
    return bool(TorchElasticEnvironment.detect() or SLURMEnvironment.detect())


def launched_as_first() -> bool:
    """Whether this process speaks for all: true unless a launcher started it as another than the first."""
    if TorchElasticEnvironment.detect():
        return os.environ["RANK"] == "0"
    return not SLURMEnvironment.detect() or os.environ["SLURM_PROCID"] == "0"


def is_first_process() -> bool:
    """Whether this process speaks for all, those that Lightning itself starts included."""
    only: Any = rank_zero.rank_zero_only
    return int(getattr(only, "rank", 0) or 0) == 0


@contextlib.contextmanager
def process_as_before() -> Iterator[None]:
    """Take back what Lightning's trainer leaves in a process, which may go on to another command.

    Variables that tell started processes who they are, the rank, PyTorch's settings and number of threads, and Ctrl-C,
    which Lightning switches off once it was pressed.
    """
    only: Any = rank_zero.rank_zero_only
    variables, rank, n_threads = dict(os.environ), getattr(only, "rank", None), torch.get_num_threads()
    benchmark, deterministic = torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(variables)
        only.rank = rank
        torch.backends.cudnn.benchmark = benchmark
        torch.use_deterministic_algorithms(deterministic)
        torch.set_num_threads(n_threads)
        if threading.current_thread() is threading.main_thread():  # only that one may set handlers
            signal.signal(signal.SIGINT, interrupt)
