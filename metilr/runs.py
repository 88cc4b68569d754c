"""A finished evaluation, read back from its folder."""

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from metilr.data.ground_truth import QUERY_FILES
from metilr.errors import UserError
from metilr.metrics import DISTRACTOR
from metilr.results import PREDICTION_COLUMNS, READABLE_SCHEMAS


@dataclass(frozen=True, eq=False)
class Answers:
    """The predictions of one split, in ground-truth order.

    Attributes:
        paths: Of the queries, relative to ``images/``.
        exhibit_ids: What each query shows, int64 ``(Q,)``; DISTRACTOR for none.
        predicted_ids: What was answered, int64 ``(Q,)``; DISTRACTOR for none (a skipped query).
        log_confidence: float64 ``(Q,)``.
    """

    paths: tuple[str, ...]
    exhibit_ids: np.ndarray
    predicted_ids: np.ndarray
    log_confidence: np.ndarray


@dataclass(frozen=True, eq=False)
class Run:
    """What an evaluation wrote.

    Attributes:
        path: The folder.
        results: ``results.json``.
        config: ``config.yaml``: every option as resolved.
        answers: By split.
    """

    path: Path
    results: Mapping[str, Any]
    config: Mapping[str, Any]
    answers: Mapping[str, Answers]


def read_run(path: Path) -> Run:
    """Read the folder that an evaluation wrote.

    Raises:
        UserError: If a file is missing, malformed, or of another schema.
    """
    path = Path(path)
    results = read_results(path)
    file = path / "config.yaml"
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{file}: cannot be read ({type(error).__name__}); run the evaluation again") from None
    if not isinstance(config, dict):
        raise UserError(f"{file}: holds no options; run the evaluation again")
    answers = {split: _read_answers(path / "predictions" / f"{split}.csv") for split in QUERY_FILES}
    return Run(path, results, config, answers)


def read_results(path: Path) -> Mapping[str, Any]:
    """Read ``results.json``, the file itself or that of a run's folder.

    Raises:
        UserError: If it is missing, malformed, or of another schema.
    """
    path = Path(path)
    file = path if path.is_file() else path / "results.json"
    if not path.exists():
        raise UserError(f"{path}: not a finished evaluation (no such folder)")
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not a finished evaluation (it has no results.json)") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read ({type(error).__name__}); run the evaluation again") from None
    if not isinstance(results, dict) or results.get("schema_version") not in READABLE_SCHEMAS:
        raise UserError(f"{file}: not of schema {' or '.join(map(str, READABLE_SCHEMAS))}; run the evaluation again")
    missing = {"data", "model", "knn", *QUERY_FILES} - results.keys()
    figures = {"gap", "gap_minus", "acc", "n_queries", "n_met"}
    missing |= {f"{split}.{name}" for split in QUERY_FILES for name in figures - dict(results.get(split) or {}).keys()}
    if missing:
        raise UserError(f"{file}: lacks {', '.join(sorted(missing)[:4])}; run the evaluation again")
    return results


def _read_answers(file: Path) -> Answers:
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        if not rows or not set(PREDICTION_COLUMNS) <= rows[0].keys():
            raise ValueError
        return Answers(
            paths=tuple(row["path"] for row in rows),
            exhibit_ids=np.array([int(row["exhibit_id"] or DISTRACTOR) for row in rows]),
            predicted_ids=np.array([int(row["predicted_id"] or DISTRACTOR) for row in rows]),
            log_confidence=np.array([float(row["log_confidence"]) for row in rows]),
        )
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{file}: cannot be read as predictions ({type(error).__name__}); evaluate again") from None
