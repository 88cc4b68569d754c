"""A finished evaluation, read back from its folder."""

import contextlib
import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metilr.data.ground_truth import QUERY_FILES
from metilr.errors import UserError, one_line
from metilr.metrics import DISTRACTOR
from metilr.results import PREDICTION_COLUMNS, READABLE_SCHEMAS
from metilr.run_schema import check_config, check_results
from metilr.yaml_files import read_yaml


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
        config = read_yaml(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({one_line(error)}); run the evaluation again") from None
    if not isinstance(config, dict) or not all(isinstance(name, str) for name in config):
        raise UserError(f"{file}: holds no options; run the evaluation again")
    with _refused(file):
        check_config(config)
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
    with _refused(file):
        check_results(results)
    return results


@contextlib.contextmanager
def _refused(file: Path) -> Iterator[None]:
    """Say in one line what a file lacks or holds that no evaluation writes."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else one_line(error)
        raise UserError(f"{file}: cannot be read ({reason}); run the evaluation again") from None


def _read_answers(file: Path) -> Answers:
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        if not rows or not set(PREDICTION_COLUMNS) <= rows[0].keys():
            raise ValueError
        answers = Answers(
            paths=tuple(row["path"] for row in rows),
            exhibit_ids=np.array([int(row["exhibit_id"] or DISTRACTOR) for row in rows], dtype=np.int64),
            predicted_ids=np.array([int(row["predicted_id"] or DISTRACTOR) for row in rows], dtype=np.int64),
            log_confidence=np.array([float(row["log_confidence"]) for row in rows]),
        )
        if not all(answers.paths) or np.isnan(answers.log_confidence).any():
            raise ValueError
        if min(answers.exhibit_ids.min(), answers.predicted_ids.min()) < DISTRACTOR:
            raise ValueError
        return answers
    except (OSError, ValueError, TypeError, OverflowError, csv.Error) as error:
        raise UserError(f"{file}: cannot be read as predictions ({type(error).__name__}); evaluate again") from None
