"""Where the time of an extraction goes."""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table

_ADDING = threading.Lock()  # not in StageTimes, which spawned processes are handed
STAGES = ("decode", "wait", "transfer", "network", "write")
_WHAT = {
    "decode": "files to pixels, in parallel in the decoding processes",
    "wait": "for decoded images, and between the steps",
    "transfer": "pixels to the device",
    "network": "resizing, backbone, pooling",
    "write": "descriptors to the store",
}


@dataclass
class StageTimes:
    """Seconds by stage, of this process and its decoding processes.

    Attributes:
        is_on: Whether to measure: on a GPU, that stops it from running ahead.
        seconds: By stage; ``collect`` is the time that the process waits for batches described side by side, whose
            ``network`` is the sum over all of them.
        n_images: That were described.
    """

    is_on: bool = False
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys((*STAGES, "collect"), 0.0))
    n_images: int = 0
    started: float = 0.0

    @contextlib.contextmanager
    def measured(self, stage: str) -> Iterator[None]:
        """Add the time that the block takes."""
        start = time.perf_counter()
        yield
        if not self.is_on:
            return
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        with _ADDING:
            self.seconds[stage] += time.perf_counter() - start

    def count(self, n_images: int, decode_seconds: float) -> None:
        """Add images that were described, and how long their decoding took elsewhere."""
        self.n_images += n_images
        self.seconds["decode"] += decode_seconds

    def start(self) -> None:
        """Begin with the first batch's decoding."""
        self.started = time.perf_counter()

    def print(self, console: Console, n_workers: int, n_processes: int, n_streams: int = 1) -> None:
        """Print a table; what no stage accounts for is waiting."""
        of_process = f", the first of {n_processes} processes" if n_processes > 1 else ""
        total = time.perf_counter() - self.started
        computing = "network" if n_streams == 1 else "collect"
        self.seconds["wait"] = total - sum(self.seconds[stage] for stage in ("transfer", computing, "write"))
        table = Table(title=f"{self.n_images:,} images in {total:.1f} s{of_process}", title_justify="left", box=None)
        for name in ("stage", "seconds", "ms an image", ""):
            table.add_column(name, justify="left" if name in ("stage", "") else "right")
        for stage in STAGES:
            seconds = self.seconds[stage]
            what = _WHAT[stage] + (f" ({n_workers})" if stage == "decode" else "")
            what += f", of {n_streams} batches side by side" if stage == "network" and n_streams > 1 else ""
            table.add_row(stage, f"{seconds:.1f}", f"{1000 * seconds / max(1, self.n_images):.1f}", what)
        console.print(table)
