"""The images still to be described, in batches of one shape, dealt out to the processes."""

import contextlib
import heapq
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from metilr.data.decode import BadImageError
from metilr.data.views import ImageRows, Images
from metilr.distributed import CONTINUE, start_worker
from metilr.errors import UserError
from metilr.extraction.options import BadImages
from metilr.extraction.store import DescriptorStore, RowWriter, has_unit_length
from metilr.models import UnfitSizeError
from metilr.progress import tracked

FULL_BATCH_PIXELS = 500 * 500  # the Met's images have at most 500 px a side


def same_shape_batches(shapes: np.ndarray, batch_size: int, n_full: int | None = None) -> list[np.ndarray]:
    """Group images of equal height and width, int ``(n, 2)``, so that a batch needs neither padding nor cropping.

    The largest images come first: a batch that does not fit in memory fails at the start of a run. A batch has no more
    pixels than ``n_full`` images of 500 x 500 px, without it ``batch_size`` of them: memory goes with pixels, and a
    museum's own photographs can have millions.

    Returns:
        Positions in ``shapes``, each once, in batches of one shape; ascending within a batch.
    """
    kinds, kind_of = np.unique(shapes, axis=0, return_inverse=True)
    by_kind = np.argsort(kind_of.reshape(-1), kind="stable")
    members = np.split(by_kind, np.cumsum(np.bincount(kind_of.reshape(-1)))[:-1])
    batches = []
    for kind in np.argsort(-kinds.prod(axis=1), kind="stable"):
        n_pixels = max(1, int(kinds[kind].prod()))
        size = max(1, min(batch_size, (n_full or batch_size) * FULL_BATCH_PIXELS // n_pixels))
        batches += [members[kind][i : i + size] for i in range(0, len(members[kind]), size)]
    return batches


def deal(work: Sequence[int], n_processes: int) -> list[list[int]]:
    """Share out batches so that each process has nearly the same work: the largest first, to whom has least.

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


NOTHING = PlannedBatch(np.empty(0, dtype=np.int64), (1, 1))


class ImageBatch(NamedTuple):
    """Decoded images of one shape."""

    rows: np.ndarray  # of each image in the store, int64 (B,)
    images: Tensor  # uint8 (B, 3, H, W)
    bad: list[tuple[int, str]]  # rows that cannot be described, each with the reason


def decode_batch(images: ImageRows, planned: PlannedBatch) -> ImageBatch:
    """Decode a planned batch; what cannot be decoded, or has got another shape since, is bad."""
    decoded, bad = {}, []
    for row in planned.rows.tolist():
        try:
            image = images.load(row)
            if tuple(image.shape[1:]) != planned.shape:
                raise BadImageError(f"{images.file(row)}: changed while the run was reading it; run again")
            decoded[row] = image
        except BadImageError as error:
            bad.append((row, str(error)))
    none = torch.empty((0, 3, *planned.shape), dtype=torch.uint8)
    return ImageBatch(np.array([*decoded], dtype=np.int64), torch.stack([*decoded.values()]) if decoded else none, bad)


class ImageDataModule(LightningDataModule):
    """Pending images of a prepared store, in batches of one shape.

    The plan is made by the first process and told to the others, since the store changes while they start. ``images``
    are what is described and ``sizes`` the bytes of each row's file, by split; ``check_size`` is the embedder's,
    ``n_full`` that of ``same_shape_batches``; for the rest see ``ExtractionOptions``.
    """

    trainer: Any

    def __init__(
        self, images: Mapping[str, Images], sizes: Mapping[str, np.ndarray], store: DescriptorStore, batch_size: int,
        num_workers: int, bad_images: BadImages, check_size: Callable[[int, int], None], quiet: bool = False,
        n_full: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.rows, self.sizes_of, self.store = ImageRows(images), {split: sizes[split] for split in images}, store
        self.sizes = np.concatenate([*self.sizes_of.values()])
        self.batch_size, self.n_full, self.num_workers = batch_size, n_full, num_workers
        self.bad_images, self.check_size, self.quiet = bad_images, check_size, quiet
        self.plan: list[PlannedBatch] = []
        self.side_stream: torch.cuda.Stream | None = None

    def pending_rows(self) -> np.ndarray:
        """Rows that the store lacks, ascending."""
        retry_bad = self.bad_images == "stop"
        pending = [self.store.pending(split, sizes, retry_bad) for split, sizes in self.sizes_of.items()]
        return np.flatnonzero(np.concatenate(pending))

    def make_plan(self) -> list[PlannedBatch]:
        """Cut the pending images into batches of one shape; marks those whose header cannot be read, or is too small.

        Raises:
            BadImageError: If there is such an image, with ``bad_images="stop"``.
        """

        def shape_or_error(row: int) -> tuple[int, int] | BadImageError:
            try:
                shape = self.rows.shape(row)
                self.check_size(*shape)
            except UnfitSizeError as error:
                return self._unfit(row, error)
            except BadImageError as error:
                return error
            return shape

        rows = self.pending_rows()
        shapes = np.zeros((len(rows), 2), dtype=np.int64)
        # In threads: the time goes into waiting for the disk.
        with contextlib.closing(self.store.writer()) as writer, ThreadPoolExecutor(8) as pool:
            read = pool.map(shape_or_error, rows.tolist())
            for i, shape in enumerate(tracked(read, "reading image sizes", len(rows), "images", self.quiet)):
                if not isinstance(shape, BadImageError):
                    shapes[i] = shape
                elif self.bad_images == "stop":
                    pool.shutdown(cancel_futures=True)
                    raise shape
                else:
                    self._mark_bad(writer, int(rows[i]))
        rows, shapes = rows[shapes[:, 0] > 0], shapes[shapes[:, 0] > 0]
        batches = same_shape_batches(shapes, self.batch_size, self.n_full)
        return [PlannedBatch(rows[batch], tuple(shapes[batch[0]].tolist())) for batch in batches]

    def share(self, rank: int, world_size: int) -> list[PlannedBatch]:
        """A process's batches of the plan."""
        work = [len(batch.rows) * batch.shape[0] * batch.shape[1] for batch in self.plan]
        return [self.plan[i] for i in deal(work, world_size)[rank]]

    def loader(self, batches: Sequence[PlannedBatch], pin_memory: bool) -> DataLoader[ImageBatch]:
        """The batches, decoded one after the other."""
        planned: Any = batches  # whole ones, so that it must not batch again
        return DataLoader(
            planned, batch_size=None, collate_fn=partial(decode_batch, self.rows),
            num_workers=min(self.num_workers, len(batches)), worker_init_fn=start_worker,
            pin_memory=pin_memory,
        )  # fmt: skip

    def write(self, writer: RowWriter, batch: ImageBatch, descriptors: Tensor | UnfitSizeError) -> None:
        """Write a batch's descriptors, those of the images that could be decoded, ``(B, D)``, to their rows.

        An error in their place makes all of the batch bad.

        Raises:
            UserError: If a descriptor is not of unit length.
            BadImageError: If an image is bad, with ``bad_images="stop"``.
        """
        if isinstance(descriptors, UnfitSizeError):
            bad = [(row, str(self._unfit(row, descriptors))) for row in batch.rows.tolist()]
            batch, descriptors = ImageBatch(batch.rows[:0], batch.images[:0], batch.bad + bad), torch.empty(0, 1)
        described = descriptors.float().cpu().numpy()
        for row, descriptor, is_unit in zip(batch.rows.tolist(), described, has_unit_length(described), strict=True):
            if not is_unit:
                reason = "its descriptor is not finite or all zero; take precision 32, or another pooling"
                raise UserError(f"{self.rows.file(row)}: {reason}")
            writer.write(*self.rows.locate(row), descriptor, int(self.sizes[row]))
        for row, reason in batch.bad:  # after the good ones, so that stopping loses nothing
            if self.bad_images == "stop":
                raise BadImageError(reason)
            self._mark_bad(writer, row)

    def _unfit(self, row: int, error: UnfitSizeError) -> BadImageError:
        images = self.rows.images[self.rows.locate(row)[0]]
        view = "" if images.view is None else f"a view ({images.view.settings()['kind']}) of it "
        remedy = "take a larger image or image_size, or leave it out with bad_images skip"
        return BadImageError(f"{self.rows.file(row)}: {view}cannot be described ({error}); {remedy}", str(error))

    def _mark_bad(self, writer: RowWriter, row: int) -> None:
        """Note that an image is left out, unless it was there when the run began: then a disk has gone."""
        if self.sizes[row] and not self.rows.file(row).exists():
            raise UserError(f"{self.rows.file(row)}: has vanished during the run; is its disk still there? {CONTINUE}")
        writer.mark_bad(*self.rows.locate(row), int(self.sizes[row]))

    @override
    def setup(self, stage: str) -> None:
        """Make the plan in the first process, and tell it to the others."""
        self.plan = self.trainer.strategy.broadcast(self.make_plan() if self.trainer.is_global_zero else [])

    @override
    def predict_dataloader(self) -> DataLoader[ImageBatch]:
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
