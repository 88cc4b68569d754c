"""How images are read and where the backbone runs."""

import os
from dataclasses import dataclass
from typing import Literal

import torch

from metilr.data.decode import MAX_IMAGE_SIZE
from metilr.distributed import has_launcher
from metilr.errors import UserError
from metilr.extraction.datamodule import BadImages
from metilr.models import Engine, check_engine

Accelerator = Literal["auto", "cpu", "gpu", "mps"]
Precision = Literal["32", "bf16-mixed", "16-mixed"]
MAX_BATCH = 4096  # images; beyond some tens nothing gets faster
WORKERS_A_CORE = 8  # at most: more decode no faster, and each takes memory
MAX_STREAMS = 4  # of OpenVINO; each holds activations


@dataclass(frozen=True)
class ExtractionOptions:
    """How images are read and where the backbone runs.

    Attributes:
        image_size: Length in px that the longest side is resized to; ``None`` keeps the size.
        bad_images: ``"stop"`` at a file that cannot be decoded, or ``"skip"`` it.
        accelerator: As in Lightning.
        devices: Processes on this machine, one GPU each.
        num_nodes: Machines, each started with the same command by torchrun or SLURM; they share the store.
        precision: Of the backbone; pooling and normalisation are float32 in any case.
        engine: What computes the backbone.
        batch_size: Most images in a batch; with the engine ``openvino`` it is 1.
        num_workers: Decoding processes beside each process; ``None``: the cores, at most 8.
        quiet: Show no progress.
        profile: Print where the time went.
    """

    image_size: int | None = None
    bad_images: BadImages = "stop"
    accelerator: Accelerator = "auto"
    devices: int | Literal["auto"] = "auto"
    num_nodes: int = 1
    precision: Precision = "32"
    engine: Engine = "torch"
    batch_size: int = 32
    num_workers: int | None = None
    quiet: bool = False
    profile: bool = False

    @property
    def device(self) -> Literal["cuda", "mps", "cpu"]:
        """What ``accelerator`` comes to on this machine."""
        if self.accelerator in ("auto", "gpu") and torch.cuda.is_available():
            return "cuda"
        if self.accelerator in ("auto", "mps") and torch.backends.mps.is_available():
            return "mps"
        return "cpu"

    @property
    def n_processes(self) -> int:
        """Processes on this machine."""
        if self.devices == "auto":
            return torch.cuda.device_count() if self.device == "cuda" else 1
        return self.devices

    @property
    def n_streams(self) -> int:
        """Batches that each process describes side by side."""
        if self.engine != "openvino":
            return 1
        n_threads = max(1, torch.get_num_threads() // self.n_processes)
        return max(n for n in range(1, MAX_STREAMS + 1) if n_threads % n == 0)  # else threads would be left over

    def __post_init__(self) -> None:
        """Refuse before any work what is out of range or what Lightning would replace by something else."""
        for name, least, most in (
            ("image_size", 1, MAX_IMAGE_SIZE),
            ("devices", 1, None),
            ("num_nodes", 1, None),
            ("batch_size", 1, MAX_BATCH),
            ("num_workers", 0, None),
        ):
            value = getattr(self, name)
            if isinstance(value, int) and value < least:
                raise UserError(f"--{name} {value}: must be at least {least}")
            if isinstance(value, int) and most is not None and value > most:
                raise UserError(f"--{name} {value}: must be at most {most:,}")
        if self.accelerator == "gpu" and self.device != "cuda":
            raise UserError("--accelerator gpu: PyTorch sees no GPU here; use cpu, or check nvidia-smi and the driver")
        if self.accelerator == "mps" and self.device != "mps":
            raise UserError("--accelerator mps: PyTorch sees no Apple GPU here; use cpu")
        check_engine(self.engine, self.device)
        if self.precision == "16-mixed" and self.device != "cuda":
            raise UserError("--precision 16-mixed: needs an NVIDIA GPU; elsewhere use 32 or bf16-mixed")
        cores = os.cpu_count() or 1
        there = {"cuda": torch.cuda.device_count(), "mps": 1, "cpu": cores}[self.device]
        if self.n_processes > there:
            kind = "cores" if self.device == "cpu" else "GPUs"
            raise UserError(f"--devices {self.devices}: this machine has {there} {kind}; choose {there} or fewer")
        most = WORKERS_A_CORE * cores // self.n_processes
        if (self.num_workers or 0) > most:
            raise UserError(f"--num_workers {self.num_workers}: choose {most} or fewer on this machine's {cores} cores")
        if self.num_nodes > 1 and not has_launcher():
            raise UserError(
                f"--num_nodes {self.num_nodes}: start this command on each machine with torchrun or in a SLURM job"
            )
