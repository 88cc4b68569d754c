"""The folder of an evaluation: made, held against others while the evaluation runs, and read back."""

import contextlib
import csv
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import yaml
from pydantic import Field

from metilr.data.ground_truth import QUERY_FILES
from metilr.errors import UserError
from metilr.evaluation.results import Count, Part, Positive, Results, Text, read_results, why
from metilr.files import alone_in, read_yaml, remove_leftovers, write_atomically
from metilr.metrics import DISTRACTOR
from metilr.models import PatchRounding, PoolingName

RUNS = Path("runs")
LEFT_BEHIND = ("predictions/val.csv", "predictions/test.csv", "whitening.npz", "report/index.html")
FILES_OR_WORDS = ("weights", "whitening")  # options that are a file's path, or a word such as "random" or "pca"
PREDICTION_COLUMNS = (
    "path", "exhibit_id", "predicted_id", "log_confidence", "confidence", "similarity", "nearest_path", "correct",
)  # fmt: skip


def make_output(output: Path | None, name: str) -> Path:
    """Make the folder that a command writes into: ``output``, or a new one under ``runs/``, the date and ``name``.

    Raises:
        UserError: If it cannot be made.
    """
    with _writable(output):
        folder = output or make_new_folder(RUNS, f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{name}")
        folder.mkdir(parents=True, exist_ok=True)
        return folder


@contextlib.contextmanager
def output_folder(output: Path | None, name: str, options: Mapping[str, Any]) -> Iterator[Path]:
    """Open the output folder of a run, held against others, and write the resolved configuration before any work.

    A dated folder goes again if the run fails. What a run left that did not get to its ``results.json`` goes first.
    ``config.yaml`` holds the ``options``, all as resolved: it repeats the run.

    Raises:
        UserError: If the folder cannot be written, holds results already, or another run is at work there.
    """
    _refuse_results(output)  # before the lock's file is made there
    folder = make_output(output, name)
    try:
        with contextlib.ExitStack() as held:
            with _writable(output):
                held.enter_context(alone_in(folder, "another run", "name another output"))
                _refuse_results(output)
                remove_leftovers(folder)
                if (folder / "config.yaml").exists():  # of a run that was killed: its options may have been others
                    for left in LEFT_BEHIND:
                        (folder / left).unlink(missing_ok=True)
                write_atomically(folder / "config.yaml", yaml.safe_dump(plain_options(options), sort_keys=False))
            yield folder
    except BaseException:
        if output is None:
            shutil.rmtree(folder, ignore_errors=True)
        raise


@contextlib.contextmanager
def _writable(output: Path | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = f"{output or RUNS}: cannot be written ({error.strerror}); name another folder"
        raise UserError(what, "output") from None


def _refuse_results(output: Path | None) -> None:
    with _writable(output):
        if output is not None and (output / "results.json").exists():
            raise UserError(f"{output}: holds results already; name another folder, or delete it", "output")


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """All options but the output folder, as what YAML and JSON can say."""
    plain = {key: _plain(value) for key, value in options.items() if key != "output"}
    files = {key for key in FILES_OR_WORDS if isinstance(plain.get(key), str) and Path(plain[key]).is_file()}
    return {key: str(Path(value).absolute()) if key in files else value for key, value in plain.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value.absolute())  # so that the file repeats the run from any folder
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def make_new_folder(parent: Path, name: str) -> Path:
    """Make a folder that was not there; two runs that start in one second get two."""
    for suffix in ("", *(f"_{i}" for i in range(2, 100))):
        with contextlib.suppress(FileExistsError):
            (parent / f"{name}{suffix}").mkdir(parents=True)
            return parent / f"{name}{suffix}"
    raise UserError(f"{parent / name}: is there, and 98 like it; name a folder", "output")


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
    """What an evaluation wrote: its folder, ``results.json``, ``config.yaml``, and the predictions by split."""

    path: Path
    results: Results
    config: Mapping[str, Any]
    answers: Mapping[str, Answers]


def read_run(path: Path) -> Run:
    """Read the folder that an evaluation wrote.

    Raises:
        UserError: If a file is missing, malformed, or of another schema.
    """
    path = Path(path)
    results, file = read_results(path), path / "config.yaml"
    try:
        config = read_yaml(file)
        Config.model_validate(config)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({why(error)}); run the evaluation again") from None
    answers = {split: _read_answers(path / "predictions" / f"{split}.csv") for split in QUERY_FILES}
    return Run(path, results, config, answers)


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
        least = min(answers.exhibit_ids.min(), answers.predicted_ids.min())
        if not all(answers.paths) or np.isnan(answers.log_confidence).any() or least < DISTRACTOR:
            raise ValueError
        return answers
    except (OSError, ValueError, TypeError, OverflowError, csv.Error) as error:
        raise UserError(f"{file}: cannot be read as predictions ({type(error).__name__}); evaluate again") from None
