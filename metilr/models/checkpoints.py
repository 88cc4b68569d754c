"""Checkpoints: what training writes and evaluation reads, and those of the Met benchmark's reference code.

A checkpoint of metilr is Lightning's, a dict that ``torch.load(weights_only=True)`` reads, with one more entry:
``checkpoint["metilr"]``, plain values that say all that is needed to build the model without the run's options.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metilr.data.decode import MAX_IMAGE_SIZE
from metilr.errors import UserError, is_positive, one_line, require, shown
from metilr.files import file_sha256, refuse_compressed, replaced_file
from metilr.models.backbone import Backbone, Provenance
from metilr.models.embedder import SCALES, Embedder, Projector
from metilr.models.pooling import build_pooling
from metilr.models.weights import StateDict, load_strictly, refuse_unfit, tensors_sha256
from metilr.models.zoo import IMAGENET_MEAN, IMAGENET_STD, backbone_shapes, build_backbone

# torchvision's ResNets: bottleneck blocks?, blocks of each stage, groups and width of the 3x3 convolution.
_RESNETS: dict[tuple[bool, tuple[int, ...], int, int], str] = {
    (False, (2, 2, 2, 2), 1, 64): "resnet18",
    (False, (3, 4, 6, 3), 1, 64): "resnet34",
    (True, (3, 4, 6, 3), 1, 64): "resnet50",
    (True, (3, 4, 23, 3), 1, 64): "resnet101",
    (True, (3, 4, 6, 3), 32, 128): "resnext50_32x4d",
    (True, (3, 4, 23, 3), 32, 128): "resnext101_32x4d",
    (True, (3, 4, 23, 3), 32, 256): "resnext101_32x8d",
    (True, (3, 4, 23, 3), 32, 512): "resnext101_32x16d",
}
# The reference code keeps a torchvision ResNet as a list of its children: these positions carry weights.
_CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


def split_reference(state_dict: Mapping[str, Any]) -> tuple[StateDict, torch.Tensor | None, StateDict]:
    """Sort a reference state dict into the ResNet's weights by torchvision's names, GeM's p, and the projector."""
    weights: StateDict = {}
    projector: StateDict = {}
    p = None
    for key, value in state_dict.items():
        name = re.sub(r"^(module\.|backbone\.)+", "", key)
        if name == "pool.p":
            p = value
        elif name.startswith("projector."):
            projector[name.rpartition(".")[2]] = value
        else:
            child, _, rest = name.partition(".")
            weights[f"{_CHILDREN.get(child, child)}.{rest}"] = value
    return weights, p, projector


def architecture_of(weights: StateDict) -> str | None:
    """Name the ResNet whose weights have these shapes; None if none is known."""
    kernel = weights.get("layer1.0.conv2.weight")
    if kernel is None or kernel.ndim != 4:
        return None
    blocks = tuple(len({key.split(".")[1] for key in weights if key.startswith(f"layer{i}.")}) for i in range(1, 5))
    groups = kernel.shape[0] // max(kernel.shape[1], 1)
    return _RESNETS.get(("layer1.0.conv3.weight" in weights, blocks, groups, kernel.shape[0]))


