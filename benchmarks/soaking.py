"""A long command watched from outside: its memory, open files and threads over its progress, and killed on the way."""

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from measuring import anonymous_and_shared, descendants, numbers, show

SECONDS_BETWEEN = 1.0
WARM_UP = 0.2  # share of all images after an attempt's first
LEAST_SAMPLES = 30  # below that a slope is noise
# By attribute of Sample: what it is in which unit, the limit of its growth over a whole run, and the unit's size.
LIMITS = {
    "command_bytes": ("anonymous memory of the command, MB", 50.0, 1e6),
    "all_bytes": ("memory of the command and its workers, MB", 50.0, 1e6),
    "files": ("open files", 4.0, 1),
    "threads": ("threads", 0.5, 1),
}


@dataclass(frozen=True)
class Sample:
    """What a command and the processes that it started hold at a moment.

    Attributes:
        seconds: Since the command's start.
        done: Images described so far.
        command_bytes: Anonymous memory of the command (RssAnon; mapped files do not count).
        all_bytes: Anonymous and shared memory of all its processes; what several share counts once (Pss).
        files: Open files of all.
        threads: Of all.
        processes: How many there are.
    """

    seconds: float
    done: int
    command_bytes: int
    all_bytes: int
    files: int
    threads: int
    processes: int


@dataclass
class Attempt:
    """One life of the command.

    Attributes:
        samples: In time.
        status: Exit status; -9 if it was killed.
    """

    samples: list[Sample] = field(default_factory=list)
    status: int = 0

    @property
    def at_work(self) -> list[Sample]:
        """Samples between its first progress and its last."""
        done = [sample.done for sample in self.samples]
        return [s for s in self.samples if done[0] < s.done < done[-1]]


@dataclass(frozen=True)
class Growth:
    """How much a quantity grows over a whole run.

    Attributes:
        fitted: By the least-squares slope over the progress after the warm-up, extrapolated to the whole run.
        tenths: Median of the last tenth of the progress minus median of the first tenth after the warm-up.
        level: Median after the warm-up.
    """

    fitted: float
    tenths: float
    level: float


def attempt(command: Sequence[str], log: Path, progress: Callable[[], int], kill_at: int | None) -> Attempt:
    """Run a command to its end, or until it has got so far, and then ``kill -9`` it.

    Args:
        command: What to run.
        log: Gets its output.
        progress: Tells from outside how far it has got.
        kill_at: Progress at which it is killed; None: it is not.
    """
    lived, start = Attempt(), time.perf_counter()
    with log.open("a") as stream, subprocess.Popen(command, stdout=stream, stderr=stream) as process:
        while process.poll() is None:
            taken = sample(process.pid, time.perf_counter() - start, progress())
            lived.samples.append(taken)
            if kill_at is not None and taken.done >= kill_at:
                process.kill()
                break
            time.sleep(SECONDS_BETWEEN)
    lived.status = process.returncode
    return lived


def sample(pid: int, seconds: float, done: int) -> Sample:
    """Look at a process and all that descend from it."""
    pids = [pid, *descendants(pid)]
    status = [numbers(Path(f"/proc/{each}/status")) for each in pids]
    return Sample(
        seconds=seconds,
        done=done,
        command_bytes=1024 * status[0].get("RssAnon", 0),
        all_bytes=anonymous_and_shared(pids),
        files=sum(_n_open(each) for each in pids),
        threads=sum(each.get("Threads", 0) for each in status),
        processes=len(pids),
    )


def growth(samples: Sequence[Sample], values: Sequence[float], n_images: int) -> Growth | None:
    """Fit a quantity of an attempt over its images; None if there are too few samples for it.

    Args:
        samples: While the command was at work, ``Attempt.at_work``.
        values: Of each.
        n_images: Of a whole run.
    """
    done = np.array([each.done for each in samples], dtype=float)
    after = done >= (done[0] if len(done) else 0) + WARM_UP * n_images
    x, y = done[after], np.array(values, dtype=float)[after]
    if len(x) < LEAST_SAMPLES or x[0] == x[-1]:
        return None
    tenth = (x[-1] - x[0]) / 10
    slope = np.polyfit(x, y, 1)[0]
    tenths = np.median(y[x >= x[-1] - tenth]) - np.median(y[x <= x[0] + tenth])
    return Growth(float(slope * n_images), float(tenths), float(np.median(y)))


def report(title: str, n_images: int, attempts: Sequence[Attempt], faults: Sequence[str], plot: Path | None) -> int:
    """Print what grew, judged in the longest attempt, and what is wrong besides.

    Returns:
        The exit status: 1 if something grew beyond its limit or is wrong.
    """
    judged = max(attempts, key=lambda lived: lived.at_work[-1].done - lived.at_work[0].done if lived.at_work else 0)
    rows, record, faults = [], {}, list(faults)
    for name, (what, limit, factor) in LIMITS.items():
        grown = growth(judged.at_work, [getattr(each, name) / factor for each in judged.at_work], n_images)
        if grown is None:
            rows.append([what, "", "", "", limit, "too short a run to tell"])
            record[name] = None
            continue
        flat = max(grown.fitted, grown.tenths) <= limit
        rows.append([what, grown.level, grown.fitted, grown.tenths, limit, "flat" if flat else "GROWS"])
        record[name] = {**asdict(grown), "limit": limit, "flat": flat}
        if not flat:
            faults.append(f"{what} grows")
    samples = [each for lived in attempts for each in lived.samples]
    lives = [lived.samples[-1].seconds for lived in attempts]
    show(
        f"{title}: {n_images:,} images, {len(attempts)} runs, {sum(lived.status == -9 for lived in attempts)} killed",
        ["what", "median", "fitted growth", "last - first tenth", "limit", ""],
        rows,
        {
            **record, "images": n_images, "faults": faults, "seconds": lives,
            "killed_at": [lived.samples[-1].done for lived in attempts if lived.status == -9],
            "peak_bytes": {"command": max(s.command_bytes for s in samples), "all": max(s.all_bytes for s in samples)},
        },
    )  # fmt: skip
    for fault in faults:
        print(f"FAULT {fault}")
    if plot is not None:
        draw(attempts, title, plot)
    return 1 if faults else 0


def draw(attempts: Sequence[Attempt], title: str, file: Path) -> None:
    """Draw the memory of all attempts over the images."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    for lived in attempts:
        done = [each.done for each in lived.samples]
        for name, colour in (("all_bytes", "tab:blue"), ("command_bytes", "tab:orange")):
            axes.plot(done, [getattr(each, name) / 1e6 for each in lived.samples], color=colour, linewidth=0.8)
        if lived.status == -9:
            axes.axvline(done[-1], color="grey", linestyle=":", linewidth=0.8)
    axes.plot([], [], color="tab:blue", label="the command and its workers, each page once")
    axes.plot([], [], color="tab:orange", label="the command alone")
    axes.plot([], [], color="grey", linestyle=":", label="kill -9")
    axes.set(xlabel="images described", ylabel="anonymous memory, MB", title=title, ylim=(0, None))
    axes.legend(loc="lower right", fontsize="small")
    figure.savefig(file)


def _n_open(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208 (half the time)
    except OSError:
        return 0
