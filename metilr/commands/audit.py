"""``metilr audit``: whether a data set is honest, and a collection clean."""

import functools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from metilr.auditing.groups import CopyOptions
from metilr.auditing.labels import Case
from metilr.auditing.schema import ERRORS, MEANINGS, Audit, Kind
from metilr.auditing.subject import Subject
from metilr.data.decode import limit_images
from metilr.data.ground_truth import DatabaseName, load_ground_truth
from metilr.data.tables import as_csv
from metilr.distributed import has_launcher, quieten_lightning
from metilr.errors import UserError, amount
from metilr.evaluation.runs import RUNS
from metilr.extraction.options import ExtractionOptions
from metilr.extraction.store import settings_fingerprint
from metilr.files import alone_in, write_atomically
from metilr.models import ModelOptions
from metilr.progress import make_console, printable

AUDITS = RUNS / "audits"


def audit(
    source: Path,
    database: DatabaseName = "full",
    model: ModelOptions | None = None,
    extraction: ExtractionOptions | None = None,
    copies: CopyOptions | None = None,
    fail_on: Sequence[Kind] = ERRORS,
    output: Path | None = None,
) -> Audit:
    """Look for copies, leaks, doubtful labels and bad images.

    Of a data set or an index. Descriptors that an evaluation with the same model left are used, or made.
    Prints what was found, and writes audit.json, lists as CSV, and a page with the pictures. Nothing of the data is
    changed. Interrupted, the same command continues. The exit status is 1 if there are errors (--fail_on).

    Args:
        source: Folder with images/ and ground_truth/ in the Met layout, or one that metilr index wrote.
        database: Which database of a data set.
        model: What describes the images of a data set; an index has its own.
        extraction: How they are read and where the model runs.
        copies: What counts as a copy.
        fail_on: What counts as an error.
        output: Folder to write into; without it one under runs/audits that stands for these images and this model.

    Returns:
        What audit.json says.

    Raises:
        UserError: If an option, a file or the data is not usable; says which and what to do.
    """
    source = Path(source)
    if has_launcher():
        raise UserError("metilr audit runs as one process; leave the launcher out")
    model, extraction, options = model or ModelOptions(), extraction or ExtractionOptions(), copies or CopyOptions()
    limit_images(extraction.max_megapixels)
    quieten_lightning()
    progress = make_console(quiet=extraction.quiet)
    cases: Mapping[str, Case] = {}
    if (source / "index.json").exists():
        given = [
            field.name for each in (model, extraction) for field in fields(each)
            if getattr(each, field.name) != field.default and field.name not in ("quiet", "max_megapixels")
        ]  # fmt: skip
        if given or database != "full":
            reason = f"has no effect on the index {source}, which carries its own; leave it out"
            raise UserError(reason, given[0] if given else "database")
        subject = _of_index(source)
    else:
        subject, cases = _of_root(source, database, model, extraction, progress)
    if len(subject.truth.paths["database"]) < 2:
        raise UserError(f"{source}: has one database image, and so nothing to compare it with; add others")
    digest = settings_fingerprint(subject.descriptors.origins)
    folder = AUDITS / f"{subject.name}-{digest}" if output is None else Path(output)
    _make(folder)
    from metilr.auditing.page import write_page
    from metilr.auditing.run import audit_images

    with alone_in(folder, "another audit", "name another output"):
        found = audit_images(subject, folder / f"work-{digest}", options, cases, fail_on, extraction.quiet)
        write_lists(folder, found)
        write_page(folder, found, subject.truth, extraction.quiet)
        write_atomically(folder / "audit.json", json.dumps(found.model_dump(by_alias=True), indent=1) + "\n")
    console = make_console()
    _print(console, found)
    console.print(f"wrote {escape(str(folder / 'audit.html'))}, audit.json and lists as CSV beside it")
    return found


@functools.wraps(audit)
def audit_and_exit(*options: Any, **more: Any) -> None:
    """Audit, and end with status 1 if there are errors."""
    if audit(*options, **more).errors:
        sys.exit(1)


