"""Multi-scale descriptors as a Lightning module, a batch of one shape at a time, and what writes them to the store."""

import contextlib
import os
import signal
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BasePredictionWriter
from pytorch_lightning.profilers import SimpleProfiler
from rich.table import Table
from torch import Tensor
from typing_extensions import override

from metilr.distributed import end_with_parent, has_launcher, quieten_lightning
from metilr.extraction.datamodule import ImageBatch, ImageDataModule
from metilr.extraction.store import RowWriter
from metilr.models import Engine, UnfitSizeError
from metilr.models.backbone import Features
from metilr.models.embedder import Embedder, keep_float32_exact
from metilr.models.engines import start_engine
from metilr.progress import counted, make_console

# PyTorch's convolutions on CPUs keep what they compiled for an image shape, by default of the last 1,024: gigabytes
# where shapes change all the time. Batches of one shape follow each other, and at three scales EfficientNet-Lite0 has
# 127 different ones, ResNet-50 94. Read at the first convolution of a process.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")


Described = Tensor | UnfitSizeError  # of a batch: its descriptors, or why there are none


class HostCopy:
    """Descriptors on their way from a GPU, which may still be computing them; used as a future is."""

    def __init__(self, descriptors: Tensor) -> None:
        self._copy = descriptors.to("cpu", non_blocking=True)  # in line behind what computes them
        self._copied = torch.cuda.Event()
        self._copied.record(torch.cuda.current_stream(descriptors.device))

    def done(self) -> bool:
        """Whether they have arrived."""
        return bool(self._copied.query())

    def result(self) -> Tensor:
        """Wait for them, and for nothing that was begun later."""
        self._copied.synchronize()
        return self._copy


