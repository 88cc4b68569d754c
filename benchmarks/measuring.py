"""What the benchmarks share: peak memory, and the table with its JSON line."""

import json
import os
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
        with_children: Add the processes that descend from it, and memory that they share; what several hold counts
            once. A look then takes up to 0.03 s a GB.
    """

    _WAITING = 50  # times as long as the last look took: what is timed beside loses 2% of a core at most

    def __init__(self, pid: int | None = None, with_children: bool = False) -> None:
        self.pid = pid or os.getpid()
        self.with_children = with_children
        self.at_start = self.bytes = self._now()
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
        seconds = 0.0
        while not self._done.wait(max(0.01, self._WAITING * seconds)):
            clock = Clock()
            self.bytes = max(self.bytes, self._now())
            seconds = clock()

    def _now(self) -> int:
        if self.with_children:
            return anonymous_and_shared([self.pid, *descendants(self.pid)])
        return 1024 * numbers(Path(f"/proc/{self.pid}/status")).get("RssAnon", 0)


def anonymous_and_shared(pids: Sequence[int]) -> int:
    """Bytes of anonymous and shared memory of processes now; what several of them share counts once (Pss)."""
    each_process = [numbers(Path(f"/proc/{pid}/smaps_rollup")) for pid in pids]
    return 1024 * sum(each.get("Pss_Anon", 0) + each.get("Pss_Shmem", 0) for each in each_process)


def descendants(pid: int) -> list[int]:
    """Processes that a process started, and those that these started."""
    found: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in file.read_text().split()]
        except OSError:
            continue
        found += [each for child in children for each in (child, *descendants(child))]
    return found


def numbers(file: Path) -> Mapping[str, int]:
    """First numbers of the lines ``name: number ...``; none when the process is gone."""
    try:
        lines = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


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
