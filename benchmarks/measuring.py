"""What the benchmarks share: peak memory, and the table with its JSON line."""

import json
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


class PeakMemory:
    """Largest anonymous memory (RssAnon: mapped files do not count) of a process while the block runs, on Linux.

    Args:
        pid: Of the process; None: this one.
    """

    def __init__(self, pid: int | None = None) -> None:
        self.status = Path(f"/proc/{pid or 'self'}/status")
        self.at_start = self.bytes = anonymous_bytes(self.status)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def added(self) -> int:
        """Bytes beyond those at the start."""
        return self.bytes - self.at_start

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.bytes = max(self.bytes, anonymous_bytes(self.status))


def anonymous_bytes(status: Path = Path("/proc/self/status")) -> int:
    """Anonymous memory of a process now; 0 when it is gone."""
    try:
        line = next(line for line in status.read_text().splitlines() if line.startswith("RssAnon"))
    except (OSError, StopIteration):
        return 0
    return int(line.split()[1]) * 1024


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def __call__(self) -> float:
        """Read it."""
        return time.perf_counter() - self.start


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], record: Mapping[str, Any]) -> None:
    """Print a table for people and a JSON line for programs."""
    table = Table(title=title, title_justify="left", box=None)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*(f"{value:,.4g}" if isinstance(value, float) else str(value) for value in row))
    Console(highlight=False, width=140).print(table)
    print(json.dumps({"benchmark": title, **record}), flush=True)
