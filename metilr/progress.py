"""Progress of long work on a terminal, and text from strangers on its way to one."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
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


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        rate = task.finished_speed or task.speed
        return Text("" if rate is None else f"{rate:,.1f} {self.unit}/s")


def progress_bar(unit: str, quiet: bool = False) -> Progress:
    """A bar with what is done, units per second and time left; it disappears when it ends."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(unit), TimeRemainingColumn())
    return Progress(*columns, transient=True, disable=quiet)


def byte_progress(quiet: bool = False, console: Console | None = None) -> Progress:
    """Bars of files, in bytes: what is done, the rate and the time left; they disappear when they end."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, TimeRemainingColumn(), transient=True, disable=quiet, console=console)


@contextlib.contextmanager
def counted(description: str, total: int, unit: str, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """Show a bar while the block runs; it is given what to call with each number of units done."""
    with progress_bar(unit, quiet) as progress:
        task = progress.add_task(description, total=total)
        yield lambda n: progress.advance(task, n)


def tracked(items: Iterable[T], description: str, total: int, unit: str, quiet: bool = False) -> Iterator[T]:
    """Pass items on, one unit each, under a bar."""
    with counted(description, total, unit, quiet) as done:
        for item in items:
            yield item
            done(1)
