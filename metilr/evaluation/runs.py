"""A finished run, read back from its folder and checked."""

import contextlib
import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from metilr.data.decode import MAX_IMAGE_SIZE
from metilr.data.folder import is_place_below
from metilr.data.ground_truth import QUERY_FILES, DatabaseName
from metilr.errors import (
    UserError,
    is_list,
    is_number,
    is_positive,
    is_share,
    is_text,
    is_whole,
    is_writable,
    one_line,
    require,
)
from metilr.evaluation.options import DELETED, DatabaseViews, without_deleted
from metilr.evaluation.results import PREDICTION_COLUMNS, READABLE_SCHEMAS
from metilr.files import read_yaml
from metilr.metrics import DISTRACTOR
from metilr.models import PatchRounding, PoolingName


def check_index(content: Mapping[str, Any]) -> None:
    """Refuse what ``metilr index`` does not write.

    Raises:
        ValueError: If a value is of a wrong kind or out of range; says which.
        KeyError: If one is missing.
        TypeError: If a list or an object is something else.
    """
    for image in content["images"]:
        require(is_place_below(image["path"]), "path of an image", image["path"])
        require(is_text(image["exhibit"]) and image["exhibit"], "exhibit of an image", image["exhibit"])
    require(bool(content["images"]), "images", content["images"])
    require(is_text(content["folder"]), "folder", content["folder"])
    size = content["image_size"]
    require(size is None or (is_whole(size, 1) and size <= MAX_IMAGE_SIZE), "image_size", size)
    require(type(content["whitening"]) is bool, "whitening", content["whitening"])

    model = content["model"]
    require(is_text(model["backbone"]), "backbone", model["backbone"])
    require(model["pooling"] in get_args(PoolingName), "pooling", model["pooling"])
    require(is_positive(model["p"]), "p", model["p"])
    for name in ("ckpt", "weights"):
        require(model[name] is None or is_text(model[name]), name, model[name])
    for name in {"precision", "engine"} & model.keys():
        require(is_text(model[name]), name, model[name])
    scales = model["scales"]
    require(scales is None or (is_list(scales) and scales and all(map(is_positive, scales))), "scales", scales)

    check_elements(content["elements"])
    require(is_whole(content["elements"]["seed"], 0), "seed", content["elements"]["seed"])
    require(is_whole(content["knn"]["k"], 1), "k", content["knn"]["k"])
    require(is_positive(content["knn"]["tau"]), "tau", content["knn"]["tau"])


def check_elements(elements: Mapping[str, Any]) -> None:
    """Refuse what is no setting of visits and crops; raises as ``check_index``."""
    require(is_whole(elements["visits"], 0), "visits", elements["visits"])
    elements = without_deleted(elements)
    require(elements["database_views"] in get_args(DatabaseViews), "database_views", elements["database_views"])
    crops = elements["query_crops"]
    require(is_list(crops) and all(is_positive(crop) and crop < 1 for crop in crops), "query_crops", crops)


FIGURES = ("gap", "gap_minus", "acc")
COUNTS = ("n_queries", "n_met")
_OF_THE_DATA = ("database_images", "exhibits", "val_queries", "val_met", "test_queries", "test_met")


def check_results(content: Mapping[str, Any]) -> None:
    """Refuse what ``evaluate.py`` does not write.

    Raises:
        ValueError: If a value is of a wrong kind or out of range; says which.
        KeyError: If one is missing.
        TypeError, AttributeError: If a list or an object is something else.
    """
    for name, value in content.items():
        require(is_writable(value), name, value)
    require(is_text(content.get("directory", ".")), "directory", content.get("directory"))
    for name in ("seconds", "peak_memory_gb"):
        value = content.get(name)
        require(value is None or is_number(value), name, value)
    for name in ("notes", "skipped_images"):
        require(is_list(content.get(name, [])), name, content.get(name))
    require(all(map(is_text, content.get("notes", []))), "notes", content.get("notes"))
    for name in ("versions", "machine", "search"):
        require(isinstance(content.get(name, {}), dict), name, content.get(name))
    _check_data(content["data"])
    _check_model(content["model"])
    _check_knn(content["knn"])
    for split in QUERY_FILES:
        _check_figures(content[split], split)
    for name, check in _LATER.items():
        part = content[name] if content["schema_version"] > 1 else content.get(name)
        if part is not None:
            check(part)


