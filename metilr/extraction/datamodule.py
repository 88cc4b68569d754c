"""The images still to be described, in batches of one shape, dealt out to the processes."""

import contextlib
import heapq
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from metilr.data.decode import BadImageError
from metilr.data.views import ImageRows, Images
from metilr.distributed import leave_signals_to_the_parent
from metilr.errors import UserError
from metilr.extraction.options import BadImages
from metilr.extraction.store import DescriptorStore, RowWriter
from metilr.progress import tracked


class HostCopy:
    """Descriptors on their way from a GPU, which may still be computing them; used as a future is.

    Args:
        descriptors: On a GPU; the copy is in line behind what computes them.
    """

    def __init__(self, descriptors: Tensor) -> None:
        self._copy = descriptors.to("cpu", non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record(torch.cuda.current_stream(descriptors.device))

    def done(self) -> bool:
        """Whether they have arrived."""
        return bool(self._copied.query())

    def result(self) -> Tensor:
        """Wait for them, and for nothing that was begun later."""
        self._copied.synchronize()
        return self._copy


class SideStream:
    """Where batches are copied to a GPU while it computes what was begun before."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def copy(self, images: Tensor) -> Tensor:
        """Begin to copy images from pinned memory; what uses them from here on waits for the copy."""
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            copied = images.to(self._device, non_blocking=True)
        computing.wait_stream(self._stream)
        copied.record_stream(computing)  # else its memory would be given to the next copy too early
        return copied


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


FULL_BATCH_PIXELS = 500 * 500  # the Met's images have at most 500 px a side


def same_shape_batches(shapes: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Group images of equal height and width, so that a batch needs neither padding nor cropping.

    The largest images come first: a batch that does not fit in memory fails at the start of a run.

    Args:
        shapes: Height and width of each image, int ``(n, 2)``.
        batch_size: Most images in a batch. Images of more than 500 x 500 px come in batches of fewer, in
            proportion: memory goes with pixels, and a museum's own photographs can have millions.

    Returns:
        Positions in ``shapes``, each once, in batches of one shape; ascending within a batch.
    """
    if not len(shapes):
        return []
    kinds, kind_of = np.unique(shapes, axis=0, return_inverse=True)
    members = np.split(np.argsort(kind_of.reshape(-1), kind="stable"), np.cumsum(np.bincount(kind_of.reshape(-1)))[:-1])
    by_area = np.argsort(-kinds.prod(axis=1), kind="stable")
    batches = []
    for kind in by_area:
        size = max(1, min(batch_size, batch_size * FULL_BATCH_PIXELS // int(kinds[kind].prod())))
        batches += [members[kind][i : i + size] for i in range(0, len(members[kind]), size)]
    return batches


def deal(work: Sequence[int], n_processes: int) -> list[list[int]]:
    """Share out batches so that each process has nearly the same work: the largest first, to whom has least.

    Args:
        work: Of each batch, in any unit.
        n_processes: That share it.

    Returns:
        By process, its batches as positions in ``work``, ascending; each batch once.
    """
    loads = [(0, process) for process in range(n_processes)]
    shares: list[list[int]] = [[] for _ in loads]
    for batch in sorted(range(len(work)), key=lambda batch: -work[batch]):
        load, process = loads[0]
        shares[process].append(batch)
        heapq.heapreplace(loads, (load + work[batch], process))
    return [sorted(share) for share in shares]


class PlannedBatch(NamedTuple):
    """Rows whose images have one shape. Not decoded yet.

    Attributes:
        rows: Row of each image in the descriptors, int64 ``(B,)``.
        shape: Height and width of all, in px.
    """

    rows: np.ndarray
    shape: tuple[int, int]


class ImageBatch(NamedTuple):
    """Decoded images of one shape.

    Attributes:
        rows: Row of each image in the descriptors, int64 ``(B,)``.
        images: uint8 ``(B, 3, H, W)``.
        bad: Rows that could not be decoded, each with the reason.
        decode_seconds: That reading and decoding took.
    """

    rows: np.ndarray
    images: Tensor
    bad: list[tuple[int, str]]
    decode_seconds: float = 0.0


class BatchDataset(Dataset[ImageBatch]):
    """An item is a whole batch, so the loader must not batch again (``batch_size=None``).

    Args:
        images: What is decoded.
        batches: The plan: rows of equal image shape.
    """

    def __init__(self, images: ImageRows, batches: Sequence[PlannedBatch]) -> None:
        self.images = images
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int) -> ImageBatch:
        planned, start = self.batches[i], time.perf_counter()
        rows, images, bad = [], [], []
        for row in planned.rows.tolist():
            try:
                image = self.images.load(row)
                if tuple(image.shape[1:]) != planned.shape:
                    raise BadImageError(f"{self.images.file(row)}: changed while the run was reading it; run again")
            except BadImageError as error:
                bad.append((row, str(error)))
            else:
                rows.append(row)
                images.append(image)
        stacked = torch.stack(images) if images else torch.empty((0, 3, *planned.shape), dtype=torch.uint8)
        return ImageBatch(np.array(rows, dtype=np.int64), stacked, bad, time.perf_counter() - start)


NOTHING = PlannedBatch(np.empty(0, dtype=np.int64), (1, 1))


class ImageDataModule(LightningDataModule):
    """Pending images of a store, in batches of one shape.

    The plan is made by the first process and told to the others, since the store changes while they start.

    Args:
        images: What is described, by split.
        sizes: Size in bytes of each row's file, by split.
        store: Says which rows are pending; already prepared.
        batch_size: Most images in a batch.
        num_workers: Decoding processes beside each process that runs the backbone.
        bad_images: ``"stop"`` raises on a file that cannot be decoded, ``"skip"`` leaves it out.
        quiet: Show no progress.
    """

    def __init__(
        self,
        images: Mapping[str, Images],
        sizes: Mapping[str, np.ndarray],
        store: DescriptorStore,
        batch_size: int,
        num_workers: int,
        bad_images: BadImages,
        quiet: bool = False,
    ) -> None:
        super().__init__()
        self.rows = ImageRows(images)
        self.sizes = np.concatenate([sizes[split] for split in images])
        self.store = store
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.bad_images = bad_images
        self.quiet = quiet
        self.plan: list[PlannedBatch] = []
        self.times = StageTimes()
        self.side_stream: SideStream | None = None

    def pending_rows(self) -> np.ndarray:
        """Rows that the store lacks, ascending."""
        splits = list(self.rows.starts)
        sizes = np.split(self.sizes, [self.rows.starts[split] for split in splits[1:]])
        pending = [
            self.store.pending(split, split_sizes, retry_bad=self.bad_images == "stop")
            for split, split_sizes in zip(splits, sizes, strict=True)
        ]
        return np.flatnonzero(np.concatenate(pending))

    def mark_bad(self, writer: RowWriter, row: int) -> None:
        """Note that a row's image cannot be decoded and is left out.

        Raises:
            UserError: If it was there when the run began: then a disk has gone, which is no reason to leave images out.
        """
        if self.sizes[row] and not self.rows.file(row).exists():
            raise UserError(
                f"{self.rows.file(row)}: has vanished during the run; is its disk still there? Finished work is kept, "
                "run the same command to continue"
            )
        writer.mark_bad(*self.rows.locate(row), int(self.sizes[row]))

    @override
    def setup(self, stage: str) -> None:
        """Make the plan in the first process, and tell it to the others."""
        assert self.trainer is not None
        plan = self.make_plan() if self.trainer.is_global_zero else []
        self.plan = self.trainer.strategy.broadcast(plan)

    @override
    def predict_dataloader(self) -> Iterable[ImageBatch]:
        """Return this process's part of the plan, as decoded batches."""
        assert self.trainer is not None
        mine = self.share() or [NOTHING]  # Lightning refuses a process without a batch
        dataset = BatchDataset(self.rows, mine)
        return DataLoader(
            dataset,
            batch_size=None,
            num_workers=min(self.num_workers, len(mine)),
            worker_init_fn=leave_signals_to_the_parent,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
        )

    def share(self) -> list[PlannedBatch]:
        """This process's batches of the plan."""
        assert self.trainer is not None
        work = [len(batch.rows) * batch.shape[0] * batch.shape[1] for batch in self.plan]
        return [self.plan[i] for i in deal(work, self.trainer.world_size)[self.trainer.global_rank]]

    @override
    def transfer_batch_to_device(self, batch: ImageBatch, device: torch.device, dataloader_idx: int) -> ImageBatch:
        """Move a batch's images, on a GPU while it describes the batch before; and measure how long that takes."""
        with self.times.measured("transfer"):
            if device.type != "cuda":
                return batch._replace(images=batch.images.to(device))
            if self.side_stream is None:  # not before: a spawned process cannot be handed one
                self.side_stream = SideStream(device)
            return batch._replace(images=self.side_stream.copy(batch.images))

    def make_plan(self) -> list[PlannedBatch]:
        """Cut the pending images into batches of one shape; marks those whose header cannot be read."""
        rows = self.pending_rows()
        shapes, readable = self._read_shapes(rows)
        rows, shapes = rows[readable], shapes[readable]
        return [
            PlannedBatch(rows[batch], (int(shapes[batch[0], 0]), int(shapes[batch[0], 1])))
            for batch in same_shape_batches(shapes, self.batch_size)
        ]

    def _read_shapes(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shapes int ``(n, 2)`` from the headers, and which headers could be read, bool ``(n,)``."""
        shapes = np.zeros((len(rows), 2), dtype=np.int64)
        writer = self.store.writer()
        try:
            with ThreadPoolExecutor(8) as pool:  # the time goes into waiting for the disk
                found = pool.map(self._shape_or_error, rows.tolist())
                bar = tracked(found, "reading image sizes", len(rows), "images", self.quiet)
                for i, shape in enumerate(bar):
                    if not isinstance(shape, BadImageError):
                        shapes[i] = shape
                    elif self.bad_images == "stop":
                        pool.shutdown(cancel_futures=True)
                        raise shape
                    else:
                        self.mark_bad(writer, int(rows[i]))
        finally:
            writer.close()
        return shapes, shapes[:, 0] > 0

    def _shape_or_error(self, row: int) -> tuple[int, int] | BadImageError:
        try:
            return self.rows.shape(row)
        except BadImageError as error:
            return error
