"""What a run's ``results.json`` and ``config.yaml`` must be like: they may come from somebody else.

Parts that evaluations have not always written may be missing; what is there must be of the kind that they write.
"""

from collections.abc import Mapping
from typing import Any, get_args

from metilr.data.ground_truth import QUERY_FILES, DatabaseName
from metilr.data.image_limits import MAX_IMAGE_SIZE
from metilr.index_schema import check_elements
from metilr.kinds import is_list, is_number, is_positive, is_share, is_text, is_whole, is_writable, require
from metilr.models.features import PatchRounding
from metilr.models.pooling import PoolingName

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
    names = {"visits", "database_views", "query_crops", "crop_similarity", "dba", "hubness"}
    require(elements.keys() <= names, "elements", sorted(elements.keys()))
    check_elements(elements)
    require(is_whole(elements["dba"], 0), "elements.dba", elements["dba"])
    hubness = elements["hubness"]
    if hubness is not None:
        require(is_whole(hubness["neighbours"], 1), "elements.hubness.neighbours", hubness["neighbours"])
        require(is_share(hubness["beta"]), "elements.hubness.beta", hubness["beta"])


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
