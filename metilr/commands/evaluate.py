"""``metilr evaluate``, in the repository ``python evaluate.py`` too: from photographs to GAP, top to bottom."""

import time
import typing
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import faiss
from rich.console import Console
from rich.markup import escape

from metilr.data.decode import MAX_MEGAPIXELS, limit_images
from metilr.data.ground_truth import DatabaseName, GroundTruth, load_ground_truth
from metilr.demo import DEMO, make_demo
from metilr.distributed import launched_as_first, quieten_lightning
from metilr.evaluation.geometric_check import check_recognition, geometric_check_of
from metilr.evaluation.options import DatabaseViews, check_arguments, method_of
from metilr.evaluation.recognition import check_search, recognise
from metilr.evaluation.results import notes_of, results_of, skipped_images_of, write_answers, write_results
from metilr.evaluation.run_folder import output_folder, plain_options
from metilr.extraction.datamodule import BadImages
from metilr.extraction.describe import describe_images, describe_views
from metilr.extraction.descriptors import open_descriptors
from metilr.extraction.options import Accelerator, ExtractionOptions, Precision
from metilr.models import Engine, PatchRounding, PoolingName
from metilr.models.checkpoints import load_embedder
from metilr.models.embedder import build_embedder
from metilr.report.page import PICTURES_PER_OUTCOME, write_report
from metilr.report.tables import print_table
from metilr.report.wandb import (
    PROJECT,
    WandbMode,
    check_key,
    log_evaluation,
    open_wandb,
    staged_in,
    unharmed,
    where_logged,
)
from metilr.retrieval.knn import N_MATCHES
from metilr.retrieval.search import SearchDevice
from metilr.retrieval.whitening import PAIR_SHRINKAGE


