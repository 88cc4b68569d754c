"""``metilr rerun results.json``: an evaluation once more, and whether its figures come out again."""

import contextlib
import json
import shutil
import sys
import typing
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from metilr.cli import call, options_of
from metilr.commands.evaluate import evaluate
from metilr.data.ground_truth import image_sizes, load_ground_truth
from metilr.demo import DEMO
from metilr.errors import UserError
from metilr.evaluation.database import views_of
from metilr.evaluation.options import MethodOptions, without_deleted
from metilr.evaluation.results import FIGURES, SCHEMA_VERSION, Results, read_results
from metilr.evaluation.runs import make_output
from metilr.extraction.descriptors import views_store
from metilr.extraction.options import Accelerator
from metilr.extraction.store import DescriptorStore, differing_settings
from metilr.files import write_atomically
from metilr.models import RANDOM

Verdict = Literal["exactly", "within the tolerance", "not"]
# Of a figure in [0, 1]: 0.1 points, the last digit that is published. Other hardware or versions round descriptors
# differently by about 1e-6, which can exchange two answers whose confidences are next to equal.
COUNTS = ("n_queries", "n_met")
TOLERANCE = 1e-3
# What may explain a difference; where the descriptors lie is none.
MADE_BY = ("data", "model", "whitening", "elements", "geometric_check", "search", "versions", "machine")
WORDS = (RANDOM, "pca", "learned", "none")  # in place of a file
NOTHING = "nothing else that is recorded differs; of the images' contents only the files' sizes are recorded"
PLACES = ("store", "made_with", "pickle", "views", "concatenated")


def rerun(
    results: Path,
    output: Path | None = None,
    root: Path | None = None,
    ckpt: Path | None = None,
    weights: Path | None = None,
    whitening: Path | None = None,
    accelerator: Accelerator | None = None,
    devices: int | Literal["auto"] | None = None,
    describe_again: bool = False,
    quiet: bool = False,
) -> dict[str, Any] | None:
    """Repeat an evaluation and say whether its figures come out again.

    Figures agree if each of GAP, GAP⁻ and ACC, on val and on test, is the recorded one within 0.1 points, of the same
    numbers of queries. Where they are not exactly the same, what else differs is named: data, weights, settings,
    devices, library versions. The exit status is 1 if they do not agree.

    Args:
        results: The results.json, or the folder with it.
        output: Folder for the new results, and for rerun.json with the comparison; without it a dated one under runs/.
        root: Where the data lies now; without it where it was.
        ckpt: Where the checkpoint lies now, if it was moved.
        weights: Where the file with weights lies now, if it was moved.
        whitening: Where the saved whitening lies now, if it was moved.
        accelerator: As in metilr evaluate, in place of the recorded one.
        devices: As in metilr evaluate, in place of the recorded number.
        describe_again: Describe the images again, into OUTPUT/store; without it a finished store is used as it is, if
            it is of the images as they are.
        quiet: Print tables and paths alone.

    Returns:
        What rerun.json says; None in the processes of a launcher other than the first.

    Raises:
        UserError: If the file does not say how to repeat the run, or the run cannot be repeated here.
    """
    recorded = read_results(results)
    options = _options(Path(results), recorded)
    moved = {"ckpt": ckpt, "weights": weights, "whitening": whitening}
    for name, file in moved.items():
        if file is None:
            continue
        if options[name] in (None, *WORDS):
            raise UserError(f"--{name} {file}: the recorded run read no such file ({options[name]}); leave it out")
        if not Path(file).is_file():
            raise UserError(f"--{name} {file}: no such file; name the one that the run read, where it lies now")
        options[name] = file if name == "ckpt" else str(file)
    given = {"root": root, "accelerator": accelerator, "devices": devices}
    options |= {name: value for name, value in given.items() if value is not None}
    folder = make_output(output, "rerun")
    options |= {"output": folder, "quiet": quiet, "wandb": "off"}
    if not options["descriptors"]:  # else there is nothing to describe
        # A file that may be somebody else's says where the rows were: there they are read, and nothing is written.
        named = options["store"] or recorded.model.store
        places = [] if describe_again or not named else [Path(recorded.directory) / named, Path(named)]
        options["store"] = next((place for place in places if _is_current(place, options)), folder / "store")
    with _kept_if_of_use(folder, output):
        now = call(evaluate, options)
    if now is None:
        return None
    comparison = compare_results(recorded, now)
    write_atomically(folder / "rerun.json", json.dumps({"of": str(results), **comparison}, indent=1) + "\n")
    _print(Console(highlight=False), comparison, folder / "rerun.json")
    if comparison["agree"] == "not":
        sys.exit(1)
    return comparison


def _is_current(path: Path, options: Mapping[str, Any]) -> bool:
    """Whether a store, with the views that the run needs, is finished and of the image files as they are."""
    store = DescriptorStore(path)
    try:
        ground_truth = load_ground_truth(options["root"] or DEMO, options["database"])
        sizes = image_sizes(ground_truth)
        parts = [(store, sizes)]
        method = MethodOptions(**{field.name: options[field.name] for field in fields(MethodOptions)})
        for view in views_of(method, options["seed"]):
            of_view = {split: np.repeat(sizes[source], view.n) for split, source in view.of.items()}
            parts.append((views_store(store, view)[0], of_view))
        return all(_is_made(part, of_part, options["bad_images"] == "stop") for part, of_part in parts)
    except UserError:  # what is wrong with the data evaluate says
        return False


