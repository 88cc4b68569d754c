"""What an evaluation leaves behind: results.json, predictions, the resolved configuration, the table."""

import contextlib
import csv
import json
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from metilr.data.ground_truth import QUERY_FILES, GroundTruth
from metilr.errors import UserError
from metilr.files import flush, named, remove_leftovers, write_atomically
from metilr.geometric_check import GeometricCheck
from metilr.geometric_evidence import Checked, inlier_lead, inliers_of_answers
from metilr.knn import NO_LABEL, NO_ROW, Predictions
from metilr.locks import alone_in
from metilr.method import Method
from metilr.metrics import DISTRACTOR
from metilr.recognition import Recognition
from metilr.scoring import further_figures, headline_unit
from metilr.sources import Descriptors
from metilr.versions import commit, library_versions, machine
from metilr.whitening import LearnedWhitening

SCHEMA_VERSION = 2
READABLE_SCHEMAS = (1, 2)  # 1 does not hold the options: it can be compared, but not repeated
RUNS = Path("runs")
LEFT_BEHIND = ("predictions/val.csv", "predictions/test.csv", "whitening.npz", "report/index.html")
FILES_OR_WORDS = ("weights", "whitening")  # options that are a file's path, or a word such as "random" or "pca"
CHECK_COLUMNS = ("inliers", "inlier_lead")  # after the others, where geometry was checked
_WHITENING_SOURCES = {"pca": "learned on the database", "learned": "learned from pairs"}
PREDICTION_COLUMNS = (
    "path", "exhibit_id", "predicted_id", "log_confidence", "confidence", "similarity", "nearest_path", "correct",
)  # fmt: skip