class DescriptorModule(pl.LightningModule):
    """Multi-scale descriptors of a batch of images.

    With ``n_streams`` OpenVINO describes so many batches side by side: what one core alone can do for a new image shape
    then leaves the others at work. Beyond 1, a step returns the descriptors' future. What is predicted later is by the
    ``compute`` of before.
    """

    def __init__(self, embedder: Embedder, engine: Engine = "torch", precision: str = "32", n_streams: int = 1) -> None:
        super().__init__()
        self.embedder = embedder
        self.engine: Engine = engine
        self.compute: Callable[[Tensor], Features] | None = None  # in the backbone's place
        self.precision, self.n_streams = precision, n_streams
        self.streams: ThreadPoolExecutor | None = None
        self.memory_format = torch.contiguous_format

    @override
    def setup(self, stage: str) -> None:
        quieten_lightning()  # in spawned processes too

    @override
    def on_predict_start(self) -> None:
        """Start the engine here where there is none: a spawned process cannot be handed one."""
        keep_float32_exact()
        # PyTorch's convolutions run faster with channels last on CPUs, and on GPUs with tensor cores.
        if self.engine != "openvino" and (self.device.type == "cpu" or self.precision != "32"):
            self.memory_format = torch.channels_last
            self.embedder.to(memory_format=torch.channels_last)
        if self.compute is None:
            self.compute = start_engine(self.engine, self.embedder.backbone, self.precision, self.n_streams)
        if self.n_streams > 1:
            self.n_threads = torch.get_num_threads()
            torch.set_num_threads(max(1, self.n_threads // self.n_streams))
            self.streams = ThreadPoolExecutor(self.n_streams)

    @override
    def predict_step(self, batch: ImageBatch, batch_idx: int) -> Described | Future[Described] | HostCopy:
        """Describe a batch, or begin to: side by side with others, or on a GPU."""
        if self.streams is not None:
            return self.streams.submit(self.describe_if_fit, batch.images)
        described = self.describe_if_fit(batch.images)
        return HostCopy(described) if isinstance(described, Tensor) and described.is_cuda else described

    def describe_if_fit(self, images: Tensor) -> Described:
        """Describe images of one shape as ``describe`` does, or return why that shape cannot be."""
        try:
            return self.describe(images)
        except UnfitSizeError as error:
            return error

    @torch.inference_mode()
    def describe(self, images: Tensor) -> Tensor:
        """Describe images of one shape, uint8 ``(B, 3, H, W)``: float32 ``(B, D)``, unit length. B may be 0.

        Raises:
            UnfitSizeError: If the network cannot take that shape.
        """
        if not len(images):
            return torch.empty(0, self.embedder.dim)
        dtype = torch.float16 if self.precision == "16-mixed" else torch.bfloat16
        with torch.autocast(images.device.type, dtype=dtype, enabled=self.precision != "32"):
            normalised = self.embedder.normalise(images)
            return self.embedder.describe(normalised.contiguous(memory_format=self.memory_format), self.compute)

    @override
    def teardown(self, stage: str) -> None:
        if self.streams is not None:
            self.streams.shutdown(cancel_futures=True)
            self.streams = None
            torch.set_num_threads(self.n_threads)


class DescriptorWriter(BasePredictionWriter):
    """Write each batch's descriptors to their rows as soon as they are computed, under a bar in the first process.

    That process knows its own share of the images alone, and the shares, which are of equal work, are done at about the
    same pace: of all images the bar shows as large a part as of its own.
    """

    def __init__(self, data: ImageDataModule, n_streams: int = 1) -> None:
        super().__init__(write_interval="batch")
        self.data, self.n_streams = data, n_streams
        self.writer: RowWriter | None = None
        self.unwritten: deque[tuple[ImageBatch, Future[Described] | HostCopy]] = deque()
        self.done: Callable[[int], None] | None = None
        self.bar = contextlib.ExitStack()

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the store, and let this process end with the command that started it."""
        self.writer = self.data.store.writer()
        if trainer.world_size > 1 and not has_launcher():  # this process was started by the command
            end_with_parent()
            # Lightning's answer would tell the other processes, of which one has just died.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if trainer.is_global_zero and not self.data.quiet:
            own = self.data.share(trainer.global_rank, trainer.world_size)
            self.n_all, self.n_own = (sum(len(batch.rows) for batch in part) for part in (self.data.plan, own))
            self.n_done = self.n_shown = 0  # of its own, and of all
            self.done = self.bar.enter_context(counted("describing images", self.n_all, "images"))

    @override
    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Described | Future[Described] | HostCopy,
        batch_indices: Any,  # Lightning's count of arrivals; the batch carries the rows
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write a batch's descriptors; those of batches that are still described, later."""
        if isinstance(prediction, Described):
            self._write(trainer, batch, prediction)
        else:
            self.unwritten.append((batch, prediction))
            self._write_all_but(self.n_streams, trainer)  # one more than are described waits its turn
        if self.done is not None:
            self.n_done += len(batch.rows) + len(batch.bad)
            n_shown = self.n_all * self.n_done // max(self.n_own, 1)
            self.done(n_shown - self.n_shown)
            self.n_shown = n_shown

    def _write_all_but(self, n: int, trainer: pl.Trainer) -> None:
        while len(self.unwritten) > n:
            batch, future = self.unwritten[0]
            with trainer.profiler.profile("descriptors.wait"):  # type: ignore[attr-defined]
                descriptors = future.result()
            self._write(trainer, batch, descriptors)
            self.unwritten.popleft()

    def _write(self, trainer: pl.Trainer, batch: ImageBatch, descriptors: Described) -> None:
        assert self.writer is not None
        with trainer.profiler.profile("descriptors.write"):  # type: ignore[attr-defined]
            self.data.write(self.writer, batch, descriptors)

    @override
    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the rest, and wait until all processes have: the first one goes on alone."""
        self._write_all_but(0, trainer)
        self._close()
        profiler = trainer.profiler  # type: ignore[attr-defined]
        if isinstance(profiler, StageProfiler) and trainer.is_global_zero:
            profiler.print(trainer.world_size)
        trainer.strategy.barrier()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write what is described already, and close the store."""
        for batch, future in self.unwritten:
            with contextlib.suppress(Exception):  # the exception that is on its way was first
                if future.done():
                    self._write(trainer, batch, future.result())
        self._close()

    def _close(self) -> None:
        self.bar.close()
        if self.writer is not None:
            self.writer.close()
            self.writer = None


STAGES = {  # by the end of Lightning's or our name of the action
    "decoding": ("predict_next", "waiting for files to become pixels, in decoding processes"),
    "transfer": ("batch_to_device", "pixels to the device"),
    "network": ("predict_step", "resizing, backbone, pooling"),
    "waiting": ("descriptors.wait", "for descriptors of batches described side by side, or on a GPU"),
    "writing": ("descriptors.write", "descriptors to the store"),
}


class StageProfiler(SimpleProfiler):
    """Lightning's profiler, which tells of the stages between image and descriptor, of one process."""

    @override
    def stop(self, action_name: str) -> None:
        """Let a GPU, which computes while this process goes on, finish what belongs to the action."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        super().stop(action_name)

    def print(self, n_processes: int) -> None:
        """Print a table of seconds by stage."""
        of_process = f" of the first of {n_processes} processes" if n_processes > 1 else ""
        table = Table("stage", "seconds", "", title=f"time{of_process}", title_justify="left", box=None)
        actions = {name: sum(all_of_it) for name, all_of_it in self.recorded_durations.items()}
        for stage, (action, what) in STAGES.items():
            seconds = sum(s for name, s in actions.items() if name.endswith(action) and "LightningModule" not in name)
            table.add_row(stage, f"{seconds:.2f}", what)
        make_console().print(table, soft_wrap=False)

    @override
    def describe(self) -> None:
        """Leave Lightning's own report, of all its hooks, away."""