def _is_made(store: DescriptorStore, sizes: Mapping[str, np.ndarray], retry_bad: bool) -> bool:
    manifest = store.manifest()
    return (
        manifest["complete"]
        and manifest["counts"] == {split: len(of_split) for split, of_split in sizes.items()}
        and not any(store.pending(split, of_split, retry_bad).any() for split, of_split in sizes.items())
    )


@contextlib.contextmanager
def _kept_if_of_use(folder: Path, output: Path | None) -> Iterator[None]:
    """Remove a dated folder again if the block fails, unless there are descriptors in it: then say how to go on."""
    try:
        yield
    except BaseException as error:
        if output is not None:
            raise
        if not (folder / "store").exists():
            shutil.rmtree(folder, ignore_errors=True)
            raise
        how = f"to continue, add --output {folder}"
        if isinstance(error, KeyboardInterrupt):
            raise UserError(f"interrupted; descriptors are kept, {how}") from None
        if isinstance(error, UserError):
            raise UserError(f"{error} ({how})") from None
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"{error.filename or folder}: {error.strerror}; descriptors are kept, {how}") from None
        raise


def compare_results(recorded: Results, now: Results) -> dict[str, Any]:
    """Set the figures of two results side by side.

    Returns:
        ``agree`` (``"exactly"``, ``"within the tolerance"`` or ``"not"``), ``tolerance``, ``figures`` (by split and
        name the recorded one and the new one), and ``differences``: what differs of what made them, in words.
    """
    figures = {
        split: {name: [value, getattr(now.splits[split], name)] for name, value in of_split.items()}
        for split, of_split in _figures_of(recorded).items()
    }
    pairs = [(name, *pair) for of_split in figures.values() for name, pair in of_split.items()]
    agree: Verdict = "not"
    if all(a == b for _, a, b in pairs):
        agree = "exactly"
    elif all(abs(a - b) <= (TOLERANCE if name in FIGURES else 0) for name, a, b in pairs):
        agree = "within the tolerance"
    differences = [
        f"{part}: {line}" if part in ("versions", "machine") else line
        for part in MADE_BY
        for line in differing_settings(_of(recorded, part), _of(now, part))
    ]
    if recorded.knn.tuned_on:
        differences += differing_settings(*({f"tuned {key}": getattr(of.knn, key) for key in ("k", "tau")}
                                            for of in (recorded, now)))  # fmt: skip
    return {"agree": agree, "tolerance": TOLERANCE, "figures": figures, "differences": differences}


def _figures_of(results: Results) -> dict[str, dict[str, float]]:
    """The figures to come out again, by split and name."""
    return {split: figures.model_dump(include={*FIGURES, *COUNTS}) for split, figures in results.splits.items()}


def _options(path: Path, recorded: Results) -> dict[str, Any]:
    options = recorded.options
    if recorded.schema_version < SCHEMA_VERSION or options is None:
        raise UserError(
            f"{path}: of schema {recorded.schema_version}, which does not say how to repeat the run; evaluate again"
        )
    try:
        return options_of(evaluate, without_deleted(options))
    except ValueError as error:
        raise UserError(f"{path}: its options are not this version's: {error}") from None


def _of(results: Results, part: str) -> dict[str, Any]:
    """A part of the results without what says only where things lie, with the device of the last session."""
    content = without_deleted(results.recorded().get(part) or {})
    made_with = typing.cast(list[dict[str, Any]], content.get("made_with") or [])
    made_on = {name: sorted({str(session.get(name)) for session in made_with}) for name in ("device", "processor")}
    return {**{key: value for key, value in content.items() if key not in PLACES}, **(made_on if made_with else {})}


def _print(console: Console, comparison: Mapping[str, Any], file: Path) -> None:
    table = Table(title="recorded and repeated, in percent", title_justify="left", box=SIMPLE_HEAD)
    for column in ("split", "figure", "recorded", "now", "difference"):
        table.add_column(column, justify="left" if column in ("split", "figure") else "right", no_wrap=True)
    names = {"gap": "GAP", "gap_minus": "GAP⁻", "acc": "ACC"}
    for split, figures in comparison["figures"].items():
        for name, (before, now) in figures.items():
            if name in COUNTS and before == now:
                continue
            scale, form = (1, ",") if name in COUNTS else (100, ".2f")
            cells = [format(scale * value, form) for value in (before, now)]
            table.add_row(split, names.get(name, name), *cells, f"{scale * (now - before):+.3g}")
    console.print(table)
    agree = comparison["agree"]
    limit = f" (of {100 * comparison['tolerance']:g} points)" if agree != "exactly" else ""
    console.print(f"[bold]the figures agree {agree}[/]{limit}" if agree != "not" else
                  f"[bold red]the figures do not agree[/] within {100 * comparison['tolerance']:g} points")  # fmt: skip
    if agree != "exactly":
        for difference in comparison["differences"] or [NOTHING]:
            console.print(f"  {escape(difference)}", soft_wrap=True)
    console.print(f"wrote {escape(str(file))}", soft_wrap=True)
