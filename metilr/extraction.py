"""From images to descriptors on disk: a Lightning prediction loop over batches of one shape."""

import dataclasses
import logging
import os
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy, Strategy
from rich.console import Console
from rich.markup import escape
from torch import Tensor
from typing_extensions import override

from metilr.callbacks import DescriptorWriter, ExactFloat32, ImageProgress
from metilr.data.datamodule import BadImages, ImageDataModule
from metilr.data.dataset import ImageBatch
from metilr.data.ground_truth import GroundTruth, image_sizes, require_images, require_some_images
from metilr.data.image_limits import MAX_IMAGE_SIZE
from metilr.data.images import Images, images_of
from metilr.data.views import View
from metilr.data.workers import default_workers
from metilr.descriptors import DescriptorStore, settings_fingerprint
from metilr.engines import Engine, check_engine, start_engine
from metilr.errors import UserError
from metilr.launch import has_launcher, launched_as_first, process_as_before
from metilr.models.embedder import Embedder
from metilr.models.features import FLOAT32_STAGES
from metilr.overlap import HostCopy
from metilr.process_faults import faults_in_one_line
from metilr.profiling import StageTimes
from metilr.sources import views_store
from metilr.versions import library_versions, processor

Accelerator = Literal["auto", "cpu", "gpu", "mps"]
Precision = Literal["32", "bf16-mixed", "16-mixed"]
STORES = Path("runs/descriptors")
RECIPE = 1  # raise it when the code between image and descriptor changes what a row is
MANY_IMAGES = 1000  # from here on a hint at a faster way is worth a line
MAX_BATCH = 4096  # images; beyond some tens nothing gets faster
WORKERS_A_CORE = 8  # at most: more decode no faster, and each takes memory
MAX_STREAMS = 4  # of OpenVINO; each holds activations
PLAN_TIMEOUT = timedelta(hours=6)  # the others wait while the first process reads the headers of all images

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


def describe_images(
    embedder: Embedder,
    ground_truth: GroundTruth,
    path: Path | None,
    options: ExtractionOptions,
    console: Console,
) -> DescriptorStore:
    """Give the descriptor store of a ground truth's images: reused, continued or made.

    Args:
        embedder: Describes the images.
        ground_truth: Names the images.
        path: The store's folder; None: ``runs/descriptors/BACKBONE-FINGERPRINT``.
        options: How images are read and where the backbone runs.
        console: Told what is done.

    Returns:
        The store, finished; in processes of a launcher other than the first, as far as this one filled it.

    Raises:
        UserError: If images are missing or cannot be decoded (with ``bad_images="stop"``), or the store was
            made with other settings or cannot be written.
        KeyboardInterrupt: If interrupted; finished rows are kept.
    """
    settings = store_settings(embedder, ground_truth, options.image_size, options.precision, options.engine)
    sizes = image_sizes(ground_truth)
    (require_images if options.bad_images == "stop" else require_some_images)(ground_truth, sizes)
    if path is None:
        path = STORES / f"{embedder.backbone.name.replace('/', '_')}-{settings_fingerprint(settings)}"
    store = DescriptorStore(path)
    if options.engine == "openvino" and launched_as_first() and not (path / "manifest.json").exists():
        start_engine(options.engine, embedder.backbone, options.precision)  # what it refuses leaves no store behind
    images = images_of(ground_truth, options.image_size)
    _fill(store, f"[bold]descriptors[/]  {escape(str(path))}", settings, embedder, images, sizes, options, console)
    return store


def describe_views(
    embedder: Embedder,
    ground_truth: GroundTruth,
    view: View,
    store: DescriptorStore,
    options: ExtractionOptions,
    console: Console,
) -> DescriptorStore:
    """Give the descriptor store of views of images, a folder in the store of the images: as ``describe_images``.

    Args:
        embedder: Describes the views.
        ground_truth: Names the images.
        view: Makes the views; row ``i * view.n + v`` is view v of image i.
        store: The images', made with the same options.
        options: How images are read and where the backbone runs.
        console: Told what is done.

    Raises:
        UserError: As ``describe_images``.
        KeyboardInterrupt: If interrupted; finished rows are kept.
    """
    views, settings = views_store(store, view)
    whole = images_of(ground_truth, options.image_size)
    images = {split: dataclasses.replace(whole[source], view=view) for split, source in view.of.items()}
    all_sizes = image_sizes(ground_truth, view.of.values())
    sizes = {split: np.repeat(all_sizes[source], view.n) for split, source in view.of.items()}
    name = f"[bold]views[/]        {view.settings()['kind']}, {view.n} an image"
    _fill(views, name, settings, embedder, images, sizes, options, console)
    return views


