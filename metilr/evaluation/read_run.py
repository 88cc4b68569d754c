"""The folder that an evaluation wrote, read back: results, options and predictions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field

from metilr.data.ground_truth import QUERY_FILES
from metilr.data.tables import original, read_csv
from metilr.evaluation.results import PREDICTION_COLUMNS, Count, Part, Positive, Results, Text, read_results, readable
from metilr.files import read_yaml
from metilr.metrics import DISTRACTOR
from metilr.models import PatchRounding, PoolingName

Scalar = None | bool | Annotated[int, Field(ge=-(2**63), lt=2**63)] | float | Text


class Config(Part):
    """``config.yaml``: the options of ``metilr evaluate``, with the types of those that other commands read."""

    __pydantic_extra__: dict[str, Scalar | list[Scalar]]
    root: Text | None = None
    ckpt: Text | None = None
    weights: Text | None = None
    backbone: Text = ""
    pooling: PoolingName = "gem"
    p: Positive = 3.0
    stage: Annotated[Count, Field(ge=1)] | None = None
    scales: Positive | Annotated[list[Positive], Field(min_length=1)] | None = None
    patch_rounding: PatchRounding = "nearest"
    seed: Count = 0
    max_megapixels: Positive = 1.0
    descriptors: Sequence[Text] = ()


class Answers(NamedTuple):
    """The predictions of one split, in ground-truth order: of Q queries; DISTRACTOR stands for no exhibit."""

    paths: tuple[str, ...]
    exhibit_ids: np.ndarray  # what each query shows
    predicted_ids: np.ndarray  # what was answered
    log_confidence: np.ndarray


class Run(NamedTuple):
    """What an evaluation wrote: its folder, ``results.json``, ``config.yaml``, and the predictions by split."""

    path: Path
    results: Results
    config: Mapping[str, Any]
    answers: Mapping[str, Answers]


def read_run(path: Path) -> Run:
    """Read the folder that an evaluation wrote; a file that is missing or malformed is named."""
    path = Path(path)
    results, file = read_results(path), path / "config.yaml"
    with readable(file):
        config = read_yaml(file)
        Config.model_validate(config)
    answers = {split: _read_answers(path / f"predictions/{split}.csv") for split in QUERY_FILES}
    return Run(path, results, config, answers)


load_run = read_run  # its name in the package


def _read_answers(file: Path) -> Answers:
    with readable(file):
        rows = [row for _, row in read_csv(file, PREDICTION_COLUMNS)]
        if not rows:
            raise ValueError("no predictions")
        ids = [[int(row[name] or DISTRACTOR) for row in rows] for name in ("exhibit_id", "predicted_id")]
        confidence = np.array([float(row["log_confidence"]) for row in rows])
        paths, (exhibit_ids, predicted_ids) = tuple(original(row["path"]) for row in rows), np.array(ids, np.int64)
        if not all(paths) or np.isnan(confidence).any() or np.min(ids) < DISTRACTOR:
            raise ValueError("a row names no query, an exhibit below 0, or no confidence")
        return Answers(paths, exhibit_ids, predicted_ids, confidence)
