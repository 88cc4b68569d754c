"""The images, or views of them, that are still to be described, dealt out to the processes that describe them."""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader
from typing_extensions import override

from metilr.data.batching import deal, same_shape_batches
from metilr.data.dataset import BatchDataset, ImageBatch, PlannedBatch
from metilr.data.images import ImageRows, Images
from metilr.data.transforms import BadImageError
from metilr.data.workers import leave_signals_to_the_parent
from metilr.descriptors import DescriptorStore, RowWriter
from metilr.errors import UserError
from metilr.overlap import SideStream
from metilr.profiling import StageTimes
from metilr.progress import tracked

BadImages = Literal["stop", "skip"]


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