def make_output(output: Path | None, name: str) -> Path:
    """Make the folder that a command writes into.

    Args:
        output: The folder, which may be there; None: a new, dated one under ``runs/``.
        name: Ends the dated folder's name.

    Raises:
        UserError: If it cannot be made.
    """
    try:
        folder = output or make_new_folder(RUNS, f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{name}")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(output, error) from None
    return folder


def _unwritable(output: Path | None, error: OSError) -> UserError:
    return UserError(f"--output {output or RUNS}: cannot be written ({error.strerror}); name another folder")


@contextlib.contextmanager
def output_folder(output: Path | None, name: str, options: Mapping[str, Any]) -> Iterator[Path]:
    """Open the output folder of a run, held against others, and write the resolved configuration before any work.

    A dated folder goes again if the run fails. What a run left that did not get to its ``results.json`` goes first.

    Args:
        output: The folder; None: a dated one under ``runs/``.
        name: Ends the dated folder's name.
        options: All options as resolved; ``config.yaml`` repeats the run.

    Raises:
        UserError: If the folder cannot be written, holds results already, or another run is at work there.
    """
    _refuse_results(output)  # before the lock's file is made there
    folder = make_output(output, name)
    try:
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(alone_in(folder, "another run", "name another --output"))
                _refuse_results(output)
                remove_leftovers(folder)
                if (folder / "config.yaml").exists():  # of a run that was killed: its options may have been others
                    for name in LEFT_BEHIND:
                        (folder / name).unlink(missing_ok=True)
                write_atomically(folder / "config.yaml", yaml.safe_dump(plain_options(options), sort_keys=False))
            except OSError as error:
                raise _unwritable(output, error) from None
            yield folder
    except BaseException:
        if output is None:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _refuse_results(output: Path | None) -> None:
    try:
        if output is not None and (output / "results.json").exists():
            raise UserError(f"--output {output}: holds results already; name another folder, or delete it")
    except OSError as error:
        raise _unwritable(output, error) from None


def results_of(
    ground_truth: GroundTruth,
    recognition: Recognition,
    opened: Descriptors,
    *,
    options: Mapping[str, Any],
    synthetic: bool,
    search_device: str,
    method: Method,
    check: GeometricCheck | None,
    skipped_images: list[dict[str, str]],
    notes: list[str],
    seconds: float,
) -> dict[str, Any]:
    """Put together what ``results.json`` says; every figure in [0, 1]."""
    applied, tuning = recognition.whitening, recognition.tuning
    further = further_figures(ground_truth, recognition)
    return {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": _command(),
        "directory": str(Path.cwd()),
        "options": plain_options(options),
        "seconds": round(seconds, 1),
        "peak_memory_gb": peak_memory_gb(),
        "notes": notes,
        "data": {
            "root": ground_truth.root.resolve().name,
            "database": ground_truth.database,
            "synthetic": synthetic,
            "counts": ground_truth.counts(),
            "fingerprint": ground_truth.fingerprint(),
        },
        "model": _model(opened),
        "whitening": None
        if applied is None
        else {
            "source": _WHITENING_SOURCES.get(method.whitening, Path(method.whitening).name),
            "sha256": applied.sha256(),
            "dim": applied.dim,
            "shrinkage": applied.shrinkage,
            "learned_on": applied.n,
            **({"pairs": applied.n_pairs} if isinstance(applied, LearnedWhitening) else {}),
            "supported_dim": applied.supported_dim,
        },
        "elements": {
            "visits": method.visits,
            "database_views": method.database_views,
            "query_crops": list(method.query_crops),
            "crop_similarity": method.crop_similarity,
            "dba": method.dba,
            "hubness": {"neighbours": method.hubness, "beta": recognition.beta, "tuned_on": "val"}
            if method.hubness
            else None,
        },
        "geometric_check": None
        if check is None
        else {
            "candidates": check.candidates,
            "reorder": check.reorder,
            "boost": check.boost,
            "gate": {"weight": check.gate.weight, "enough": check.gate.enough},
            "tuned_on": "val",
            "features": check.extractor.settings(),
        },
        "search": {"device": search_device, "exact": True},
        "knn": {
            "k": recognition.k,
            "tau": recognition.tau,
            "tuned_on": None if tuning is None else "val",
            "grid": None
            if tuning is None
            else {"k": list(tuning.k_grid), "tau": list(tuning.tau_grid), "val_gap": tuning.surface.tolist()},
        },
        **{name: further[name] for name in ("bootstrap", "threshold")},
        **{split: {**recognition.figures[split], **further[split]} for split in QUERY_FILES},
        "skipped_images": skipped_images,
        "versions": {**library_versions(), "commit": commit()},
        "machine": machine(),
    }


def write_answers(output: Path, ground_truth: GroundTruth, recognition: Recognition) -> list[Path]:
    """Write the predictions and the whitening.

    Returns:
        The files of the run so far.

    Raises:
        UserError: If the whitening cannot be written.
        OSError: If another file cannot; names it.
    """
    written = [output / "predictions" / f"{split}.csv" for split in QUERY_FILES]
    (output / "predictions").mkdir(exist_ok=True)
    for split, file in zip(QUERY_FILES, written, strict=True):
        checked = None if recognition.checked is None else recognition.checked[split]
        _write_predictions(file, split, ground_truth, recognition.answers[split], checked)
    if recognition.whitening is not None:
        recognition.whitening.save(output / "whitening.npz")
        written.append(output / "whitening.npz")
    return [*written, output / "config.yaml"]


def write_results(output: Path, results: Mapping[str, Any]) -> Path:
    """Write ``results.json``, the last file of a run: it says that all others are there, and on disk."""
    for name in ("predictions", "report"):
        if (output / name).exists():
            flush(output / name)
    write_atomically(output / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    return output / "results.json"


def print_table(console: Console, results: Mapping[str, Any]) -> None:
    """Print the figures of val and test in percent, and what must be known to read them."""
    data, knn = results["data"], results["knn"]
    kind = "SYNTHETIC demo museum" if data["synthetic"] else escape(data["root"])
    table = Table(title=f"{kind}, {data['database']} database", title_justify="left", box=SIMPLE_HEAD)
    for column in ("split", "met of all", "GAP", "GAP⁻", "ACC"):
        table.add_column(column, justify="left" if column == "split" else "right", no_wrap=True)
    unit = headline_unit(results)
    for split in QUERY_FILES:
        figures = results[split]
        percents = [_with_interval(figures, name, unit) for name in ("gap", "gap_minus", "acc")]
        table.add_row(split, f"{figures['n_met']:,} of {figures['n_queries']:,}", *percents)
    console.print(table)
    console.print(f"in percent; {chosen(knn)}; test scored once", soft_wrap=True)
    for line in chosen_on_val(results):
        console.print(line, soft_wrap=True)
    if unit is not None:
        level = 100 * results["bootstrap"]["level"]
        console.print(
            f"in brackets {level:g}% intervals: bootstrap over {unit} and distractors (a lower bound of the doubt)",
            soft_wrap=True,
        )
    for note in results["notes"]:
        console.print(f"[bold yellow]note:[/] {escape(note)}")


def chosen_on_val(results: Mapping[str, Any]) -> list[str]:
    """What val chose besides k and tau, in words."""
    lines = []
    hubness, check = results["elements"]["hubness"], results["geometric_check"]
    if hubness is not None:
        idle = "" if hubness["beta"] else ": it has no effect"
        lines.append(f"hubness: a share (beta) of {hubness['beta']:g}, chosen on val{idle}")
    if check is not None:
        gate = check["gate"]
        idle = "" if gate["weight"] or check["boost"] else ": it has no effect"
        boost = f", boost {check['boost']:g}" if check["reorder"] else ""
        lines.append(
            f"geometric check: gate of weight {gate['weight']:g}, enough {gate['enough']:g}{boost}, chosen on val{idle}"
        )
    return lines


def chosen(knn: Mapping[str, Any], with_values: bool = True) -> str:
    """How k and tau came about."""
    values = {"k": f"k = {knn['k']}", "tau": f"τ = {knn['tau']:g}"} if with_values else {"k": "k", "tau": "τ"}
    if knn["grid"] is None:
        return f"{values['k']}, {values['tau']} given"
    given = [text for key, text in values.items() if len(knn["grid"][key]) == 1]
    tuned = [text for key, text in values.items() if len(knn["grid"][key]) > 1]
    return ", ".join([*(f"{text} given" for text in given), f"{', '.join(tuned)} tuned by GAP on val"])


def _with_interval(figures: Mapping[str, Any], name: str, unit: str | None) -> str:
    value = f"{100 * figures[name]:.2f}"
    if unit is None:
        return value
    low, high = figures["intervals"][unit][name]
    return f"{value} [dim]({100 * low:.0f}–{100 * high:.0f})[/]"


def peak_memory_gb() -> float | None:
    """Most memory that one process of this run has held, memory-mapped files included; None where nothing tells."""
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e9, 3)


def _command() -> str | None:
    """The command line, if this is one of metilr's; None where a program of the user's calls."""
    script = Path(sys.argv[0])
    if script.stem == "metilr":
        return shlex.join(["metilr", *sys.argv[1:]])
    return shlex.join([Path(sys.executable).name, *sys.argv]) if script.name == "evaluate.py" else None


def _model(opened: Descriptors) -> dict[str, Any]:
    """What made the descriptors: the model's settings, or several sources' where they were concatenated."""
    if len(opened.origins) > 1:
        return {"concatenated": [dict(origin) for origin in opened.origins]}
    origin = dict(opened.origins[0])
    return {
        **origin.pop("model", {}),
        **{key: value for key, value in origin.items() if key != "ground_truth"},
    }


def _write_predictions(
    file: Path, split: str, ground_truth: GroundTruth, answers: Predictions, checked: Checked | None
) -> None:
    ids, database_paths = ground_truth.exhibit_ids, ground_truth.paths["database"]
    labels = ground_truth.labels[split]
    if checked is not None:
        inliers, lead = inliers_of_answers(answers, checked), inlier_lead(answers, checked)
    with named(file), file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow([*PREDICTION_COLUMNS, *([] if checked is None else CHECK_COLUMNS)])
        for i, path in enumerate(ground_truth.paths[split]):
            label, nearest = int(answers.labels[i]), int(answers.nearest[i])
            log_confidence = float(answers.log_confidence[i])
            writer.writerow(
                [
                    path,
                    "" if labels[i] == DISTRACTOR else int(ids[labels[i]]),
                    "" if label == NO_LABEL else int(ids[label]),
                    repr(log_confidence),
                    repr(float(np.exp(log_confidence))),
                    "" if np.isnan(answers.similarity[i]) else repr(float(answers.similarity[i])),
                    "" if nearest == NO_ROW else database_paths[nearest],
                    int(labels[i] != DISTRACTOR and label == labels[i]),
                    *([] if checked is None else [int(inliers[i]), int(lead[i])]),
                ]
            )


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """All options but the output folder, as what YAML and JSON can say."""
    plain = {key: _plain(value) for key, value in options.items() if key != "output"}
    files = {key for key in FILES_OR_WORDS if isinstance(plain.get(key), str) and Path(plain[key]).is_file()}
    return {key: str(Path(value).absolute()) if key in files else value for key, value in plain.items()}


def make_new_folder(parent: Path, name: str) -> Path:
    """Make a folder that was not there; two runs that start in one second get two."""
    for suffix in ("", *(f"_{i}" for i in range(2, 100))):
        with contextlib.suppress(FileExistsError):
            (parent / f"{name}{suffix}").mkdir(parents=True)
            return parent / f"{name}{suffix}"
    raise UserError(f"--output: {parent / name} and 98 like it exist; name a folder")


def _plain(value: Any) -> Any:
    """What YAML can say without tags."""
    if isinstance(value, Path):
        return str(value.absolute())  # so that the file repeats the run from any folder
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
