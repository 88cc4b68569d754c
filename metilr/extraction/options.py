"""How images are read and where the backbone runs. Imports nothing heavy, so that help is quick."""

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from metilr.data.decode import MAX_MEGAPIXELS
from metilr.data.pixels import MAX_IMAGE_SIZE, ImageSize
from metilr.errors import UserError, check_choices
from metilr.models import Engine, check_engine

if TYPE_CHECKING:
    from metilr.models.embedder import Embedder

BadImages = Literal["stop", "skip"]
ImageShape = Literal["keep", "square"]
Accelerator = Literal["auto", "cpu", "gpu", "mps"]
Precision = Literal["32", "bf16-mixed", "16-mixed"]
MAX_BATCH = 4096  # images; beyond some tens nothing gets faster
WORKERS_A_CORE = 8  # at most: more decode no faster, and each takes memory
MAX_STREAMS = 4  # of OpenVINO; each holds activations


def size_of(image_size: int | None, image_shape: ImageShape) -> ImageSize | None:
    """What images are resized to: the longest side, or height and width of a square."""
    if image_shape == "keep":
        return image_size
    if image_size is None:
        raise UserError("square: needs image_size, such as 512; give both, or leave it out", "image_shape")
    return image_size, image_size


@dataclass(frozen=True)
class ExtractionOptions:
    """How images are read and where the backbone runs.

    Attributes:
        image_size: Resize each image so that its longest side has this many px; without it as the checkpoint was
            trained, else as they are (in an index: 500 px).
        image_shape: Keep the ratio of an image's sides, or make it square: both sides image_size px, which is needed.
        bad_images: Stop at an image that cannot be decoded or is too small for the model, or skip it: it is left out of
            the database or index, and a query counts as wrong.
        accelerator: Where the backbone runs; auto takes GPUs if there are any, and says so.
        devices: Number of processes, one GPU each (on the CPU: processes that share it).
        num_nodes: Machines, each started with this command by torchrun or SLURM, with a shared store.
        precision: Arithmetic of the backbone: 32 is exact float32 (no TF32). On the CPU, bf16-mixed runs what has a
            side below 128 px in float32, since bfloat16 convolutions are unreliable there. An EfficientNet's first
            four stages are float32 in any case: they suffer from rounding.
        engine: What computes the backbone: torch; compile, PyTorch compiled (for GPUs and long runs: it stops for about
            a minute at the first batch, at the first of a single image, and seldom later); openvino, for convolutional
            networks on CPUs, several times as fast (pip install openvino); auto, openvino in precision 32 where it is
            installed and the model is convolutional, else torch, with the same rows up to rounding. On CPUs PyTorch
            computes what has a side below 128 px.
        batch_size: Most images in a batch, fewer of images beyond 500 x 500 px; images in a batch have one shape.
            Convolutional networks on CPUs take one such image at once, or smaller ones of as many pixels; openvino one.
        num_workers: Image decoding processes beside each process; without it as many as cores are free, at most 8.
        quiet: Print the table and the paths alone.
        profile: Print how long decoding, transfer, network and writing took.
        max_megapixels: An image of more is bad; its header tells, before anything is decoded.
    """

    image_size: int | None = None
    image_shape: ImageShape = "keep"
    bad_images: BadImages = "stop"
    accelerator: Accelerator = "auto"
    devices: int | Literal["auto"] = "auto"
    num_nodes: int = 1
    if TYPE_CHECKING:
        precision: Precision = "32"
        engine: Engine = "torch"
    else:  # 32 is a number in Python and YAML, and means the same; ``for_model`` says what auto is
        precision: Precision | Literal[32] = "32"
        engine: Engine | Literal["auto"] = "torch"
    batch_size: int = 32
    num_workers: int | None = None
    quiet: bool = False
    profile: bool = False
    max_megapixels: float = MAX_MEGAPIXELS

    @property
    def resize_to(self) -> ImageSize | None:
        """What images are resized to."""
        return size_of(self.image_size, self.image_shape)

    def resized_to(self, size: ImageSize | None) -> "ExtractionOptions":
        """These options for images of a size that a checkpoint, a store or a run has recorded."""
        if isinstance(size, tuple):
            return replace(self, image_size=size[0], image_shape="square")
        return replace(self, image_size=size, image_shape="keep")

    def for_model(self, embedder: "Embedder", usual_size: ImageSize | None = None) -> "ExtractionOptions":
        """These options for a model: images of its size where none is given, and the engine that auto comes to."""
        return self.resized_to(self.resize_to or embedder.image_size or usual_size).with_engine(embedder)

    def with_engine(self, embedder: "Embedder") -> "ExtractionOptions":
        """These options with what auto comes to: the fastest engine whose rows are those of torch up to rounding."""
        if str(self.engine) != "auto":
            return self
        from metilr.models.engines import fastest_engine

        return replace(self, engine=fastest_engine(embedder.backbone, self.device, self.precision))

    @property
    def device(self) -> Literal["cuda", "mps", "cpu"]:
        """What ``accelerator`` comes to on this machine."""
        import torch

        if self.accelerator in ("auto", "gpu") and torch.cuda.is_available():
            return "cuda"
        if self.accelerator in ("auto", "mps") and torch.backends.mps.is_available():
            return "mps"
        return "cpu"

    @property
    def n_processes(self) -> int:
        """Processes on this machine."""
        if self.devices == "auto":
            import torch

            return torch.cuda.device_count() if self.device == "cuda" else 1
        return self.devices

    @property
    def n_streams(self) -> int:
        """Batches that each process describes side by side."""
        if self.engine != "openvino":
            return 1
        import torch

        n_threads = max(1, torch.get_num_threads() // self.n_processes)
        return max(n for n in range(1, MAX_STREAMS + 1) if n_threads % n == 0)  # else threads would be left over

    def __post_init__(self) -> None:
        """Refuse before any work what is out of range or what Lightning would replace by something else."""
        import torch

        from metilr.distributed import has_launcher

        object.__setattr__(self, "precision", str(self.precision))
        check_choices(self)
        least = {"image_size": 1, "devices": 1, "num_nodes": 1, "batch_size": 1, "num_workers": 0}
        most = {"image_size": MAX_IMAGE_SIZE, "batch_size": MAX_BATCH}
        for name in least:
            value = getattr(self, name)
            if isinstance(value, int) and value < least[name]:
                raise UserError(f"{value}: must be at least {least[name]}", name)
            if isinstance(value, int) and value > most.get(name, value):
                raise UserError(f"{value}: must be at most {most[name]:,}", name)
        size_of(self.image_size, self.image_shape)
        if self.accelerator == "gpu" and self.device != "cuda":
            raise UserError("gpu: PyTorch sees no GPU here; use cpu, or check nvidia-smi and the driver", "accelerator")
        if self.accelerator == "mps" and self.device != "mps":
            raise UserError("mps: PyTorch sees no Apple GPU here; use cpu", "accelerator")
        if str(self.engine) != "auto":
            check_engine(self.engine, self.device)
        if self.precision == "16-mixed" and self.device != "cuda":
            raise UserError("16-mixed: needs an NVIDIA GPU; elsewhere use 32 or bf16-mixed", "precision")
        cores = os.cpu_count() or 1
        there = {"cuda": torch.cuda.device_count(), "mps": 1, "cpu": cores}[self.device]
        if self.n_processes > there:
            kind = "cores" if self.device == "cpu" else "GPUs"
            raise UserError(f"{self.devices}: this machine has {there} {kind}; choose {there} or fewer", "devices")
        n_workers = WORKERS_A_CORE * cores // self.n_processes
        if (self.num_workers or 0) > n_workers:
            message = f"{self.num_workers}: choose {n_workers} or fewer on this machine's {cores} cores"
            raise UserError(message, "num_workers")
        if self.num_nodes > 1 and not has_launcher():
            message = f"{self.num_nodes}: start this command on each machine with torchrun or in a SLURM job"
            raise UserError(message, "num_nodes")
