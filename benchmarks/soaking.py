"""A long command watched from outside: its memory, open files and threads over its progress, and killed on the way."""

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from measuring import anonymous_and_shared, descendants, numbers, show

SECONDS_BETWEEN = 1.0
WARM_UP = 0.2  # share of all images after an attempt's first
LEAST_SAMPLES = 30  # below that a slope is noise
# By field of Sample: what it is in which unit, the limit of its growth over a whole run, and the unit's size.
LIMITS = {
    "command_bytes": ("anonymous memory of the command, MB", 50.0, 1e6),
    "all_bytes": ("memory of the command and its workers, MB", 50.0, 1e6),
    "files": ("open files", 4.0, 1),
    "threads": ("threads", 0.5, 1),
}


class Sample(NamedTuple):
    """What a command and the processes that it started hold at a moment."""

    seconds: float  # since the command's start
    done: int  # images described so far
    command_bytes: int  # anonymous memory of the command (RssAnon; mapped files do not count)
    all_bytes: int  # anonymous and shared memory of all its processes; what several share counts once (Pss)
    files: int
    threads: int
    processes: int


@dataclass
class Attempt:
    """One life of the command; status -9 if it was killed."""

    samples: list[Sample] = field(default_factory=list)
    status: int = 0

    @property
    def at_work(self) -> list[Sample]:
        """Samples between its first progress and its last."""
        done = [sample.done for sample in self.samples]
        return [s for s in self.samples if done[0] < s.done < done[-1]]


def attempt(command: Sequence[str], log: Path, progress: Callable[[], int], kill_at: int | None) -> Attempt:
    """Run a command to its end, or until its progress has reached ``kill_at``, and then ``kill -9`` it."""
    lived, start = Attempt(), time.perf_counter()
    with log.open("a") as stream, subprocess.Popen(command, stdout=stream, stderr=stream) as process:
        while process.poll() is None:
            lived.samples.append(sample(process.pid, time.perf_counter() - start, progress()))
            if kill_at is not None and lived.samples[-1].done >= kill_at:
                process.kill()
                break
            time.sleep(SECONDS_BETWEEN)
    lived.status = process.returncode
    return lived


def sample(pid: int, seconds: float, done: int) -> Sample:
    """Look at a process and all that descend from it."""
    pids = [pid, *descendants(pid)]
    status = [numbers(Path(f"/proc/{each}/status")) for each in pids]
    threads = sum(each.get("Threads", 0) for each in status)
    own, files = 1024 * status[0].get("RssAnon", 0), sum(map(_n_open, pids))
    return Sample(seconds, done, own, anonymous_and_shared(pids), files, threads, len(pids))


def growth(samples: Sequence[Sample], values: Sequence[float], n_images: int) -> dict[str, float] | None:
    """How much a quantity grows over a whole run of n images; None if there are too few samples to tell.

    Returns:
        ``fitted``: by the least-squares slope after the warm-up, extrapolated to the whole run. ``tenths``: median of
        the last tenth minus that of the first after the warm-up. ``level``: the median of all after the warm-up.
    """
    done = np.array([each.done for each in samples], dtype=float)
    after = done >= (done[0] if len(done) else 0) + WARM_UP * n_images
    x, y = done[after], np.array(values, dtype=float)[after]
    if len(x) < LEAST_SAMPLES or x[0] == x[-1]:
        return None
    tenth = (x[-1] - x[0]) / 10
    tenths = np.median(y[x >= x[-1] - tenth]) - np.median(y[x <= x[0] + tenth])
    fitted = np.polyfit(x, y, 1)[0] * n_images
    return {"fitted": float(fitted), "tenths": float(tenths), "level": float(np.median(y))}


def report(title: str, n_images: int, attempts: Sequence[Attempt], faults: Sequence[str], plot: Path | None) -> int:
    """Print what grew, judged in the longest attempt, and what is wrong besides; returns the exit status."""
    judged = max(attempts, key=lambda lived: lived.at_work[-1].done - lived.at_work[0].done if lived.at_work else 0)
    rows, record, faults = [], {}, list(faults)
    for name, (what, limit, factor) in LIMITS.items():
        grown = growth(judged.at_work, [getattr(each, name) / factor for each in judged.at_work], n_images)
        if grown is None:
            rows.append([what, "", "", "", limit, "too short a run to tell"])
            record[name] = None
            continue
        flat = max(grown["fitted"], grown["tenths"]) <= limit
        rows.append([what, grown["level"], grown["fitted"], grown["tenths"], limit, "flat" if flat else "GROWS"])
        record[name] = {**grown, "limit": limit, "flat": flat}
        faults += [] if flat else [f"{what} grows"]
    samples = [each for lived in attempts for each in lived.samples]
    killed_at = [lived.samples[-1].done for lived in attempts if lived.status == -9]
    show(
        f"{title}: {n_images:,} images, {len(attempts)} runs, {len(killed_at)} killed",
        ["what", "median", "fitted growth", "last - first tenth", "limit", ""],
        rows,
        {
            **record, "images": n_images, "faults": faults, "killed_at": killed_at,
            "seconds": [lived.samples[-1].seconds for lived in attempts],
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
    lines = {"all_bytes": "the command and its workers, each page once", "command_bytes": "the command alone"}
    for i, lived in enumerate(attempts):
        done = [each.done for each in lived.samples]
        for (name, label), colour in zip(lines.items(), ("tab:blue", "tab:orange"), strict=True):
            megabytes = [getattr(each, name) / 1e6 for each in lived.samples]
            axes.plot(done, megabytes, color=colour, linewidth=0.8, label=None if i else label)
        if lived.status == -9:
            axes.axvline(done[-1], color="grey", linestyle=":", linewidth=0.8, label=None if i else "kill -9")
    axes.set(xlabel="images described", ylabel="anonymous memory, MB", title=title, ylim=(0, None))
    axes.legend(loc="lower right", fontsize="small")
    figure.savefig(file)


def _n_open(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208 (half the time)
    except OSError:
        return 0
