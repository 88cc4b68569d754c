"""Multi-scale descriptors as a Lightning module, a batch of one shape at a time."""

import os
from concurrent.futures import Future, ThreadPoolExecutor

import pytorch_lightning as pl
import torch
from torch import Tensor
from typing_extensions import override

from metilr.distributed import quieten_lightning
from metilr.extraction.datamodule import HostCopy, ImageBatch, StageTimes
from metilr.models import Engine
from metilr.models.embedder import Embedder
from metilr.models.engines import start_engine

# PyTorch's convolutions on CPUs keep what they compiled for an image shape, by default of the last 1,024: gigabytes
# where shapes change all the time. Batches of one shape follow each other, and at three scales EfficientNet-Lite0 has
# 127 different ones, ResNet-50 94. Read at the first convolution of a process.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")


class DescriptorModule(pl.LightningModule):
    """Multi-scale descriptors of a batch of images.

    Args:
        embedder: The model.
        engine: What computes the features.
        precision: Of the backbone, for the engine; autocast is the caller's.
        times: Told how long transfer and network took.
        n_streams: Batches that are described side by side, by OpenVINO: what one core alone can do for a new image
            shape then leaves the others at work. Beyond 1, a step returns the descriptors' future.
    """

    def __init__(
        self,
        embedder: Embedder,
        engine: Engine = "torch",
        precision: str = "32",
        times: StageTimes | None = None,
        n_streams: int = 1,
    ) -> None:
        super().__init__()
        self.times = StageTimes() if times is None else times
        self.embedder = embedder
        self.engine: Engine = engine
        self.precision = precision
        self.n_streams = n_streams
        self.streams: ThreadPoolExecutor | None = None
        self.memory_format = torch.contiguous_format

    @override
    def setup(self, stage: str) -> None:
        quieten_lightning()  # in spawned processes too

    @override
    def on_predict_start(self) -> None:
        """Start the engine here: a spawned process cannot be handed one."""
        # PyTorch's convolutions run faster with channels last on CPUs, and on GPUs with tensor cores.
        if self.engine != "openvino" and (self.device.type == "cpu" or self.precision != "32"):
            self.memory_format = torch.channels_last
            self.embedder.to(memory_format=torch.channels_last)
        self.embedder.engine = start_engine(self.engine, self.embedder.backbone, self.precision, self.n_streams)
        if self.n_streams > 1:
            self.n_threads = torch.get_num_threads()
            torch.set_num_threads(max(1, self.n_threads // self.n_streams))
            self.streams = ThreadPoolExecutor(self.n_streams)
        self.times.start()

    @override
    def predict_step(self, batch: ImageBatch, batch_idx: int) -> Tensor | Future[Tensor] | HostCopy:
        """Describe a batch (see ``describe``), or begin to: side by side with others, or on a GPU."""
        if self.streams is not None:
            return self.streams.submit(self._describe_timed, batch)
        descriptors = self._describe_timed(batch)
        return HostCopy(descriptors) if descriptors.is_cuda else descriptors

    def _describe_timed(self, batch: ImageBatch) -> Tensor:
        with self.times.measured("network"):
            return self.describe(batch)

    @torch.inference_mode()
    def describe(self, batch: ImageBatch) -> Tensor:
        """Describe the images of a batch that could be decoded: float32 ``(B, D)``, unit length."""
        if not len(batch.images):  # none of the batch could be decoded
            return torch.empty(0, self.embedder.dim)
        images = self.embedder.normalise(batch.images)
        return self.embedder.describe(images.contiguous(memory_format=self.memory_format))

    @override
    def teardown(self, stage: str) -> None:
        if self.streams is not None:
            self.streams.shutdown(cancel_futures=True)
            self.streams = None
            torch.set_num_threads(self.n_threads)
