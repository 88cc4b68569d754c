"""From images to descriptors on disk: a Lightning prediction loop over batches of one shape."""

import dataclasses
from collections.abc import Mapping
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy, Strategy
from rich.console import Console
from rich.markup import escape

from metilr.data.ground_truth import GroundTruth, image_sizes, require_images, require_some_images
from metilr.data.views import Images, View, images_of
from metilr.distributed import default_workers, faults_in_one_line, has_launcher, launched_as_first, process_as_before
from metilr.errors import UserError
from metilr.extraction.callbacks import DescriptorWriter, ExactFloat32, ImageProgress
from metilr.extraction.datamodule import ImageDataModule
from metilr.extraction.descriptors import views_store
from metilr.extraction.module import DescriptorModule
from metilr.extraction.options import ExtractionOptions, Precision
from metilr.extraction.store import DescriptorStore, settings_fingerprint
from metilr.models import Engine
from metilr.models.backbone import FLOAT32_STAGES
from metilr.models.embedder import Embedder
from metilr.models.engines import start_engine
from metilr.provenance import library_versions, processor

STORES = Path("runs/descriptors")
RECIPE = 1  # raise it when the code between image and descriptor changes what a row is
MANY_IMAGES = 1000  # from here on a hint at a faster way is worth a line
PLAN_TIMEOUT = timedelta(hours=6)  # the others wait while the first process reads the headers of all images


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
