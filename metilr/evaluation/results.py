"""What an evaluation leaves behind: results.json, the predictions, and what the reader must know."""

import csv
import json
import shlex
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from metilr.data.decode import BadImageError, load_image
from metilr.data.ground_truth import NOT_NAMED, QUERY_FILES, GroundTruth
from metilr.evaluation.options import MethodOptions
from metilr.evaluation.recognition import Recognition
from metilr.evaluation.run_folder import plain_options
from metilr.extraction.descriptors import Descriptors
from metilr.extraction.store import SPLITS
from metilr.files import flush, named, write_atomically
from metilr.geometry.check import GeometricCheck
from metilr.geometry.evidence import Checked, inlier_lead, inliers_of_answers
from metilr.metrics import DISTRACTOR
from metilr.metrics.bootstrap import N_RESAMPLES, intervals, resampling_units
from metilr.metrics.open_set import OperatingPoint, open_set_figures, threshold_for_precision
from metilr.provenance import commit, library_versions, machine
from metilr.retrieval.knn import K_GRID, NO_LABEL, NO_ROW, Predictions
from metilr.retrieval.whitening import DEFAULT_DIM, LearnedWhitening

LEVEL = 0.95  # of the intervals
MIN_PRECISION = 0.9  # of the accepted answers on val, where nothing else is asked for
FEW_ACCEPTED = 20  # answers: one more or less that is wrong moves their precision by 5 points
UNITS = ("photographers", "classes", "queries")  # not every museum has all


def further_figures(ground_truth: GroundTruth, recognition: Recognition, seed: int = 0) -> dict[str, Any]:
    """Compute what ``results.json`` says beyond the headline figures.

    Args:
        ground_truth: Knows what each query shows, who took it, and how many images an exhibit has.
        recognition: Knows what was answered.
        seed: Of the bootstrap.

    Returns:
        ``bootstrap`` (how the intervals were made), ``threshold`` (chosen on val for MIN_PRECISION, and what it
        gives on both splits), and for val and test ``intervals`` (by unit and metric) and ``open_set``.
    """
    arguments = {
        split: (answers.log_confidence, answers.labels, ground_truth.labels[split])
        for split, answers in recognition.answers.items()
    }
    point = threshold_for_precision(*arguments["val"], MIN_PRECISION)
    figures: dict[str, Any] = {
        "bootstrap": {"resamples": N_RESAMPLES, "level": LEVEL, "seed": seed},
        "threshold": {
            "min_precision": MIN_PRECISION,
            "chosen_on": "val",
            "log_confidence": None if point is None else point.threshold,
            "splits": {split: _at_threshold(*arguments[split], point) for split in QUERY_FILES},
        },
    }
    for split in QUERY_FILES:
        labels = ground_truth.labels[split]
        photographers = ground_truth.photographers.get(split, np.full(len(labels), NOT_NAMED))
        figures[split] = {
            "intervals": {
                unit: {
                    metric: list(interval)
                    for metric, interval in intervals(*arguments[split], units, seed=seed, level=LEVEL).items()
                }
                for unit, units in resampling_units(labels, photographers).items()
            },
            "open_set": open_set_figures(*arguments[split], ground_truth.kinds(split), ground_truth.class_sizes()),
        }
    return figures


def headline_unit(results: Mapping[str, Any]) -> str | None:
    """The unit of the intervals to show beside the figures: the one with the widest for GAP on test.

    Of those that both splits have; None without any. A few photographers, or two who took most photos, give
    intervals that are too narrow.
    """
    units = [unit for unit in UNITS if all(unit in results[split]["intervals"] for split in QUERY_FILES)]

    def width(unit: str) -> float:
        low, high = results["test"]["intervals"][unit]["gap"]
        return float(high - low)

    return max(units, key=width, default=None)