def evaluate(
    root: Path | None = None,
    database: DatabaseName = "full",
    ckpt: Path | None = None,
    backbone: str = "lite0_in",
    weights: str | None = None,
    pooling: PoolingName = "gem",
    p: float = 3.0,
    stage: int | None = None,
    scales: Sequence[float] | None = None,
    patch_rounding: PatchRounding = "nearest",
    image_size: int | None = None,
    bad_images: BadImages = "stop",
    max_megapixels: float = MAX_MEGAPIXELS,
    whitening: str = "pca",
    whitening_dim: int | None = None,
    whitening_shrinkage: float = 1.0,
    pair_shrinkage: float = PAIR_SHRINKAGE,
    visits: int | None = None,
    database_views: DatabaseViews = "none",
    query_crops: Sequence[float] = (),
    geometric_check: int = 0,
    geometric_reorder: bool = False,
    k: int | None = None,
    tau: float | None = None,
    descriptors: Sequence[Path] = (),
    store: Path | None = None,
    output: Path | None = None,
    accelerator: Accelerator = "auto",
    devices: int | Literal["auto"] = "auto",
    num_nodes: int = 1,
    precision: Precision | Literal[32] = "32",
    engine: Engine = "torch",
    batch_size: int = 32,
    num_workers: int | None = None,
    search_device: SearchDevice | None = None,
    profile: bool = False,
    seed: int = 0,
    report: bool = True,
    report_pictures: int = PICTURES_PER_OUTCOME,
    wandb: WandbMode = "auto",
    wandb_project: str = PROJECT,
    quiet: bool = False,
) -> dict[str, Any] | None:
    """Measure how well a model recognises exhibits: images and ground truth in, GAP, GAP⁻ and ACC out.

    Descriptors are computed once and kept in a store under runs/descriptors; a second run with the same
    settings reuses them, an interrupted one continues. k and tau are chosen by GAP on val; test is scored once.

    Args:
        root: Folder with images/ and ground_truth/ in the Met layout. Without it: the built-in demo museum,
            which is synthetic.
        database: Match against MET_database.json (full) or mini_MET_database.json (mini).
        ckpt: Checkpoint of metilr train, or of the reference code, in place of the model options below.
        backbone: One of r18_in, r50_in, r50_swav, r50_sin, r18_swsl, r50_swsl, rx50_32x4d_swsl,
            rx101_32x4d_swsl, rx101_32x8d_swsl, rx101_32x16d_swsl, lite0_in, or timm/NAME for any timm model.
        weights: File with weights in the official file's form; "random" for seeded random weights; without
            it the official ones, from their cache or downloaded.
        pooling: Generalised mean, maximum, mean, regional maxima, or class token (ViTs; spoc there is the mean
            of patch tokens, and gem ignores their negative values).
        p: Exponent of GeM.
        stage: Take the map of an earlier stage (ViT: block), counted from 1; without it the last.
        scales: Relative sizes at which an image is described; the descriptors are summed. Without it 1, 1/√2 and
            1/2, or the checkpoint's.
        patch_rounding: How a ViT's input sides are made multiples of its patch: to the nearest, down, or off to
            refuse other sizes. No effect on CNNs.
        image_size: Resize each image so that its longest side has this many px; without it as they are, or as the
            checkpoint was trained.
        bad_images: Stop at an image that cannot be decoded, or skip it: it is left out of the database, and a
            query counts as wrong.
        max_megapixels: An image of more is bad; its header tells, before anything is decoded.
        whitening: pca learns it on the database; learned from pairs of a database image and its simulated visits (and
            of images of one exhibit); none goes without; else a whitening.npz of another run, or a checkpoint that
            metilr pack wrote.
        whitening_dim: Dimensions after whitening; without it 512 (pca) or all (learned), or as many as the database
            supports.
        whitening_shrinkage: Of pca: 1 is whitening, 0 is plain PCA.
        pair_shrinkage: Of learned: weight of the identity in the covariance of pairs' differences, above 0, at most 1.
        visits: Simulated visitors' photographs of each database image to describe, which takes as many times as long;
            without it 6 where learned whitening or database_views need them, else none.
        database_views: rows makes the visits further rows of their exhibit.
        query_crops: Search these middle parts of each query too, such as 0.8 0.65 0.5 of its height and width: zooms
            that drop wall and frame; the best counts.
        geometric_check: Compare local features of each query with those of so many nearest exhibits, such as 50; where
            few agree about one transform, confidence falls, by how much is chosen on val; 0 is off.
        geometric_reorder: With geometric_check: let agreeing local features decide between the exhibits, as far as val
            gains by it.
        k: Number of neighbours; without it chosen on val.
        tau: Inverse temperature of the confidence; without it chosen on val.
        descriptors: Start from these instead of images: descriptor stores or the reference code's
            descriptors.pkl, several are concatenated.
        store: Folder for the descriptors; without it runs/descriptors/BACKBONE-FINGERPRINT.
        output: Folder for results; without it a dated one under runs/.
        accelerator: Where the backbone runs; auto takes GPUs if there are any, and says so.
        devices: Number of processes, one GPU each (on the CPU: processes that share it).
        num_nodes: Machines, each started with this command by torchrun or SLURM, with a shared store.
        precision: Arithmetic of the backbone: 32 is exact float32 (no TF32). On the CPU, bf16-mixed runs what has a
            side below 128 px in float32, since bfloat16 convolutions are unreliable there. An EfficientNet's first
            four stages are float32 in any case: they suffer from rounding.
        engine: What computes the backbone: torch; compile, PyTorch compiled (for GPUs and long runs: it stops for about
            a minute at the first batch, at the first of a single image, and seldom later); openvino, for convolutional
            networks on CPUs, several times as fast (pip install openvino). On CPUs PyTorch computes what has a side
            below 128 px.
        batch_size: Most images in a batch, fewer of images beyond 500 x 500 px; images in a batch have one shape. With
            --engine openvino it is 1.
        num_workers: Image decoding processes beside each process; without it as many as cores are free, at most 8.
        search_device: Where the exact search runs; without it on all GPUs if FAISS sees some and the
            accelerator is not cpu, else on the CPU.
        profile: Print how long decoding, transfer, network and writing took.
        seed: Seeds random weights and simulated visits.
        report: Write the report page, OUTPUT/report/index.html.
        report_pictures: Queries with pictures in the report, of each split and outcome (wrong, false alarm, right,
            passed over); it lists all queries in any case.
        wandb: Log to Weights & Biases: auto is online if there is a key (WANDB_API_KEY or netrc), else offline.
        wandb_project: Project in Weights & Biases.
        quiet: Print the table and the paths alone.

    Returns:
        What results.json says; None in the processes of a launcher other than the first.

    Raises:
        UserError: If an option, a file or the data is not usable; says which and what to do.
    """
    precision = typing.cast(Precision, str(precision))  # 32 is a number in Python and YAML, and means the same
    arguments = dict(locals())
    started = time.perf_counter()
    check_arguments(arguments, evaluate)
    limit_images(max_megapixels)
    scales = [scales] if isinstance(scales, (int, float)) else scales
    output = None if output is None else Path(output)
    quieten_lightning()
    embedder = None
    if ckpt is not None:
        embedder = load_embedder(Path(ckpt), scales)
        image_size = embedder.image_size if image_size is None else image_size
    options = ExtractionOptions(
        image_size,
        bad_images,
        accelerator,
        devices,
        num_nodes,
        precision,
        engine,
        batch_size,
        num_workers,
        quiet,
        profile,
    )
    method = method_of(arguments)
    search_device = search_device or _default_search_device(options.device)
    console = Console(highlight=False, quiet=not launched_as_first())  # the table and the paths
    progress = Console(highlight=False, quiet=quiet or console.quiet)
    check_key(wandb)

    root = make_demo(DEMO, progress=not quiet) if root is None else Path(root)
    synthetic = (root / "demo.json").exists()
    ground_truth = load_ground_truth(root, database)
    progress.print(_data_line(ground_truth, synthetic), soft_wrap=True)
    descriptors = [descriptors] if isinstance(descriptors, (str, Path)) else descriptors
    name = "descriptors"
    if not descriptors:
        if embedder is None:
            embedder = build_embedder(backbone, weights, pooling, p, stage, scales, patch_rounding, seed)
        name = embedder.backbone.name.replace("/", "_") + ("" if ckpt is None else f"_{Path(ckpt).stem}")
        n_database = len(ground_truth.paths["database"])
        method.check(n_database, embedder.dim, ground_truth.n_classes)
        check_search(n_database, k, tau, search_device, method.rows_per_image)
    elif not launched_as_first():
        return None  # nothing to share out: the first process does it alone
    # Opened before the long part, so as not to fail after it.
    with output_folder(output, name, arguments) if launched_as_first() else nullcontext() as folder:
        if embedder is not None:
            made = describe_images(embedder, ground_truth, store, options, progress)
            for view in method.views(seed):
                describe_views(embedder, ground_truth, view, made, options, progress)
            if not launched_as_first():
                return None  # another process goes on
            descriptors = [made.path]
        opened = open_descriptors(descriptors, ground_truth, method.views(seed))
        recognition = recognise(
            opened,
            ground_truth,
            method,
            k=k,
            tau=tau,
            n_matches=max(N_MATCHES, geometric_check),
            search_device=search_device,
            say=progress.print,
            quiet=quiet,
        )
        check = None
        if geometric_check:
            assert embedder is not None
            check = geometric_check_of(embedder.to(options.device), image_size, geometric_check, geometric_reorder)
            n_candidates = min(geometric_check, ground_truth.n_classes)
            progress.print(f"[bold]geometry[/]     {n_candidates} candidates a query, in float32")
            recognition, check = check_recognition(recognition, ground_truth, check, quiet)
        skipped_images = skipped_images_of(opened, ground_truth)
        results = results_of(
            ground_truth,
            recognition,
            opened,
            options=arguments,
            synthetic=synthetic,
            search_device=search_device,
            method=method,
            check=check,
            skipped_images=skipped_images,
            notes=notes_of(opened, recognition, synthetic, whitening_dim, skipped_images),
            seconds=time.perf_counter() - started,
        )
        assert folder is not None
        written = write_answers(folder, ground_truth, recognition)
        print_table(console, results)  # before the page, so that nothing that happens there hides it
        page = None
        if report:
            page = write_report(folder, results, ground_truth, recognition, report_pictures, check, quiet)
            written.insert(0, page)
        run = open_wandb(wandb, wandb_project, folder, plain_options(arguments))
        if run is not None:
            with staged_in(folder), unharmed(run):
                progress.print(escape(where_logged(run, folder)), soft_wrap=True)
                log_evaluation(run, results, ground_truth, recognition, None if page is None else page.parent)
        written.insert(0 if page is None else 1, write_results(folder, results))  # the last of all: now it is finished
    console.print("wrote " + ", ".join(escape(str(file)) for file in written), soft_wrap=True)
    return results


def _data_line(ground_truth: GroundTruth, synthetic: bool) -> str:
    counts = ground_truth.counts()
    kind = f"{ground_truth.database}{', synthetic' if synthetic else ''}"
    return (
        f"[bold]data[/]         {escape(str(ground_truth.root))} ({kind}): "
        f"{counts['database_images']:,} images of {counts['exhibits']:,} exhibits; "
        f"val {counts['val_queries']:,} queries ({counts['val_met']:,} met), "
        f"test {counts['test_queries']:,} ({counts['test_met']:,} met)"
    )


def _default_search_device(device: str) -> SearchDevice:
    return "gpu" if device == "cuda" and faiss.get_num_gpus() else "cpu"
