"""``metilr rerun results.json``: an evaluation once more, and whether its figures come out again."""

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.markup import escape

from metilr.cli import call, options_of
from metilr.commands.evaluate import evaluate
from metilr.data.ground_truth import load_ground_truth
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
from metilr.progress import make_console
from metilr.report.tables import METRICS, TextTable

# Of a figure in [0, 1]: 0.1 points, the last digit that is published. Other hardware or versions round descriptors
# differently by about 1e-6, which can exchange two answers whose confidences are next to equal.
TOLERANCE = 1e-3
# What may explain a difference; where things lie is none.
MADE_BY = (
    "data", "model", "whitening", "elements", "geometric_check", "confidence", "classifier", "search", "versions",
    "machine",
)  # fmt: skip
PLACES = ("store", "made_with", "pickle", "views", "concatenated")
WORDS = (RANDOM, "pca", "learned", "none")  # in place of a file
NOTHING = "nothing else that is recorded differs; of the images' contents only the files' sizes are recorded"


def rerun(
    results: Path,
    output: Path | None = None,
    root: Path | None = None,
    ckpt: str | Path | None = None,
    weights: str | Path | None = None,
    whitening: str | Path | None = None,
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
        describe_again: Describe the images again, into OUTPUT/store; without it the recorded store is read, if it is
            finished and of the images as they are, else the one of metilr evaluate is continued.
        quiet: Print tables and paths alone.

    Returns:
        What rerun.json says; None in the processes of a launcher other than the first.
    """
    recorded = read_results(results)
    options = _options(Path(results), recorded)
    for name, file in {"ckpt": ckpt, "weights": weights, "whitening": whitening}.items():
        if file is not None:
            if options[name] in (None, *WORDS):
                raise UserError(f"{file}: the recorded run read no such file ({options[name]}); leave it out", name)
            options[name] = str(file)
    given = {"root": root, "accelerator": accelerator, "devices": devices}
    options |= {name: value for name, value in given.items() if value is not None}
    folder = make_output(output, "rerun")
    if (folder / "results.json").exists():  # which evaluate would not make again
        raise UserError(f"{folder}: holds results already; name another folder, or delete it", "output")
    options |= {"output": folder, "quiet": quiet, "wandb": "off"}
    if not options["descriptors"]:  # else there is nothing to describe
        # A file that may be somebody else's says where the rows were: there they are read, and nothing is written.
        named = options["store"] or recorded.model.store
        places = [] if describe_again or not named else [Path(recorded.directory) / named, Path(named)]
        options["store"] = next((place for place in places if _is_current(place, options)), None)
        if describe_again:
            options["store"] = folder / "store"
            make_console(quiet=quiet).print(f"describing into {escape(str(folder))}")
    try:
        now = call(evaluate, options)
    except BaseException:
        if output is None and not (folder / "store").exists():
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if now is None:
        return None
    comparison = compare_results(recorded, now)
    write_atomically(folder / "rerun.json", json.dumps({"of": str(results), **comparison}, indent=1) + "\n")
    _print(comparison, folder / "rerun.json")
    if comparison["agree"] == "not":
        sys.exit(1)
    return comparison


def _options(path: Path, recorded: Results) -> dict[str, Any]:
    """The recorded options, read as those of a command line."""
    if recorded.schema_version < SCHEMA_VERSION or recorded.options is None:
        reason = f"of schema {recorded.schema_version}, which does not say how to repeat the run"
        raise UserError(f"{path}: {reason}; evaluate again")
    try:
        return options_of(evaluate, without_deleted(recorded.options))
    except UserError as error:
        raise UserError(f"{path}: its options are not this version's: {error}") from None


def _is_current(path: Path, options: Mapping[str, Any]) -> bool:
    """Whether a store, with the views that the run needs, is finished and of the image files as they are."""
    from metilr.extraction.describe import image_sizes  # torch

    try:
        sizes = image_sizes(load_ground_truth(options["root"] or DEMO, options["database"]))
        method = MethodOptions(**{field.name: options[field.name] for field in fields(MethodOptions)})
        parts = [(DescriptorStore(path), sizes)]
        for view in views_of(method, options["seed"]):
            of_view = {split: np.repeat(sizes[source], view.n) for split, source in view.of.items()}
            parts.append((views_store(parts[0][0], view)[0], of_view))
        retry_bad = options["bad_images"] == "stop"
        return all(
            store.is_complete
            and store.manifest().counts == {split: len(of_split) for split, of_split in of_part.items()}
            and not any(store.pending(split, of_split, retry_bad).any() for split, of_split in of_part.items())
            for store, of_part in parts
        )
    except UserError:  # what is wrong with the data evaluate says
        return False


def compare_results(recorded: Results, now: Results) -> dict[str, Any]:
    """Set the figures of two results side by side, as rerun.json holds them.

    ``agree`` is "exactly", "within the tolerance" or "not"; ``figures`` has by split and name the recorded one and the
    new one; ``differences`` says what differs of what made them.
    """
    figures = {
        split: {
            name: [getattr(of, name) for of in (before, now.splits[split])] for name in (*FIGURES, "n_queries", "n_met")
        }
        for split, before in recorded.splits.items()
    }
    off_by = [(name, abs(a - b)) for of_split in figures.values() for name, (a, b) in of_split.items()]
    if not any(difference for _, difference in off_by):
        agree = "exactly"
    elif all(difference <= (TOLERANCE if name in FIGURES else 0) for name, difference in off_by):
        agree = "within the tolerance"
    else:
        agree = "not"
    differences = [
        f"{part}: {line}" if part in ("versions", "machine") else line
        for part in MADE_BY
        for line in differing_settings(_part(recorded, part), _part(now, part))
    ]
    if recorded.knn.tuned_on:
        differences += differing_settings(*({"tuned k": of.knn.k, "tuned tau": of.knn.tau} for of in (recorded, now)))
    return {"agree": agree, "tolerance": TOLERANCE, "figures": figures, "differences": differences}


def _part(results: Results, part: str) -> dict[str, Any]:
    """A part of the results without what says only where things lie, with the devices of the descriptors."""
    content = dict(results.recorded().get(part) or {})
    if part == "elements" and results.elements:
        content = without_deleted(results.elements.model_dump())  # with what an older one did not have to say
    if part == "confidence":  # what was fitted differs wherever the descriptors do
        return {"calibrated confidence": content.get("is_used"), "background": content.get("n_background")}
    if part == "model" and (sessions := content.get("made_with")):
        content |= {name: sorted({str(session.get(name)) for session in sessions}) for name in ("device", "processor")}
    return {key: value for key, value in content.items() if key not in PLACES}


def _print(comparison: Mapping[str, Any], file: Path) -> None:
    console = make_console()
    rows = []
    for split, figures in comparison["figures"].items():
        for name, (before, now) in figures.items():
            if name in FIGURES:
                percent = f"{100 * before:.2f}", f"{100 * now:.2f}", f"{100 * (now - before):+.3g}"
                rows.append([f"{split} {METRICS[name]}", *percent])
            elif before != now:
                rows.append([f"{split} {name}", f"{before:,}", f"{now:,}", f"{now - before:+,}"])
    header = ["figure", "recorded", "now", "difference"]
    console.print(TextTable("recorded and repeated, in percent", [], header, rows).rich(), soft_wrap=False)
    agree, points = comparison["agree"], f"{100 * comparison['tolerance']:g} points"
    if agree == "not":
        console.print(f"[bold red]the figures do not agree[/] within {points}")
    else:
        console.print(f"[bold]the figures agree {agree}[/]{'' if agree == 'exactly' else f' (of {points})'}")
    for difference in [] if agree == "exactly" else comparison["differences"] or [NOTHING]:
        console.print(f"  {escape(difference)}")
    console.print(f"wrote {escape(str(file))}")
