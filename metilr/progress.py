"""Progress of long work: bars on a terminal, a line a minute in a log; and text from strangers on its way there."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text


def printable(text: str) -> str:
    """Text without what steers a terminal or is no text."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


T = TypeVar("T")
EVERY = 60  # seconds between lines in a log
LOG_WIDTH = 200  # of tables there


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        rate = task.finished_speed or task.speed
        return Text("" if rate is None else f"{rate:,.1f} {self.unit}/s")


def make_console(quiet: bool = False) -> Console:
    """Where a command says what it does; in a log no line is broken, whatever a terminal's width would be."""
    is_log = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(highlight=False, quiet=quiet, soft_wrap=True, width=LOG_WIDTH if is_log else None)


class MinuteLines:
    """What a log says of long work: how far it is, how fast and how long it still takes, a line a minute.

    On a terminal, where a bar says so, and where ``quiet``, it says nothing.
    """

    def __init__(self, description: str, total: int, unit: str, quiet: bool = False) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.is_silent = quiet or sys.stdout.isatty()
        self.completed, self.started = 0, time.monotonic()
        self.said = self.started

    def advance(self, n: int) -> None:
        """Count units done, and say so if a minute has passed."""
        self.completed += n
        now = time.monotonic()
        if self.is_silent or now - self.said < EVERY or not self.completed:
            return
        self.said, rate = now, self.completed / (now - self.started)
        left = timedelta(seconds=round(max(0, self.total - self.completed) / rate))
        done = f"{self.completed:,} of {self.total:,} {self.unit}"
        speed = f"{rate:,.1f} a second" if rate >= 0.1 else f"{1 / rate:,.0f} s each"
        print(f"{self.description}: {done}, {speed}, {left} left", flush=True)


def byte_progress(quiet: bool = False, console: Console | None = None) -> Progress:
    """Bars of files, in bytes, on a terminal: what is done, the rate and the time left; they disappear at their end."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, TimeRemainingColumn(), transient=True, disable=quiet, console=console)


@contextlib.contextmanager
def counted(description: str, total: int, unit: str, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """Show a bar, or lines, while the block runs; it is given what to call with each number of units done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(unit), TimeRemainingColumn())
    lines = MinuteLines(description, total, unit, quiet)
    with Progress(*columns, transient=True, disable=quiet or not sys.stdout.isatty()) as progress:
        task = progress.add_task(description, total=total)

        def done(n: int) -> None:
            progress.advance(task, n)
            lines.advance(n)

        yield done


def tracked(items: Iterable[T], description: str, total: int, unit: str, quiet: bool = False) -> Iterator[T]:
    """Pass items on, one unit each, under a bar."""
    with counted(description, total, unit, quiet) as done:
        for item in items:
            yield item
            done(1)