def _make(folder: Path) -> None:
    """Make the folder, or take one that an audit made: pictures and lists in it are written anew."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; name a folder", "output")
    if folder.exists() and any(folder.iterdir()) and not [*folder.glob("work-*")]:
        raise UserError(f"{folder}: holds other files; name an empty folder, or a new one", "output")
    folder.mkdir(parents=True, exist_ok=True)


def _of_root(
    root: Path, database: DatabaseName, model: ModelOptions, extraction: ExtractionOptions, progress: Console
) -> tuple[Subject, Mapping[str, Case]]:
    """A data set, with the answers that the published recipe gives to its queries."""
    from metilr.evaluation.recognition import recognise
    from metilr.extraction.describe import describe_images
    from metilr.extraction.descriptors import open_descriptors
    from metilr.models.checkpoints import build_model
    from metilr.models.hub import pin

    truth, embedder = load_ground_truth(root, database), build_model(pin(model))
    extraction = replace(extraction, bad_images="skip").for_model(embedder)
    made = describe_images(embedder, truth, None, extraction, progress)
    opened = open_descriptors([made.path], truth)
    names = [str(exhibit) for exhibit in truth.exhibit_ids.tolist()]
    subject = Subject(root.resolve().name, truth, names, opened)
    try:
        return subject, recognise(opened, truth, say=progress.print, quiet=extraction.quiet).cases(truth)
    except UserError as error:
        make_console().print(f"[bold yellow]note:[/] what leaks are worth cannot be measured: {escape(str(error))}")
        return subject, {}


def _of_index(path: Path) -> Subject:
    from metilr.collection.index_schema import Index
    from metilr.extraction.descriptors import open_descriptors

    index = Index.load(path)
    truth = index.catalogue.ground_truth()
    opened = open_descriptors([path / index.store], truth)
    return Subject(index.name or path.resolve().name, truth, index.catalogue.names, opened)


def _print(console: Console, found: Audit) -> None:
    images = ", ".join(f"{split} {n:,}" for split, n in found.images.items())
    console.print(
        f"[bold]audited[/]      {escape(printable(found.source))}: {images} images, {amount(found.exhibits, 'exhibit')}"
    )
    for kind, n in found.counts.items():
        if n:
            colour = "red" if kind in found.errors else "yellow"
            console.print(f"[{colour}]{n:>7,}  {kind:<13}[/] {MEANINGS[kind]}")
    for split, leak in found.leakage.items():
        if leak.n_leaked and leak.difference:
            value, low, high = (100 * each for each in leak.difference["gap"])
            said = f"GAP {100 * leak.with_leaked.gap:.2f} with {amount(leak.n_leaked, 'leak')}"
            console.print(
                f"[bold]leakage[/]      {split}: {said}, {value:+.2f} ({low:+.2f} to {high:+.2f}) against without"
            )
    single = f"{amount(found.single_image, 'exhibit')} with one image"
    console.print(f"[bold]coverage[/]     {single}; {len(found.coverage):,} listed as most easily confused")
    if found.photographers:
        people = ", ".join(map(printable, found.photographers[:5]))
        console.print(f"[bold]in both[/]      photos in val and in test are by: {escape(people)}")
    errors = ", ".join(f"{kind} {n:,}" for kind, n in found.errors.items())
    console.print(f"[bold red]errors[/]       {errors}" if errors else "[bold green]no errors[/]")


def write_lists(folder: Path, found: Audit) -> None:
    """Write what was found as CSV files, to be worked through in a spreadsheet."""
    copies = [
        (number, copies.kind, copies.same, round(copies.score, 4), image.split, image.path, image.exhibit,
         image.mirrored, image.quarter_turns)
        for number, copies in enumerate(found.copies, start=1) for image in copies.images
    ]  # fmt: skip
    labels = [
        (doubt.kind, round(doubt.confidence, 4), doubt.image.split, doubt.image.path, doubt.image.exhibit, doubt.seen,
         doubt.nearest.path, round(doubt.similarity, 4), doubt.inliers, doubt.own_inliers)
        for doubt in found.labels
    ]  # fmt: skip
    images = [(look.kind, look.image.split, look.image.path, look.image.exhibit, look.said) for look in found.looks]
    coverage = [
        (each.exhibit, each.n_images, each.own, round(each.other, 4), each.nearest_exhibit,
         each.images[0].path, each.images[1].path)
        for each in found.coverage
    ]  # fmt: skip
    lists: dict[str, tuple[tuple[str, ...], Sequence[Sequence[object]]]] = {
        "copies": (("group", "kind", "same", "score", "split", "path", "exhibit", "mirrored", "quarter_turns"), copies),
        "labels": (("kind", "confidence", "split", "path", "exhibit", "seen", "nearest", "similarity", "inliers",
                    "own_inliers"), labels),
        "images": (("kind", "split", "path", "exhibit", "said"), images),
        "coverage": (("exhibit", "images", "own", "other", "nearest_exhibit", "path", "nearest_path"), coverage),
    }  # fmt: skip
    for name, (header, rows) in lists.items():
        write_atomically(folder / f"{name}.csv", as_csv([header, *rows]))