def _at_threshold(
    log_confidence: np.ndarray, predicted: np.ndarray, target: np.ndarray, point: OperatingPoint | None
) -> dict[str, float | int | None] | None:
    if point is None:
        return None
    accepted, is_met = log_confidence >= point.threshold, target != DISTRACTOR
    right = accepted & is_met & (predicted == target)
    return {
        "n_accepted": int(accepted.sum()),
        "precision": float(right.sum() / accepted.sum()) if accepted.any() else None,
        "recall": float(right.sum() / is_met.sum()),
        "false_alarms": float((accepted & ~is_met).sum() / (~is_met).sum()) if (~is_met).any() else None,
    }


def notes_of(
    opened: Descriptors,
    recognition: Recognition,
    synthetic: bool,
    whitening_dim: int | None,
    skipped_images: list[dict[str, str]],
) -> list[str]:
    """What a reader must know so as not to misread the figures."""
    notes = []
    if synthetic:
        notes.append("the demo museum is synthetic: its figures say nothing about real exhibits")
    sessions = [session for origin in opened.origins for session in origin.get("made_with", [])]
    if any(session.get("weights_from", {}).get("source") == "random" for session in sessions):
        notes.append("RANDOM WEIGHTS: the backbone was not trained, its figures mean nothing")
    made = [part for origin in opened.origins for part in (origin, *origin.get("views", []))]
    if any(len(part.get("made_with", [])) > 1 for part in made):
        notes.append("the descriptors were made in several goes with different devices or library versions")
    whitening = recognition.whitening
    if (
        whitening_dim is None
        and whitening is not None
        and not isinstance(whitening, LearnedWhitening)
        and whitening.dim == whitening.supported_dim < min(DEFAULT_DIM, opened.width)
    ):
        notes.append(
            f"whitened to {whitening.dim} dimensions instead of {DEFAULT_DIM}: "
            f"{whitening.n:,} database images support no more"
        )
    if (
        recognition.tuning is not None
        and recognition.tuning.k_grid[-1] < K_GRID[-1]
        and len(recognition.tuning.k_grid) > 1
    ):
        notes.append(f"the grid of k ends at {recognition.tuning.k_grid[-1]}: a larger k passes the database's rows")
    if skipped_images:
        counts = {split: int((~opened.made[split]).sum()) for split in SPLITS}
        parts = ", ".join(f"{n:,} of {len(opened.made[split]):,} in {split}" for split, n in counts.items() if n)
        notes.append(f"images that are missing or cannot be decoded were left out: {parts} (see skipped_images)")
    return notes


def skipped_images_of(opened: Descriptors, ground_truth: GroundTruth) -> list[dict[str, str]]:
    """Each image that is missing or cannot be decoded: its split, path and reason."""
    skipped = []
    for split, paths in ground_truth.paths.items():
        for i in np.flatnonzero(~opened.made[split]):
            path = paths[i]
            skipped.append({"split": split, "path": path, "reason": _why_bad(ground_truth.image(path))})
    return skipped


def _why_bad(file: Path) -> str:
    try:
        load_image(file)
    except BadImageError as error:
        return str(error).rpartition("; ")[0]  # without the advice to skip it
    return "could not be decoded when its descriptor was made"


SCHEMA_VERSION = 2
READABLE_SCHEMAS = (1, 2)  # 1 does not hold the options: it can be compared, but not repeated
CHECK_COLUMNS = ("inliers", "inlier_lead")  # after the others, where geometry was checked
_WHITENING_SOURCES = {"pca": "learned on the database", "learned": "learned from pairs"}
PREDICTION_COLUMNS = (
    "path", "exhibit_id", "predicted_id", "log_confidence", "confidence", "similarity", "nearest_path", "correct",
)  # fmt: skip


def results_of(
    ground_truth: GroundTruth,
    recognition: Recognition,
    opened: Descriptors,
    *,
    options: Mapping[str, Any],
    synthetic: bool,
    method: MethodOptions,
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
            "visits": method.n_visits,
            "database_views": method.database_views,
            "query_crops": list(method.query_crops),
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
        "search": {"device": method.search_device or "cpu", "exact": True},
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
