"""From images to descriptors on disk: a Lightning prediction loop over batches of one shape."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy, Strategy
from rich.console import Console
from rich.markup import escape
from tqdm import tqdm

from metilr.data.decode import file_size
from metilr.data.ground_truth import GroundTruth
from metilr.data.pixels import ImageSize
from metilr.data.views import Images, View, images_of
from metilr.distributed import (
    agree,
    default_workers,
    end_if_unguarded,
    faults_in_one_line,
    has_launcher,
    hidden,
    launched_as_first,
    process_as_before,
)
from metilr.errors import UserError, amount, amount_is
from metilr.extraction.datamodule import ImageDataModule
from metilr.extraction.descriptors import views_store
from metilr.extraction.module import DescriptorModule, DescriptorWriter, StageProfiler
from metilr.extraction.options import BadImages, ExtractionOptions, Precision
from metilr.extraction.store import DescriptorStore, settings_fingerprint
from metilr.models import Engine
from metilr.models.backbone import FLOAT32_STAGES
from metilr.models.embedder import Embedder
from metilr.models.engines import start_engine, suits_openvino
from metilr.progress import MinuteLines, make_console
from metilr.provenance import library_versions, processor

STORES = Path("runs/descriptors")
RECIPE = 1  # raise it when the code between image and descriptor changes what a descriptor is
MANY_IMAGES = 1000  # from here on a hint at a faster way is worth a line
PLAN_TIMEOUT = timedelta(hours=6)  # the others wait while the first process reads the headers of all images


def describe_images(
    embedder: Embedder,
    ground_truth: GroundTruth,
    path: Path | None = None,
    options: ExtractionOptions | None = None,
    console: Console | None = None,
    views: Sequence[View] = (),
) -> DescriptorStore:
    """Give the descriptor store of a ground truth's images, and of views of them: reused, continued or made.

    Batches hold images of equal height and width, so a descriptor does not depend on its neighbours; each process
    takes some of the batches and writes its descriptors where they belong, so none depends on the number of processes
    either (beyond float32 rounding, about 1e-6).

    ``path`` is the store's folder, without it ``runs/descriptors/BACKBONE-FINGERPRINT``. Each of the ``views`` is in a
    store of its own in there, view v of image i in row ``i * view.n + v``. ``console`` is told what is done.

    Returns:
        The images' store, finished; in processes of a launcher other than the first, as far as this one filled it.

    Raises:
        UserError: If images are missing, cannot be decoded or are too small for the network (with
            ``bad_images="stop"``), one gives a descriptor that is not finite, the store was made with other settings,
            or a process of the run fails or is killed.
        KeyboardInterrupt: If interrupted; finished work is kept.
    """
    end_if_unguarded()
    options, console = (options or ExtractionOptions()).with_engine(embedder), console or make_console()
    embedder.check_image_size(options.resize_to)
    settings = store_settings(embedder, ground_truth, options.resize_to, options.precision, options.engine)
    sizes = image_sizes(ground_truth)
    require_images(ground_truth, sizes, options.bad_images)
    if path is None:
        path = STORES / f"{embedder.backbone.name.replace('/', '_')}-{settings_fingerprint(settings)}"
    store = DescriptorStore(path)
    images = images_of(ground_truth, options.resize_to)
    module = DescriptorModule(embedder, options.engine, options.precision, options.n_streams)
    if options.engine == "openvino" and launched_as_first() and not store.exists:  # what it refuses leaves no store
        module.compute = start_engine(options.engine, embedder.backbone, options.precision, options.n_streams)
        if options.n_processes > 1 and not has_launcher():
            module.compute = None  # others start their own
    name = f"[bold]descriptors[/]  {escape(str(path))}"
    store.n_made = _fill(store, name, settings, module, images, sizes, options, console)
    for view in views:
        name = f"[bold]views[/]        {view.settings()['kind']}, {view.n} an image"
        of_view, settings = views_store(store, view)
        viewed = {split: dataclasses.replace(images[source], view=view) for split, source in view.of.items()}
        repeated = {split: np.repeat(sizes[source], view.n) for split, source in view.of.items()}
        store.n_made += _fill(of_view, name, settings, module, viewed, repeated, options, console)
    module.compute = None  # its trainer refers to it, and it to its trainer
    return store


def describe_in_training(trainer: pl.Trainer, embedder: Embedder, data: ImageDataModule) -> None:
    """Fill in what a prepared store lacks, in float32, in the processes of a trainer at work. All must call it.

    Raises:
        UserError: In all processes, if one of them met an image that cannot be decoded or described.
    """
    device = trainer.strategy.root_device
    data.n_full = 1 if _is_convolutional_on_cpu(embedder, device.type) else None
    with agree(trainer):
        if trainer.is_global_zero:
            data.plan = data.make_plan()
    data.plan = trainer.strategy.broadcast(data.plan)
    mine = data.share(trainer.global_rank, trainer.world_size)
    with agree(trainer):
        if mine:
            module = DescriptorModule(embedder).to(device)
            module.on_predict_start()
            n = sum(len(batch.rows) for batch in mine)
            bar = tqdm(total=n, desc="describing images", unit="image", leave=False, disable=hidden(trainer))
            lines = MinuteLines("describing images", n, "images", quiet=not trainer.is_global_zero)
            with contextlib.closing(data.store.writer()) as writer, bar:
                for batch in data.loader(mine, pin_memory=device.type == "cuda"):
                    data.write(writer, batch, module.describe_if_fit(batch.images.to(device)))
                    bar.update(len(batch.rows) + len(batch.bad))
                    lines.advance(len(batch.rows) + len(batch.bad))
    with agree(trainer):  # all descriptors are there now
        if trainer.is_global_zero and not data.store.is_complete:
            _finish(data)


def image_sizes(ground_truth: GroundTruth) -> dict[str, np.ndarray]:
    """Size in bytes of every image file, int64 ``(n,)`` by split; 0 for a missing (or empty) file."""
    return {
        split: np.fromiter((file_size(ground_truth.image(path)) or 0 for path in paths), np.int64, len(paths))
        for split, paths in ground_truth.paths.items()
    }


def require_images(ground_truth: GroundTruth, sizes: Mapping[str, np.ndarray], bad_images: BadImages) -> None:
    """Refuse a data root with missing images: all are counted, the first few named.

    Raises:
        UserError: If a file is missing or empty by ``sizes``; with ``bad_images="skip"``, if all are: then the disk is
            not there, which is no reason to leave them out.
    """
    folder = ground_truth.root / ground_truth.folder
    missing = {split: np.flatnonzero(of_split == 0) for split, of_split in sizes.items()}
    total = sum(map(len, missing.values()))
    if bad_images == "skip" and total == sum(map(len, sizes.values())):
        raise UserError(f"{folder}: not one of the images is there; is the disk mounted?")
    if bad_images == "stop" and total:
        by_split = ", ".join(f"{split} {len(rows):,}" for split, rows in missing.items() if len(rows))
        names = [ground_truth.paths[split][row] for split, rows in missing.items() for row in rows[:3]]
        raise UserError(
            f"{folder}: {amount_is(total, 'image file')} missing or empty ({by_split}): {', '.join(names[:3])}"
            f"{', ...' if total > 3 else ''}; put them there, or leave them out with bad_images skip"
        )


def store_settings(
    embedder: Embedder,
    ground_truth: GroundTruth,
    image_size: ImageSize | None,
    precision: Precision,
    engine: Engine = "torch",
) -> dict[str, Any]:
    """Everything that determines the descriptors of a store, as JSON types."""
    model = embedder.describe_settings()
    del model["provenance"]  # the same weights from another file make the same descriptors
    model["precision"] = precision
    if engine != "torch":
        model["engine"] = engine
    if precision != "32" and embedder.backbone.sensitive is not None:
        model["float32_stages"] = FLOAT32_STAGES
    digests = dict(ground_truth.digests)
    size = [*image_size] if isinstance(image_size, tuple) else image_size
    return {"recipe": RECIPE, "model": model, "image_size": size, "ground_truth": digests}


def _fill(
    store: DescriptorStore,
    name: str,
    settings: Mapping[str, Any],
    module: DescriptorModule,
    images: Mapping[str, Images],
    sizes: Mapping[str, np.ndarray],
    options: ExtractionOptions,
    console: Console,
) -> int:
    """Reuse, continue or make a store, and print under its name which; how many rows it lacked.

    One run at a time fills it.
    """
    embedder = module.embedder
    store.prepare(settings, {split: len(part) for split, part in images.items()}, embedder.dim)
    num_workers = default_workers(options.n_processes) if options.num_workers is None else options.num_workers
    # OpenVINO gains nothing from batches, which take memory, and each number of images would be a new shape.
    batch_size = 1 if options.engine == "openvino" else options.batch_size
    fits = options.engine == "torch" and _is_convolutional_on_cpu(embedder, options.device)
    bad_images, quiet, n_full = options.bad_images, options.quiet, 1 if fits else None
    data = ImageDataModule(
        images, sizes, store, batch_size, num_workers, bad_images, embedder.check_size, quiet, n_full
    )  # fmt: skip
    n_all = len(data.sizes)
    if store.is_complete and not len(data.pending_rows()):
        console.print(f"{name}: reusing {amount(n_all, 'row')}")
        return 0
    with store.alone() if launched_as_first() else contextlib.nullcontext():
        n_pending = len(data.pending_rows())  # after the lock: another run may have made them meanwhile
        for split in images if n_pending else ():
            if n_damaged := int(store.damaged(split).sum()):
                console.print(f"[bold]damaged[/]      {amount_is(n_damaged, f'{split} row')} not as written: made anew")
        doing = f"describing {n_all:,}" if n_pending == n_all else f"reusing {amount(n_all, 'row')}"
        if 0 < n_pending < n_all:
            doing = f"continuing, {n_all - n_pending:,} of {n_all:,} rows are there"
        console.print(f"{name}: {doing}")
        kind = torch.cuda.get_device_name(0) if options.device == "cuda" else options.device.upper()
        device = f"{options.n_processes} x {kind}"
        console.print(f"[bold]running on[/]   {device}, precision {options.precision}, engine {options.engine}")
        if fits and n_pending >= MANY_IMAGES:
            console.print("             (on a CPU the engine openvino is faster, with the same rows up to rounding)")
        if launched_as_first() and n_pending:
            weights_from = embedder.describe_settings()["provenance"]
            made_with = {"weights_from": weights_from, "device": device, "processor": processor()}
            store.begin({**made_with, "versions": library_versions()})
        _predict(module, data, options)
        if launched_as_first():
            _finish(data)
    return n_pending


def _is_convolutional_on_cpu(embedder: Embedder, device: str) -> bool:
    """Whether PyTorch's convolutions gain nothing from many pixels at once: memory, and the system's time for it."""
    return device == "cpu" and suits_openvino(embedder.backbone)


def _finish(data: ImageDataModule) -> None:
    if len(data.pending_rows()):
        raise UserError(f"{data.store.path}: image files changed during the run; run again to describe them anew")
    data.store.finish()


def _predict(module: DescriptorModule, data: ImageDataModule, options: ExtractionOptions) -> None:
    """Fill in what a prepared store lacks, in one process or several."""
    strategy: str | Strategy = "auto"
    if has_launcher():
        strategy = DDPStrategy(timeout=PLAN_TIMEOUT)
    elif options.n_processes > 1:  # spawned processes run the extraction only; this one waits and goes on alone
        strategy = DDPStrategy(start_method="spawn", timeout=PLAN_TIMEOUT)
    trainer = pl.Trainer(
        accelerator=options.device, devices=options.n_processes, num_nodes=options.num_nodes, strategy=strategy,
        callbacks=[DescriptorWriter(data, options.n_streams)], profiler=StageProfiler() if options.profile else None,
        use_distributed_sampler=False,  # it would pad the last batch with images counted twice
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    try:
        with process_as_before(), faults_in_one_line("a smaller batch_size or image_size, or fewer scales"):
            trainer.predict(module, datamodule=data, return_predictions=False)
    except (KeyboardInterrupt, SystemExit):  # Lightning turns the first into the second
        for process in getattr(trainer.strategy.launcher, "procs", None) or []:
            process.kill()
        raise KeyboardInterrupt from None
    finally:
        module.teardown("predict")