FORMAT = "metilr.checkpoint/1"
EMBEDDER = "embedder."  # where the LightningModule keeps the model


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint whole or not at all.

    Raises:
        UserError: If it cannot be written; the previous one is intact.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(path) as stream:
            torch.save(content, stream)
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__
        reason = getattr(cause, "strerror", None) or one_line(error)
        raise UserError(
            f"{path}: cannot be written ({reason}); the previous checkpoint is intact: free some space and run the "
            "same command to continue"
        ) from error


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """Read a checkpoint to the CPU without executing pickle code.

    Raises:
        UserError: If the file is missing, damaged, or holds more than tensors, plain values and NumPy scalars.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file in it, such as {path / 'best.ckpt'}")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        refuse_compressed(path)
        with torch.serialization.safe_globals(_numpy_scalars()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in as many ways as its format has parts
        raise UserError(
            f"{path}: cannot be read as a checkpoint ({type(error).__name__}): it is truncated, or holds more "
            "than tensors and plain values; copy it again, or take another one"
        ) from error
    if not isinstance(content, Mapping) or not isinstance(content.get("state_dict"), Mapping):
        raise UserError(f"{path}: holds no 'state_dict', so it is no checkpoint; weights go to --weights")
    return content


def load_embedder(path: Path, scales: Sequence[float] | None = None) -> tuple[Embedder, int | None]:
    """Build the model that a checkpoint holds: metilr's own, or the reference code's.

    Args:
        path: The file.
        scales: In place of the checkpoint's (the reference's checkpoints have none: the paper's).

    Returns:
        The embedder in eval mode, and the ``image_size`` that it was trained with.

    Raises:
        UserError: If the file cannot be read or its weights fit no known architecture.
    """
    content = read_checkpoint(path)
    entry, state_dict = content.get("metilr"), content["state_dict"]
    if not all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state_dict.items()):
        raise UserError(f"{path}: its 'state_dict' holds more than named tensors; take another one")
    if entry is not None and (not isinstance(entry, Mapping) or entry.get("format") != FORMAT):
        raise UserError(f"{path}: not of the form {FORMAT}; it was written by another version of metilr")
    claimed = sum(value.numel() * value.element_size() for value in state_dict.values())
    if claimed > 2 * path.stat().st_size:  # weights that layers share are in the file once
        raise UserError(f"{path}: its tensors claim more numbers than the file has; take another one")
    try:
        if entry is None:
            return _reference_embedder(path, state_dict, scales), None
        return _own_embedder(path, entry, state_dict, scales)
    except UserError as error:
        raise UserError(str(error) if str(path) in str(error) else f"{path}: {one_line(error)}") from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"  # values that neither metilr train nor metilr pack writes
        raise UserError(f"{path}: makes no model ({reason}); copy it again, or take another one") from error


def _own_embedder(
    path: Path, entry: Mapping[str, Any], state_dict: StateDict, scales: Sequence[float] | None
) -> tuple[Embedder, int | None]:
    model = entry["model"]
    weights = {key.removeprefix(EMBEDDER): value for key, value in state_dict.items() if key.startswith(EMBEDDER)}
    _check_entry(model, weights)
    source = f"{path} for {model['backbone']}"
    # The file may name a network of any size: compared before there is memory for it.
    shapes = {f"backbone.model.{name}": shape for name, shape in backbone_shapes(model["backbone"]).items()}
    refuse_unfit(shapes, {name: value for name, value in weights.items() if name.startswith("backbone.")}, (), source)
    backbone = build_backbone(model["backbone"], "random", model["stage"], model["patch_rounding"])
    # p as a parameter or as a buffer has the same key; only its shape matters here.
    pooling = build_pooling(model["pooling"], backbone.width, model["p"] if model["pooling"] == "gem" else 3.0)
    projector = None
    if model["projector_dim"] is not None:
        if weights["projector.linear.weight"].shape != (model["projector_dim"], backbone.width):
            raise ValueError(f"the projector takes {shown(tuple(weights['projector.linear.weight'].shape))}")
        projector = Projector(backbone.width, model["projector_dim"])
    embedder = Embedder(backbone, pooling, projector, model["scales"] if scales is None else scales)
    load_strictly(embedder, weights, (), source)
    licence = entry["provenance"]["licence"]
    require(licence is None or isinstance(licence, str), "licence", licence)
    backbone.provenance = _provenance(path, backbone, licence)
    # Not every published network of a name has the same normalisation: the checkpoint's counts.
    backbone.mean, backbone.std = tuple(model["mean"]), tuple(model["std"])
    return embedder.eval(), model["image_size"]


def _check_entry(model: Mapping[str, Any], weights: StateDict) -> None:
    """Refuse what would be noticed late, or take memory first: parts that share their parts are gigabytes in words."""
    for name in ("backbone", "patch_rounding", "pooling"):
        require(isinstance(model[name], str), name, model[name])
    for name, may_be in (("stage", (int, type(None))), ("p", (int, float, type(None)))):
        require(isinstance(model[name], may_be), name, model[name])
    require(isinstance(model["scales"], (list, tuple)), "scales", model["scales"])
    require(all(map(is_positive, model["scales"])), "scales", model["scales"])
    size, dim = model["image_size"], model["projector_dim"]
    if size is not None and (type(size) is not int or not 1 <= size <= MAX_IMAGE_SIZE):
        raise ValueError(f"image_size {shown(size)}")
    if dim is not None and (type(dim) is not int or dim != len(weights["projector.linear.weight"])):
        raise ValueError(f"projector_dim {shown(dim)}")
    for name, least in (("mean", -math.inf), ("std", 0)):
        values = [float(value) for value in model[name]]
        if len(values) != 3 or not all(math.isfinite(value) and value > least for value in values):
            raise ValueError(f"{name} {shown(model[name])}")


def model_entry(embedder: Embedder, pooling: str, image_size: int | None) -> dict[str, Any]:
    """What ``load_embedder`` needs besides the weights, as plain values."""
    settings = embedder.describe_settings()
    return {
        "backbone": settings["backbone"],
        "stage": settings["stage"],
        "patch_rounding": embedder.backbone.patch_rounding,
        "pooling": pooling,
        "p": settings["pooling"].get("p"),
        "projector_dim": None if embedder.projector is None else embedder.dim,
        "scales": settings["scales"],
        "mean": settings["mean"],
        "std": settings["std"],
        "image_size": image_size,
    }


def _reference_embedder(path: Path, state_dict: Mapping[str, Any], scales: Sequence[float] | None) -> Embedder:
    """Build the model of a reference checkpoint, whose architecture only the shapes of its weights tell."""
    weights, p, linear = split_reference(state_dict)
    architecture = architecture_of(weights)
    if architecture is None:
        raise UserError(
            f"{path}: neither metilr's nor the reference code's: its weights are of no ResNet that is known here"
        )
    source = f"{path} for {architecture}"
    refuse_unfit(backbone_shapes(f"timm/{architecture}"), weights, ("fc.",), source)
    backbone = build_backbone(f"timm/{architecture}", "random")
    load_strictly(backbone.model, weights, ("fc.",), source)
    backbone.mean, backbone.std = IMAGENET_MEAN, IMAGENET_STD
    backbone.provenance = _provenance(path, backbone, None)
    projector = None
    if linear:
        weight = linear["weight"].flatten(1)  # a 1x1 convolution's or a linear layer's
        projector = Projector(weight.shape[1], weight.shape[0])
        fitting = {"linear.weight": weight, "linear.bias": linear.get("bias", torch.zeros(len(weight))).flatten()}
        load_strictly(projector, fitting, (), f"{path}, its projector")
        if weight.shape[1] != backbone.width:
            raise UserError(f"{path}: its projector takes {weight.shape[1]} channels, {architecture} gives others")
    pooling = build_pooling("gem", backbone.width, 3.0 if p is None else float(p.flatten()[0]))
    return Embedder(backbone, pooling, projector, SCALES if scales is None else scales).eval()


def _provenance(path: Path, backbone: Backbone, licence: str | None) -> Provenance:
    digest = tensors_sha256(backbone.model.state_dict())
    return Provenance(f"checkpoint {path.name}", licence, file_sha256(path), None, digest)


def _numpy_scalars() -> list[Any]:
    """What a pickled NumPy number consists of, under its name of NumPy 1 and of NumPy 2; none of it runs code."""
    scalar = np.float64(0).__reduce__()[0]
    kinds = [type(np.dtype(code)) for code in ("f2", "f4", "f8", "i4", "i8", "?")]
    names = ["numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"]
    return [*((scalar, name) for name in names), np.dtype, *kinds]
