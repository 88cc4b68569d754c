"""The images still to be described, in batches of one shape, dealt out to the processes."""

import contextlib
import heapq
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from metilr.data.decode import BadImageError
from metilr.data.views import ImageRows, Images
from metilr.distributed import leave_signals_to_the_parent
from metilr.errors import UserError
from metilr.extraction.options import BadImages
from metilr.extraction.store import DescriptorStore, RowWriter, has_unit_length
from metilr.progress import tracked

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
    """Rows of the store, int64 ``(B,)``, whose images have one shape, height and width in px. Not decoded yet."""

    rows: np.ndarray
    shape: tuple[int, int]


class ImageBatch(NamedTuple):
    """Decoded images of one shape.

    Attributes:
        rows: Row of each image in the store, int64 ``(B,)``.
        images: uint8 ``(B, 3, H, W)``.
        bad: Rows that could not be decoded, each with the reason.
    """

    rows: np.ndarray
    images: Tensor
    bad: list[tuple[int, str]]


class BatchDataset(Dataset[ImageBatch]):
    """An item is a whole planned batch, decoded, so the loader must not batch again (``batch_size=None``)."""

    def __init__(self, images: ImageRows, batches: Sequence[PlannedBatch]) -> None:
        self.images = images
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int) -> ImageBatch:
        planned = self.batches[i]
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
        return ImageBatch(np.array(rows, dtype=np.int64), stacked, bad)


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
        self.side_stream: torch.cuda.Stream | None = None

    def pending_rows(self) -> np.ndarray:
        """Rows that the store lacks, ascending."""
        splits = list(self.rows.starts)
        sizes = np.split(self.sizes, [self.rows.starts[split] for split in splits[1:]])
        pending = [
            self.store.pending(split, split_sizes, retry_bad=self.bad_images == "stop")
            for split, split_sizes in zip(splits, sizes, strict=True)
        ]
        return np.flatnonzero(np.concatenate(pending))

    def make_plan(self) -> list[PlannedBatch]:
        """Cut the pending images into batches of one shape; marks those whose header cannot be read.

        Raises:
            BadImageError: If a header cannot be read, with ``bad_images="stop"``.
        """

        def shape_or_error(row: int) -> tuple[int, int] | BadImageError:
            try:
                return self.rows.shape(row)
            except BadImageError as error:
                return error

        rows = self.pending_rows()
        shapes = np.zeros((len(rows), 2), dtype=np.int64)
        # In threads: the time goes into waiting for the disk.
        with contextlib.closing(self.store.writer()) as writer, ThreadPoolExecutor(8) as pool:
            found = pool.map(shape_or_error, rows.tolist())
            for i, shape in enumerate(tracked(found, "reading image sizes", len(rows), "images", self.quiet)):
                if not isinstance(shape, BadImageError):
                    shapes[i] = shape
                elif self.bad_images == "stop":
                    pool.shutdown(cancel_futures=True)
                    raise shape
                else:
                    self._mark_bad(writer, int(rows[i]))
        rows, shapes = rows[shapes[:, 0] > 0], shapes[shapes[:, 0] > 0]
        return [
            PlannedBatch(rows[batch], (int(shapes[batch[0], 0]), int(shapes[batch[0], 1])))
            for batch in same_shape_batches(shapes, self.batch_size)
        ]

    def share(self, rank: int, world_size: int) -> list[PlannedBatch]:
        """A process's batches of the plan."""
        work = [len(batch.rows) * batch.shape[0] * batch.shape[1] for batch in self.plan]
        return [self.plan[i] for i in deal(work, world_size)[rank]]

    def loader(self, batches: Sequence[PlannedBatch], pin_memory: bool) -> DataLoader[ImageBatch]:
        """The batches, decoded one after the other."""
        return DataLoader(
            BatchDataset(self.rows, batches),
            batch_size=None,
            num_workers=min(self.num_workers, len(batches)),
            worker_init_fn=leave_signals_to_the_parent,
            pin_memory=pin_memory,
        )

    def write(self, writer: RowWriter, batch: ImageBatch, descriptors: Tensor) -> None:
        """Write a batch's descriptors, those of the images that could be decoded, ``(B, D)``, to their rows.

        Raises:
            UserError: If a descriptor is not of unit length.
            BadImageError: If an image is bad, with ``bad_images="stop"``.
        """
        made = descriptors.float().cpu().numpy()
        for row, descriptor, is_unit in zip(batch.rows.tolist(), made, has_unit_length(made), strict=True):
            if not is_unit:
                raise UserError(
                    f"{self.rows.file(row)}: its descriptor is not finite or all zero; "
                    "take precision 32, or another pooling"
                )
            writer.write(*self.rows.locate(row), descriptor, int(self.sizes[row]))
        for row, reason in batch.bad:  # after the good ones, so that stopping loses nothing
            if self.bad_images == "stop":
                raise BadImageError(reason)
            self._mark_bad(writer, row)

    def _mark_bad(self, writer: RowWriter, row: int) -> None:
        """Note that an image is left out, unless it was there when the run began: then a disk has gone."""
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
        self.plan = self.trainer.strategy.broadcast(self.make_plan() if self.trainer.is_global_zero else [])

    @override
    def predict_dataloader(self) -> DataLoader[ImageBatch]:
        assert self.trainer is not None
        mine = self.share(self.trainer.global_rank, self.trainer.world_size)
        on_gpu = self.trainer.strategy.root_device.type == "cuda"
        return self.loader(mine or [NOTHING], pin_memory=on_gpu)  # Lightning refuses a process without a batch

    @override
    def transfer_batch_to_device(self, batch: ImageBatch, device: torch.device, dataloader_idx: int) -> ImageBatch:
        """Move a batch's images; to a GPU from pinned memory, while it describes the batch before."""
        if device.type != "cuda":
            return batch._replace(images=batch.images.to(device))
        if self.side_stream is None:  # not before: a spawned process cannot be handed one
            self.side_stream = torch.cuda.Stream(device)
        return batch._replace(images=copy_beside(batch.images, self.side_stream))


def copy_beside(images: Tensor, stream: torch.cuda.Stream) -> Tensor:
    """Begin to copy images from pinned memory to a stream's GPU; what uses them from here on waits for the copy."""
    computing = torch.cuda.current_stream(stream.device)
    with torch.cuda.stream(stream):
        copied = images.to(stream.device, non_blocking=True)
    computing.wait_stream(stream)
    copied.record_stream(computing)  # else its memory would be given to the next copy too early
    return copied
