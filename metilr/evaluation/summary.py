"""From what was recognised to what an evaluation leaves behind: ``results.json``, the predictions, the whitening."""

import csv
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
from metilr.evaluation.results import LEVEL, MIN_PRECISION, SCHEMA_VERSION, Results
from metilr.evaluation.runs import PREDICTION_COLUMNS, plain_options
from metilr.extraction.descriptors import Descriptors
from metilr.extraction.store import SPLITS
from metilr.files import named
from metilr.geometry.check import GeometricCheck
from metilr.geometry.evidence import inlier_lead, inliers_of_answers
from metilr.metrics import DISTRACTOR
from metilr.metrics.bootstrap import N_RESAMPLES, intervals, resampling_units
from metilr.metrics.open_set import OperatingPoint, open_set_figures, threshold_for_precision
from metilr.provenance import commit, library_versions, machine
from metilr.retrieval.knn import K_GRID, NO_LABEL, NO_ROW
from metilr.retrieval.whitening import DEFAULT_DIM, LearnedWhitening

CHECK_COLUMNS = ("inliers", "inlier_lead")  # of the predictions, after the others, where geometry was checked
SEED = 0  # of the bootstrap


def summarise(
    ground_truth: GroundTruth,
    recognition: Recognition,
    opened: Descriptors,
    method: MethodOptions,
    check: GeometricCheck | None,
    *,
    options: Mapping[str, Any],
    synthetic: bool,
    seconds: float,
) -> Results:
    """Put together what ``results.json`` says of an evaluation with such a method and, once tuned, such a check.

    ``options`` are the command's, flat; ``synthetic`` says that the museum is the demo's.
    """
    grid, skipped = None, _skipped_images(opened, ground_truth)
    if (tuning := recognition.tuning) is not None:
        grid = {"k": list(tuning.k_grid), "tau": list(tuning.tau_grid), "val_gap": tuning.surface.tolist()}
    return Results.model_validate({
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": _command(),
        "directory": str(Path.cwd()),
        "options": plain_options(options),
        "seconds": round(seconds, 1),
        "peak_memory_gb": peak_memory_gb(),
        "notes": _notes(opened, recognition, synthetic, method.whitening_dim, bool(skipped)),
        "data": {
            "root": ground_truth.root.resolve().name,
            "database": ground_truth.database,
            "synthetic": synthetic,
            "counts": ground_truth.counts(),
            "fingerprint": ground_truth.fingerprint(),
        },
        "model": _model(opened),
        "whitening": _whitening(recognition, method),
        "elements": {
            "visits": method.n_visits,
            "database_views": method.database_views,
            "query_crops": list(method.query_crops),
        },
        "geometric_check": None if check is None else {
            "candidates": check.candidates,
            "reorder": check.reorder,
            "boost": check.boost,
            "gate": {"weight": check.gate.weight, "enough": check.gate.enough},
            "tuned_on": "val",
            "features": check.extractor.settings(),
        },
        "search": {"device": method.search_device or "cpu", "exact": True},
        "knn": {"k": recognition.k, "tau": recognition.tau, "tuned_on": grid and "val", "grid": grid},
        **_further_figures(ground_truth, recognition),
        "skipped_images": skipped,
        "versions": {**library_versions(), "commit": commit()},
        "machine": machine(),
    })  # fmt: skip


def _model(opened: Descriptors) -> dict[str, Any]:
    """What made the descriptors: the model's settings, or several sources' where they were concatenated."""
    if len(opened.origins) > 1:
        return {"concatenated": [dict(origin) for origin in opened.origins]}
    origin = dict(opened.origins[0])
    return {**origin.pop("model", {}), **{key: value for key, value in origin.items() if key != "ground_truth"}}


def _whitening(recognition: Recognition, method: MethodOptions) -> dict[str, Any] | None:
    whitening = recognition.whitening
    if whitening is None:
        return None
    sources = {"pca": "learned on the database", "learned": "learned from pairs"}
    return {
        "source": sources.get(method.whitening, Path(method.whitening).name),
        "sha256": whitening.sha256(),
        "dim": whitening.dim,
        "shrinkage": whitening.shrinkage,
        "learned_on": whitening.n,
        **({"pairs": whitening.n_pairs} if isinstance(whitening, LearnedWhitening) else {}),
        "supported_dim": whitening.supported_dim,
    }


def _further_figures(ground_truth: GroundTruth, recognition: Recognition) -> dict[str, Any]:
    """The figures of val and test, with intervals and open-set figures, and the threshold chosen on val."""
    cases = {
        split: (answers.log_confidence, answers.labels, ground_truth.labels[split])
        for split, answers in recognition.answers.items()
    }
    point = threshold_for_precision(*cases["val"], MIN_PRECISION)
    figures: dict[str, Any] = {
        "bootstrap": {"resamples": N_RESAMPLES, "level": LEVEL, "seed": SEED},
        "threshold": {
            "min_precision": MIN_PRECISION,
            "chosen_on": "val",
            "log_confidence": None if point is None else point.threshold,
            "splits": {split: None if point is None else _at(point, *cases[split]) for split in QUERY_FILES},
        },
    }
    for split in QUERY_FILES:
        labels, kinds = ground_truth.labels[split], ground_truth.kinds(split)
        units = resampling_units(labels, ground_truth.photographers.get(split, np.full(len(labels), NOT_NAMED)))
        figures[split] = {
            **recognition.figures[split],
            "intervals": {name: _intervals(cases[split], unit) for name, unit in units.items()},
            "open_set": open_set_figures(*cases[split], kinds, ground_truth.class_sizes()),
        }
    return figures