def check_config(content: Mapping[str, Any]) -> None:
    """Refuse options that ``evaluate.py`` does not take, of those that other commands read. Raises the same."""
    for name, value in content.items():
        for part in value if is_list(value) else [value]:
            require(is_writable(part, 0), name, value)
    kinds = {
        "root": is_text, "ckpt": is_text, "weights": is_text, "backbone": is_text, "descriptors": is_list,
        "p": is_positive, "max_megapixels": is_positive, "stage": lambda value: is_whole(value, 1),
        "seed": lambda value: is_whole(value, 0), "pooling": lambda value: value in get_args(PoolingName),
        "patch_rounding": lambda value: value in get_args(PatchRounding), "scales": _are_scales,
    }  # fmt: skip
    may_be_null = ("root", "ckpt", "weights", "stage", "scales")
    for name in kinds.keys() & content.keys():
        value = content[name]
        require((value is None and name in may_be_null) or kinds[name](value), name, value)


def _are_scales(value: Any) -> bool:
    return is_positive(value) or (is_list(value) and bool(value) and all(map(is_positive, value)))


def _check_data(data: Mapping[str, Any]) -> None:
    for name in ("root", "fingerprint"):
        require(is_text(data[name]), f"data.{name}", data[name])
    require(data["database"] in get_args(DatabaseName), "data.database", data["database"])
    require(type(data["synthetic"]) is bool, "data.synthetic", data["synthetic"])
    for name in _OF_THE_DATA:
        require(is_whole(data["counts"][name], 0), f"data.counts.{name}", data["counts"][name])


def _check_model(model: Mapping[str, Any]) -> None:
    require(isinstance(model, dict) and model, "model", model)
    for name in {"backbone", "store", "precision", "engine"} & model.keys():
        require(is_text(model[name]), f"model.{name}", model[name])
    size = model.get("image_size")
    require(size is None or (is_whole(size, 1) and size <= MAX_IMAGE_SIZE), "model.image_size", size)
    if "pooling" in model:
        require(model["pooling"]["kind"] in get_args(PoolingName), "model.pooling.kind", model["pooling"]["kind"])
    require(is_list(model.get("scales", [])), "model.scales", model.get("scales"))
    sessions = model.get("made_with", [])
    require(is_list(sessions), "model.made_with", sessions)
    for session in sessions:
        origin = session.get("weights_from", {})
        require(isinstance(origin, dict), "model.made_with.weights_from", origin)
    if "store" in model:  # what describes photos as the images were described
        for name in ("backbone", "precision", "pooling"):
            model[name]


def _check_knn(knn: Mapping[str, Any]) -> None:
    require(is_whole(knn["k"], 1), "knn.k", knn["k"])
    require(is_positive(knn["tau"]), "knn.tau", knn["tau"])
    if knn["grid"] is not None:
        for name in ("k", "tau"):
            require(is_list(knn["grid"][name]), f"knn.grid.{name}", knn["grid"][name])


def _check_figures(figures: Mapping[str, Any], split: str) -> None:
    for name in FIGURES:
        require(is_share(figures[name]), f"{split}.{name}", figures[name])
    for name in COUNTS:
        require(is_whole(figures[name], 0), f"{split}.{name}", figures[name])
    for unit, intervals in figures.get("intervals", {}).items():
        for name in FIGURES:
            ends = intervals[name]
            require(
                is_list(ends) and len(ends) == 2 and all(map(is_share, ends)), f"{split}.intervals.{unit}.{name}", ends
            )


def _check_whitening(whitening: Mapping[str, Any]) -> None:
    require(isinstance(whitening, dict), "whitening", whitening)


def _check_elements(elements: Mapping[str, Any]) -> None:
    names = {"visits", "database_views", "query_crops", *DELETED}
    require(elements.keys() <= names, "elements", sorted(elements.keys()))
    check_elements(elements)


def _check_geometry(check: Mapping[str, Any]) -> None:
    require(is_whole(check["candidates"], 1), "geometric_check.candidates", check["candidates"])
    require(type(check["reorder"]) is bool, "geometric_check.reorder", check["reorder"])
    require(is_number(check["boost"]) and check["boost"] >= 0, "geometric_check.boost", check["boost"])
    gate = check["gate"]
    require(is_number(gate["weight"]) and gate["weight"] >= 0, "geometric_check.gate.weight", gate["weight"])
    require(is_positive(gate["enough"]), "geometric_check.gate.enough", gate["enough"])
    require(isinstance(check["features"], dict), "geometric_check.features", check["features"])


_LATER = {  # schema 1 did not have all of them from the start
    "whitening": _check_whitening, "elements": _check_elements, "geometric_check": _check_geometry,
}  # fmt: skip


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
