"""Lightning callbacks of the extraction: rows to the store, progress to the terminal."""

import contextlib
import signal
from collections import deque
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BasePredictionWriter, Callback
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from typing_extensions import override

from metilr.data.decode import BadImageError
from metilr.distributed import end_with_parent, has_launcher
from metilr.errors import UserError
from metilr.extraction.datamodule import HostCopy, ImageBatch, ImageDataModule
from metilr.extraction.store import UNIT_TOLERANCE, RowWriter
from metilr.progress import progress_bar


def write_rows(writer: RowWriter, data: ImageDataModule, batch: ImageBatch, descriptors: Tensor) -> None:
    """Write a batch's descriptors to the rows of its images.

    Args:
        writer: Of the store that ``data`` fills.
        data: Knows where rows lie and what to do with a bad image.
        batch: The images.
        descriptors: Theirs, without the bad ones', ``(B, D)``.

    Raises:
        UserError: If a descriptor is not of unit length.
        BadImageError: If an image is bad and ``data`` says to stop.
    """
    for row, descriptor in zip(batch.rows.tolist(), descriptors.float().cpu().numpy(), strict=True):
        if not abs(np.linalg.norm(descriptor) - 1) < UNIT_TOLERANCE:  # also true for NaN
            raise UserError(
                f"{data.rows.file(row)}: its descriptor is not finite or all zero; "
                "try --precision 32, or another --pooling"
            )
        writer.write(*data.rows.locate(row), descriptor, int(data.sizes[row]))
    for row, reason in batch.bad:  # after the good ones, so that stopping loses nothing
        if data.bad_images == "stop":
            raise BadImageError(reason)
        data.mark_bad(writer, row)


class DescriptorWriter(BasePredictionWriter):
    """Write each batch's descriptors to their rows as soon as they are computed.

    Args:
        data: Knows the store, the rows and what to do with a bad image.
        n_streams: Batches that are described at a time; predictions may be futures of descriptors.
    """

    def __init__(self, data: ImageDataModule, n_streams: int = 1) -> None:
        super().__init__(write_interval="batch")
        self.data = data
        self.n_streams = n_streams
        self.writer: RowWriter | None = None
        self.unwritten: deque[tuple[ImageBatch, Future[Tensor] | HostCopy]] = deque()

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Open the store."""
        self.writer = self.data.store.writer()

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let this process end with the command that started it."""
        if trainer.world_size > 1 and not has_launcher():  # this process was started by the command
            end_with_parent()
            # Lightning's answer would tell the other processes, of which one has just died.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    @override
    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Tensor | Future[Tensor] | HostCopy,
        batch_indices: Any,  # Lightning's count of arrivals; the batch carries the rows
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write a batch's rows, see ``write_rows``; those of batches that are still described, later."""
        if isinstance(prediction, Tensor):
            self._write(batch, prediction)
            return
        self.unwritten.append((batch, prediction))
        self._write_all_but(self.n_streams)  # one more than are described waits its turn

    def _write_all_but(self, n: int) -> None:
        while len(self.unwritten) > n:
            batch, future = self.unwritten[0]
            with self.data.times.measured("collect"):
                descriptors = future.result()
            self._write(batch, descriptors)
            self.unwritten.popleft()

    def _write(self, batch: ImageBatch, descriptors: Tensor) -> None:
        assert self.writer is not None
        with self.data.times.measured("write"):
            write_rows(self.writer, self.data, batch, descriptors)
        self.data.times.count(len(batch.rows), batch.decode_seconds)

    @override
    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the store, and wait until all processes have."""
        self._write_all_but(0)
        self._close()
        if self.data.times.is_on and trainer.is_global_zero:
            self.data.times.print(Console(highlight=False), self.data.num_workers, trainer.world_size, self.n_streams)
        trainer.strategy.barrier()  # the first process goes on alone: by then the rows of all are there

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write what is described already, and close the store."""
        for batch, future in self.unwritten:
            with contextlib.suppress(Exception):  # the exception that is on its way was first
                if future.done():
                    self._write(batch, future.result())
        self._close()

    def _close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None


class ImageProgress(Callback):
    """A bar with images done, images per second and time left.

    The first process draws it. It knows its own share of the images alone, and the shares, which are of equal work, are
    done at about the same pace: of all images it shows as large a part as of its own. At the end all are done.
    """

    def __init__(self) -> None:
        self.progress: Progress | None = None

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the bar, in the first process."""
        if not trainer.is_global_zero:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        self.n_all, self.n_own = (sum(len(batch.rows) for batch in part) for part in (data.plan, data.share()))
        self.n_done = 0  # of its own
        self.progress = progress_bar("images")
        self.progress.start()
        self.task = self.progress.add_task("describing images", total=self.n_all)

    @override
    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Move the bar on."""
        if self.progress is None:
            return
        self.n_done += len(batch.rows) + len(batch.bad)
        self.progress.update(self.task, completed=self.n_all * self.n_done // max(self.n_own, 1))

    @override
    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fill the bar."""
        if self.progress is not None:  # the writer's barrier was before
            self.progress.update(self.task, completed=self.n_all)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the bar away."""
        self._stop()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Take the bar away."""
        self._stop()

    def _stop(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


class ExactFloat32(Callback):
    """Keep float32 float32 on GPUs, whose convolutions would otherwise round to TF32.

    In mixed precision too, for what runs in float32 there: rows must not depend on what this process has run before.
    """

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Switch TF32 off, in each process."""
        keep_float32_exact()


def keep_float32_exact() -> None:
    """Switch TF32 off, for this process."""
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