def _intervals(case: tuple[np.ndarray, np.ndarray, np.ndarray], unit: np.ndarray) -> dict[str, list[float]]:
    return {metric: list(ends) for metric, ends in intervals(*case, unit, seed=SEED, level=LEVEL).items()}


def _at(
    point: OperatingPoint, log_confidence: np.ndarray, predicted: np.ndarray, target: np.ndarray
) -> dict[str, float | int | None]:
    """What the threshold gives on a split."""
    accepted, is_met = log_confidence >= point.threshold, target != DISTRACTOR
    right = accepted & is_met & (predicted == target)
    return {
        "n_accepted": int(accepted.sum()),
        "precision": float(right.sum() / accepted.sum()) if accepted.any() else None,
        "recall": float(right.sum() / is_met.sum()),
        "false_alarms": float((accepted & ~is_met).sum() / (~is_met).sum()) if (~is_met).any() else None,
    }


def _notes(
    opened: Descriptors, recognition: Recognition, synthetic: bool, whitening_dim: int | None, some_skipped: bool
) -> list[str]:
    """What a reader must know so as not to misread the figures."""
    notes = []
    if synthetic:
        notes.append("the demo museum is synthetic: its figures say nothing about real exhibits")
    sessions = [session for origin in opened.origins for session in origin.get("made_with", [])]
    if any(session.get("weights_from", {}).get("source") == "random" for session in sessions):
        notes.append("RANDOM WEIGHTS: the backbone was not trained, its figures mean nothing")
    parts = [part for origin in opened.origins for part in (origin, *origin.get("views", []))]
    if any(len(part.get("made_with", [])) > 1 for part in parts):
        notes.append("the descriptors were made in several goes with different devices or library versions")
    whitening, tuning = recognition.whitening, recognition.tuning
    if (
        whitening_dim is None
        and whitening is not None
        and not isinstance(whitening, LearnedWhitening)
        and whitening.dim == whitening.supported_dim < min(DEFAULT_DIM, opened.width)
    ):
        support = f"{whitening.n:,} database images support no more"
        notes.append(f"whitened to {whitening.dim} dimensions instead of {DEFAULT_DIM}: {support}")
    if tuning is not None and tuning.k_grid[-1] < K_GRID[-1] and len(tuning.k_grid) > 1:
        notes.append(f"the grid of k ends at {tuning.k_grid[-1]}: a larger k passes the database's rows")
    if some_skipped:
        counts = {split: int((~opened.made[split]).sum()) for split in SPLITS}
        of_splits = ", ".join(f"{n:,} of {len(opened.made[split]):,} in {split}" for split, n in counts.items() if n)
        notes.append(f"images that are missing or cannot be decoded were left out: {of_splits} (see skipped_images)")
    return notes


def _skipped_images(opened: Descriptors, ground_truth: GroundTruth) -> list[dict[str, str]]:
    """Each image that is missing or cannot be decoded: its split, path and reason."""
    skipped = []
    for split, paths in ground_truth.paths.items():
        for i in np.flatnonzero(~opened.made[split]):
            file, reason = ground_truth.image(paths[i]), "could not be decoded when its descriptor was made"
            try:
                load_image(file)
            except BadImageError as error:
                reason = f"{file}: cannot be decoded ({error.reason})"
            skipped.append({"split": split, "path": paths[i], "reason": reason})
    return skipped


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


def write_answers(output: Path, ground_truth: GroundTruth, recognition: Recognition) -> list[Path]:
    """Write the predictions and the whitening; return the files of the run so far.

    Raises:
        UserError: If the whitening cannot be written.
        OSError: If another file cannot; names it.
    """
    written = []
    (output / "predictions").mkdir(exist_ok=True)
    for split in QUERY_FILES:
        written.append(output / "predictions" / f"{split}.csv")
        with named(written[-1]), written[-1].open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows(_predictions(split, ground_truth, recognition))
    if recognition.whitening is not None:
        written.append(output / "whitening.npz")
        recognition.whitening.save(written[-1])
    return [*written, output / "config.yaml"]


def _predictions(split: str, ground_truth: GroundTruth, recognition: Recognition) -> list[list[object]]:
    """Header and lines of a split's predictions."""
    ids, labels, database = ground_truth.exhibit_ids, ground_truth.labels[split], ground_truth.paths["database"]
    answers, checked = recognition.answers[split], recognition.checked and recognition.checked[split]
    header: list[object] = [*PREDICTION_COLUMNS, *(CHECK_COLUMNS if checked else ())]
    further = zip(inliers_of_answers(answers, checked), inlier_lead(answers, checked), strict=True) if checked else None
    lines = [header]
    for i, path in enumerate(ground_truth.paths[split]):
        label, nearest, log_confidence = (
            int(answers.labels[i]),
            int(answers.nearest[i]),
            float(answers.log_confidence[i]),
        )
        lines.append(
            [
                path,
                "" if labels[i] == DISTRACTOR else int(ids[labels[i]]),
                "" if label == NO_LABEL else int(ids[label]),
                repr(log_confidence),
                repr(float(np.exp(log_confidence))),
                "" if np.isnan(answers.similarity[i]) else repr(float(answers.similarity[i])),
                "" if nearest == NO_ROW else database[nearest],
                int(labels[i] != DISTRACTOR and label == labels[i]),
                *(map(int, next(further)) if further else ()),
            ]
        )
    return lines
