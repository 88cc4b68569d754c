"""What ``index.json`` must be like: it may come from somebody else, and names files that will be opened."""

from collections.abc import Mapping
from typing import Any, get_args

from metilr.data.catalogue import is_place_below
from metilr.data.image_limits import MAX_IMAGE_SIZE
from metilr.kinds import is_list, is_positive, is_text, is_whole, require
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
    for name, choices in (("database_views", DatabaseViews), ("crop_similarity", CropSimilarity)):
        require(elements[name] in get_args(choices), name, elements[name])
    crops = elements["query_crops"]
    require(is_list(crops) and all(is_positive(crop) and crop < 1 for crop in crops), "query_crops", crops)
