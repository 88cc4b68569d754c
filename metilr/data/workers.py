"""Decoding processes: how many there are, and who answers signals."""

import os
import signal


def default_workers(n_processes: int) -> int:
    """Decoding processes beside each of so many processes: the cores, at most 8."""
    return max(1, min(8, _usable_cores() // n_processes))


def leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach the whole group; workers end when their parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _usable_cores() -> int:
    """Cores that this process may use, which a container or a scheduler can have limited."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
