"""``metilr evaluate``, in the repository ``python evaluate.py`` too: from photographs to GAP, top to bottom."""

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from metilr.cli import flat, flat_defaults
from metilr.data.decode import limit_images
from metilr.data.ground_truth import DatabaseName, GroundTruth, load_ground_truth
from metilr.distributed import PARENT_VARIABLE, end_if_unguarded, end_with_parent, launched_as_first, quieten_lightning
from metilr.errors import UserError
from metilr.evaluation.calibration import calibrate_recognition
from metilr.evaluation.database import class_weights_of, views_of
from metilr.evaluation.options import MethodOptions, ReportOptions, without_deleted
from metilr.evaluation.read_run import read_run
from metilr.evaluation.recognition import Recognition, check_method, check_recognition, recognise
from metilr.evaluation.results import Results
from metilr.evaluation.runs import output_folder, plain_options, refuse_other_options, summarise, write_answers
from metilr.extraction.descriptors import open_descriptors
from metilr.extraction.options import ExtractionOptions
from metilr.models import ModelOptions
from metilr.progress import make_console
from metilr.report.page import write_report
from metilr.report.tables import print_table
from metilr.report.wandb import check_key, finishing, log_evaluation, open_wandb, staging_beside, where_logged

if TYPE_CHECKING:
    from metilr.geometry.check import GeometricCheck

# Options that make descriptors from images.
OF_THE_IMAGES = (
    *("ckpt", "backbone", "weights", "pooling", "p", "stage", "patch_rounding", "scales"),
    *("image_size", "image_shape", "bad_images", "store", "engine", "profile"),
)


def evaluate(
    root: Path | None = None,
    database: DatabaseName = "full",
    model: ModelOptions | None = None,
    extraction: ExtractionOptions | None = None,
    method: MethodOptions | None = None,
    report: ReportOptions | None = None,
    descriptors: Sequence[Path] = (),
    store: Path | None = None,
    output: Path | None = None,
) -> Results | None:
    """Measure how well a model recognises exhibits: GAP, GAP⁻ and ACC.

    Descriptors are computed once and kept in a store under runs/descriptors; a second run with the same
    settings reuses them, an interrupted one continues. k and tau are chosen by GAP on val; test is scored once.
    Results and the report page go into a new folder under runs/, local features of a geometric check into
    runs/local_features, the demo museum into runs/demo. Figures and pictures of failures also go to Weights & Biases,
    online if there is a key, else into the results' folder; wandb off leaves that out.

    Args:
        root: Folder with images/ and ground_truth/ in the Met layout. Without it: the built-in demo museum,
            which is synthetic.
        database: Match against MET_database.json (full) or mini_MET_database.json (mini).
        model: What describes the images.
        extraction: How images are read and where the model runs.
        method: How descriptors are compared.
        report: What is left behind besides the results.
        descriptors: Start from these instead of images: descriptor stores or the reference code's
            descriptors.pkl, several are concatenated.
        store: Folder for the descriptors; without it runs/descriptors/BACKBONE-FINGERPRINT.
        output: Folder for results; without it a dated one under runs/.

    Returns:
        What results.json says; None in the processes of a launcher other than the first.
    """
    end_if_unguarded()
    if parent := os.environ.pop(PARENT_VARIABLE, None):
        end_with_parent(int(parent))
    from metilr.extraction.describe import describe_images  # these load torch, which --help need not
    from metilr.models.checkpoints import build_model
    from metilr.models.hub import LOOKED_FOR, pin

    started = time.perf_counter()
    model, extraction = model or ModelOptions(), extraction or ExtractionOptions()
    method, report = method or MethodOptions(), report or ReportOptions()
    root, output, store = (None if folder is None else Path(folder) for folder in (root, output, store))
    descriptors = [Path(path) for path in ([descriptors] if isinstance(descriptors, (str, Path)) else descriptors)]
    options = flat({"root": root, "database": database, "model": model, "extraction": extraction, "method": method,
                    "report": report, "descriptors": descriptors, "store": store, "output": output})  # fmt: skip
    _refuse_idle(options)
    check_key(report.wandb)
    limit_images(extraction.max_megapixels)
    quieten_lightning()
    is_first, quiet = launched_as_first(), extraction.quiet
    console = make_console(quiet=not is_first)
    progress = make_console(quiet=quiet or not is_first)
    if method.search_device is None:
        import faiss

        has_gpu = extraction.device == "cuda" and faiss.get_num_gpus()
        method = replace(method, search_device="gpu" if has_gpu else "cpu")

    if root is None:
        from metilr.demo import DEMO, make_demo  # what draws needs OpenCV, as the geometric check does

        root = make_demo(DEMO, progress=not quiet)
    synthetic = (root / "demo.json").exists()
    ground_truth = load_ground_truth(root, database)
    model, method = pin(model), pin(method)
    options |= {name: place for name, place in (vars(model) | vars(method)).items() if name in LOOKED_FOR}
    if output is not None and (output / "results.json").exists():
        finished = _finished(output, ground_truth, options)
        console.print(f"finished already: {escape(str(output))}")
        return finished if is_first else None
    progress.print(_data_line(ground_truth, synthetic))
    classifier = class_weights_of(method, model.ckpt, ground_truth)
    views, embedder, name, n_made = views_of(method, model.seed), None, "descriptors", 0
    if not descriptors:
        embedder = build_model(model)
        extraction = extraction.for_model(embedder)
        check_method(method, len(ground_truth.paths["database"]), embedder.dim, ground_truth.n_classes)
        name = embedder.backbone.name.replace("/", "_") + ("" if model.ckpt is None else f"_{Path(model.ckpt).stem}")
    elif not is_first:
        return None  # nothing to share out: the first process does it alone

    # Opened before the long part, so as not to fail after it.
    with output_folder(output, name, options) if is_first else nullcontext() as folder:
        if embedder is not None:
            made = describe_images(embedder, ground_truth, store, extraction, progress, views)
            if not is_first:
                return None  # another process goes on
            descriptors, n_made = [made.path], made.n_made
        opened = open_descriptors(descriptors, ground_truth, views)
        recognition, check = recognise(opened, ground_truth, method, progress.print, quiet, classifier), None
        if method.geometric_check:
            from metilr.geometry.check import geometric_check_of

            assert embedder is not None
            embedder, n = embedder.to(extraction.device), method.geometric_check
            progress.print(f"[bold]geometry[/]     {min(n, ground_truth.n_classes)} candidates a query, in float32")
            check = geometric_check_of(
                embedder, extraction.resize_to, n, method.geometric_reorder, method.geometric_turns
            )
            recognition, check = check_recognition(recognition, ground_truth, check, quiet)
        fit = None
        if method.confidence == "calibrated":
            progress.print("[bold]confidence[/]   fitted on val")
            recognition, fit = calibrate_recognition(recognition, opened, ground_truth, method)
        results = summarise(
            ground_truth, recognition, opened, method, check, fit, options=options, synthetic=synthetic,
            seconds=time.perf_counter() - started, n_made=n_made,
        )  # fmt: skip
        assert folder is not None
        _leave_behind(folder, results, ground_truth, recognition, check, report, console, progress)
    return results


