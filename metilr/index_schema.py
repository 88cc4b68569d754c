"""What ``index.json`` must be like: it may come from somebody else, and names files that will be opened."""

from collections.abc import Mapping
from typing import Any, get_args

from metilr.data.catalogue import is_place_below
from metilr.errors import shown
from metilr.method import CropSimilarity, DatabaseViews
from metilr.models.pooling import PoolingName


def check_index(content: Mapping[str, Any]) -> None:
    """Refuse what ``metilr index`` does not write.

    Raises:
        ValueError: If a value is of a wrong kind or out of range; says which.
        KeyError: If one is missing.
        TypeError: If a list or an object is something else.
    """
    for image in content["images"]:
        _require(is_place_below(image["path"]), "path of an image", image["path"])
        _require(_is_text(image["exhibit"]) and image["exhibit"], "exhibit of an image", image["exhibit"])
    _require(bool(content["images"]), "images", content["images"])
    _require(_is_text(content["folder"]), "folder", content["folder"])
    _require(content["image_size"] is None or _is_whole(content["image_size"], 1), "image_size", content["image_size"])
    _require(type(content["whitening"]) is bool, "whitening", content["whitening"])

    model = content["model"]
    _require(_is_text(model["backbone"]), "backbone", model["backbone"])
    _require(model["pooling"] in get_args(PoolingName), "pooling", model["pooling"])
    _require(_is_positive(model["p"]), "p", model["p"])
    for name in ("ckpt", "weights"):
        _require(model[name] is None or _is_text(model[name]), name, model[name])
    for name in {"precision", "engine"} & model.keys():
        _require(_is_text(model[name]), name, model[name])
    scales = model["scales"]
    _require(scales is None or (_is_list(scales) and scales and all(map(_is_positive, scales))), "scales", scales)

    elements = content["elements"]
    for name in ("visits", "seed"):
        _require(_is_whole(elements[name], 0), name, elements[name])
    for name, choices in (("database_views", DatabaseViews), ("crop_similarity", CropSimilarity)):
        _require(elements[name] in get_args(choices), name, elements[name])
    crops = elements["query_crops"]
    _require(_is_list(crops) and all(_is_positive(crop) and crop < 1 for crop in crops), "query_crops", crops)
    _require(_is_whole(content["knn"]["k"], 1), "k", content["knn"]["k"])
    _require(_is_positive(content["knn"]["tau"]), "tau", content["knn"]["tau"])


def _require(holds: object, name: str, value: object) -> None:
    if not holds:
        raise ValueError(f"{name} is {shown(value)}")


def _is_text(value: object) -> bool:
    return type(value) is str and "\0" not in value and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _is_list(value: object) -> bool:
    return type(value) is list


def _is_whole(value: object, least: int) -> bool:
    return type(value) is int and least <= value < 2**63


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1e300