def _fill(
    store: DescriptorStore,
    name: str,
    settings: Mapping[str, Any],
    embedder: Embedder,
    images: Mapping[str, Images],
    sizes: Mapping[str, np.ndarray],
    options: ExtractionOptions,
    console: Console,
) -> None:
    """Reuse, continue or make a store, and print under its name which. One run at a time makes rows."""
    store.prepare(settings, {split: len(part) for split, part in images.items()}, embedder.dim)
    num_workers = default_workers(options.n_processes) if options.num_workers is None else options.num_workers
    # OpenVINO gains nothing from batches, which take memory, and each number of images would be a new shape.
    batch_size = 1 if options.engine == "openvino" else options.batch_size
    data = ImageDataModule(images, sizes, store, batch_size, num_workers, options.bad_images, options.quiet)
    n_all = len(data.sizes)
    if store.manifest()["complete"] and not len(data.pending_rows()):
        console.print(f"{name}: reusing {n_all:,} rows", soft_wrap=True)
        return
    with store.alone() if launched_as_first() else nullcontext():
        n_pending = len(data.pending_rows())  # after the lock: another run may have made them meanwhile
        console.print(f"{name}: {_progress_so_far(n_all, n_pending)}", soft_wrap=True)
        device = f"{options.n_processes} x {_device_name(options.device)}"
        console.print(f"[bold]running on[/]   {device}, precision {options.precision}, engine {options.engine}")
        is_convolutional = embedder.backbone.patch == 1 and not embedder.backbone.has_cls
        if options.device == "cpu" and options.engine == "torch" and n_pending >= MANY_IMAGES and is_convolutional:
            console.print("             (on a CPU --engine openvino is faster, with the same rows up to rounding)")
        if launched_as_first() and n_pending:
            weights_from = embedder.describe_settings()["provenance"]
            made_with = {"weights_from": weights_from, "device": device, "processor": processor()}
            store.begin({**made_with, "versions": library_versions()})
        extract_descriptors(embedder, data, options)
        if not launched_as_first():
            return
        if len(data.pending_rows()):
            raise UserError(f"{store.path}: image files changed during the run; run again to describe them anew")
        store.finish()


def store_settings(
    embedder: Embedder,
    ground_truth: GroundTruth,
    image_size: int | None,
    precision: Precision,
    engine: Engine = "torch",
) -> dict[str, Any]:
    """Everything that determines the rows of a store, as JSON types."""
    model = embedder.describe_settings()
    del model["provenance"]  # the same weights from another file make the same rows
    model["precision"] = precision
    if engine != "torch":
        model["engine"] = engine
    if precision != "32" and embedder.backbone.sensitive is not None:
        model["float32_stages"] = FLOAT32_STAGES
    return {
        "recipe": RECIPE,
        "model": model,
        "image_size": image_size,
        "ground_truth": dict(ground_truth.digests),
    }


def extract_descriptors(embedder: Embedder, data: ImageDataModule, options: ExtractionOptions) -> None:
    """Fill in the rows that a prepared store lacks.

    Batches hold images of equal height and width, so a row does not depend on its neighbours; each process
    takes some of the batches and writes its rows where they belong, so a row does not depend on the number of
    processes either (beyond float32 rounding, about 1e-6).

    Raises:
        UserError: If an image cannot be decoded (with ``"stop"``), gives a descriptor that is not finite, or a
            process of the run fails or is killed.
        KeyboardInterrupt: If interrupted; finished rows are kept.
    """
    data.times.is_on = options.profile
    callbacks: list[pl.Callback] = [DescriptorWriter(data, options.n_streams), ExactFloat32()]
    if not options.quiet:
        callbacks.append(ImageProgress())
    trainer = pl.Trainer(
        accelerator=options.device,
        devices=options.n_processes,
        num_nodes=options.num_nodes,
        precision=options.precision,
        strategy=_strategy(options),
        callbacks=callbacks,
        use_distributed_sampler=False,  # it would pad the last batch with images counted twice
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = DescriptorModule(embedder, options.engine, options.precision, data.times, options.n_streams)
    try:
        with process_as_before(), faults_in_one_line("a smaller --batch_size or --image_size, or fewer --scales"):
            trainer.predict(module, datamodule=data, return_predictions=False)
    except (KeyboardInterrupt, SystemExit):  # Lightning turns the first into the second
        for process in getattr(trainer.strategy.launcher, "procs", None) or []:
            process.kill()
        raise KeyboardInterrupt from None
    finally:
        module.teardown("predict")
        embedder.engine = None


def quieten_lightning() -> None:
    """Keep hints meant for training out of the terminal; errors still come through."""
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    logging.getLogger("lightning_fabric.utilities.rank_zero").setLevel(logging.WARNING)
    logging.getLogger("pytorch_lightning.trainer.connectors.signal_connector").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*persistent_workers=True.*",  # there is one pass
        ".*infer the batch indices.*",  # batches carry their rows themselves
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",  # Lightning's own call
    ):
        warnings.filterwarnings("ignore", message=message)


def _progress_so_far(n_all: int, n_pending: int) -> str:
    if n_pending == 0:
        return f"reusing {n_all:,} rows"
    if n_pending == n_all:
        return f"describing {n_all:,}"
    return f"continuing, {n_all - n_pending:,} of {n_all:,} rows are there"


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(0) if device == "cuda" else device.upper()


def _strategy(options: ExtractionOptions) -> str | Strategy:
    if has_launcher():
        return DDPStrategy(timeout=PLAN_TIMEOUT)
    if options.n_processes == 1:
        return "auto"
    # Spawned processes run the extraction only; this one waits and goes on alone.
    return DDPStrategy(start_method="spawn", timeout=PLAN_TIMEOUT)
