"""What an evaluation leaves behind: results.json and the predictions."""

import csv
import json
import shlex
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from metilr.data.ground_truth import QUERY_FILES, GroundTruth
from metilr.files import flush, named, write_atomically
from metilr.geometric_check import GeometricCheck
from metilr.geometric_evidence import Checked, inlier_lead, inliers_of_answers
from metilr.knn import NO_LABEL, NO_ROW, Predictions
from metilr.method import Method
from metilr.metrics import DISTRACTOR
from metilr.recognition import Recognition
from metilr.run_folder import plain_options
from metilr.scoring import further_figures
from metilr.sources import Descriptors
from metilr.versions import commit, library_versions, machine
from metilr.whitening import LearnedWhitening

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