def _finished(folder: Path, ground_truth: GroundTruth, options: Mapping[str, Any]) -> Results:
    """Read what the same command has left, or refuse what another one has."""
    refuse_other_options(folder, options_of_run(folder), plain_options(options))
    results = read_run(folder).results
    if results.data.fingerprint != ground_truth.fingerprint():
        changed = f"holds results of {ground_truth.root} as it was before its ground truth changed"
        raise UserError(f"{folder}: {changed}; name another folder, or delete it", "output")
    return results


def options_of_run(folder: Path) -> dict[str, Any]:
    """The options that a finished run was made with, defaults for those that it is too old to have."""
    return {**plain_options(flat_defaults(evaluate)), **without_deleted(read_run(folder).config)}


def _leave_behind(
    folder: Path,
    results: Results,
    ground_truth: GroundTruth,
    recognition: Recognition,
    check: "GeometricCheck | None",
    report: ReportOptions,
    console: Console,
    progress: Console,
) -> None:
    """Write predictions, whitening, report page, W&B's run and, last, ``results.json``: now it is finished."""
    written = write_answers(folder, ground_truth, recognition)
    print_table(console, results, report.metrics)  # before the page, so that nothing that happens there hides it
    pages = []
    if report.report:
        quiet = progress.quiet
        pages = [write_report(folder, results, ground_truth, recognition, report.report_pictures, check, quiet)]
    run = open_wandb(report.wandb, report.wandb_project, folder, results.options or {})
    if run is not None:
        with staging_beside(folder), finishing(run):
            progress.print(escape(where_logged(run, folder)))
            log_evaluation(run, results, ground_truth, recognition, pages[0].parent if pages else None)
    written = [*pages, results.write(folder), *written]
    for file in written:
        console.print(f"wrote {escape(str(file))}")


def _refuse_idle(options: Mapping[str, Any]) -> None:
    """Refuse options that would be ignored with descriptors: recorded all the same, they would lie."""
    if options["descriptors"] and options["database_rows"] == "classifier":
        reason = "needs a ckpt, which goes without descriptors; choose images or prototypes"
        raise UserError(f"classifier: {reason}", "database_rows")
    defaults = flat_defaults(evaluate)
    for name in (*OF_THE_IMAGES, "geometric_check") if options["descriptors"] else ():
        if options[name] != defaults[name]:
            reason = "needs images, but descriptors are given, which were made before"
            raise UserError(f"{reason}; leave one of the two out", name)


def _data_line(ground_truth: GroundTruth, synthetic: bool) -> str:
    counts = ground_truth.counts()
    kind = f"{ground_truth.database}{', synthetic' if synthetic else ''}"
    return (
        f"[bold]data[/]         {escape(str(ground_truth.root))} ({kind}): "
        f"{counts['database_images']:,} images of {counts['exhibits']:,} exhibits; "
        f"val {counts['val_queries']:,} queries ({counts['val_met']:,} met), "
        f"test {counts['test_queries']:,} ({counts['test_met']:,} met)"
    )
