"""Checkpoints: what training writes and evaluation reads, and those of the Met benchmark's reference code.

A checkpoint of metilr is Lightning's, a dict that ``torch.load(weights_only=True)`` reads, with one more entry:
``checkpoint["metilr"]``, plain values that say all that is needed to build the model without the run's options.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from metilr.data.decode import MAX_IMAGE_SIZE
from metilr.errors import UserError, one_line
from metilr.files import file_sha256, replaced_file
from metilr.models import RANDOM, SCALES, ModelOptions, PatchRounding, PoolingName
from metilr.models.backbone import TIMM, backbone_shapes, build_backbone
from metilr.models.embedder import Embedder, Projector, build_embedder
from metilr.models.pooling import build_pooling
from metilr.models.weights import (
    Provenance,
    StateDict,
    is_state_dict,
    load_strictly,
    read_file,
    refuse_unfit,
    tensors_sha256,
)
from metilr.models.zoo import BACKBONES, IMAGENET_MEAN, IMAGENET_STD

FORMAT = "metilr.checkpoint/1"
EMBEDDER = "embedder."  # where the LightningModule keeps the model

Positive = Annotated[float, Field(gt=0)]


class ModelEntry(BaseModel):
    """What `load_embedder` needs besides the weights: ``checkpoint["metilr"]["model"]``."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, hide_input_in_errors=True)  # it may be gigabytes

    backbone: str
    stage: int | None
    patch_rounding: PatchRounding
    pooling: PoolingName
    p: Positive | None  # GeM's
    projector_dim: int | None
    scales: Sequence[Positive]
    mean: Annotated[Sequence[float], Field(min_length=3, max_length=3)]
    std: Annotated[Sequence[Positive], Field(min_length=3, max_length=3)]
    image_size: Annotated[int, Field(ge=1, le=MAX_IMAGE_SIZE)] | None


def model_entry(embedder: Embedder, image_size: int | None) -> dict[str, Any]:
    """Say in plain values what ``ModelEntry`` reads."""
    settings = embedder.describe_settings()
    return {
        **{name: settings[name] for name in ("backbone", "stage", "scales", "mean", "std")},
        "patch_rounding": embedder.backbone.patch_rounding,
        "pooling": settings["pooling"]["kind"],
        "p": settings["pooling"].get("p"),
        "projector_dim": None if embedder.projector is None else embedder.dim,
        "image_size": image_size,
    }


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(path) as stream:
            torch.save(content, stream)
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__
        reason = getattr(cause, "strerror", None) or one_line(error)
        remedy = "the previous checkpoint is intact: free some space and run the same command to continue"
        raise UserError(f"{path}: cannot be written ({reason}); {remedy}") from error


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """Read a checkpoint to the CPU without executing pickle code."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file in it, such as {path / 'best.ckpt'}")
    content = read_file(path, "copy it again, or take another one")
    if not isinstance(content, Mapping) or not isinstance(content.get("state_dict"), Mapping):
        raise UserError(f"{path}: holds no 'state_dict', so it is no checkpoint; files of weights are given as weights")
    return content


def load(model: str | Path) -> Embedder:
    """Open a backbone by name, such as ``r18_swsl`` or ``timm/NAME``, or a checkpoint, for `Embedder.embed`."""
    name, path = str(model), Path(model)
    is_name = name in BACKBONES or name.startswith(TIMM)
    return load_embedder(path) if not is_name and (path.suffix or path.exists()) else build_embedder(name)


def build_model(options: ModelOptions) -> Embedder:
    """Build the model that options name, in eval mode."""
    parts = {field.name: getattr(options, field.name) for field in fields(options)}
    ckpt = parts.pop("ckpt")
    return build_embedder(**parts) if ckpt is None else load_embedder(Path(ckpt), options.scales)


def load_embedder(path: Path, scales: Sequence[float] | None = None) -> Embedder:
    """Build the model that a checkpoint holds, in eval mode: metilr's own, or the reference code's.

    Unless scales are given, they are the checkpoint's or, since the reference's have none, the paper's.
    """
    content = read_checkpoint(path)
    entry, state_dict = content.get("metilr"), content["state_dict"]
    if not is_state_dict(state_dict):
        raise UserError(f"{path}: its 'state_dict' holds more than named tensors; take another one")
    if entry is not None and (not isinstance(entry, Mapping) or entry.get("format") != FORMAT):
        raise UserError(f"{path}: not of the form {FORMAT}; it was written by another version of metilr")
    claimed = sum(value.numel() * value.element_size() for value in state_dict.values())
    if claimed > 2 * path.stat().st_size:  # weights that layers share are in the file once
        raise UserError(f"{path}: its tensors claim more numbers than the file has; take another one")
    try:
        if entry is None:
            embedder = _reference_embedder(path, state_dict, scales)
        else:
            embedder = _own_embedder(path, entry, state_dict, scales)
    except UserError as error:
        raise UserError(str(error) if str(path) in str(error) else f"{path}: {one_line(error)}") from error
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise UserError(f"{path}: makes no model ({reason}); take another one") from None
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"  # values that neither metilr train nor metilr pack writes
        raise UserError(f"{path}: makes no model ({reason}); copy it again, or take another one") from error
    digest, licence = (
        tensors_sha256(embedder.backbone.model.state_dict()),
        embedder.backbone.provenance.licence,
    )
    embedder.backbone.provenance = Provenance(f"checkpoint {path.name}", licence, file_sha256(path), None, digest)
    return embedder.eval()


def _own_embedder(path: Path, entry: Mapping[str, Any], state: StateDict, scales: Sequence[float] | None) -> Embedder:
    model = ModelEntry.model_validate(entry["model"])
    licence = entry["provenance"]["licence"]
    if not isinstance(licence, (str, type(None))):
        raise TypeError("the licence is no text")
    weights = {key.removeprefix(EMBEDDER): value for key, value in state.items() if key.startswith(EMBEDDER)}
    source = f"{path} for {model.backbone}"
    # The file may name a network of any size: compared before there is memory for it.
    shapes = {f"backbone.model.{name}": shape for name, shape in backbone_shapes(model.backbone).items()}
    refuse_unfit(shapes, {name: value for name, value in weights.items() if name.startswith("backbone.")}, (), source)
    backbone = build_backbone(model.backbone, RANDOM, model.stage, model.patch_rounding)
    # p as a parameter or as a buffer has the same key; only its shape matters here.
    pooling = build_pooling(model.pooling, 3.0 if model.p is None else model.p)
    projector = None
    if model.projector_dim is not None:
        if weights["projector.linear.weight"].shape != (model.projector_dim, backbone.width):
            raise ValueError("the projector has another shape than is said")
        projector = Projector(backbone.width, model.projector_dim)
    embedder = Embedder(backbone, pooling, projector, model.scales if scales is None else scales, model.image_size)
    load_strictly(embedder, weights, (), source)
    # Not every published network of a name has the same normalisation: the checkpoint's counts.
    backbone.mean, backbone.std = tuple(model.mean), tuple(model.std)
    backbone.provenance = replace(backbone.provenance, licence=licence)
    return embedder


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


def _reference_embedder(path: Path, state_dict: StateDict, scales: Sequence[float] | None) -> Embedder:
    """Build the model of a reference checkpoint, whose architecture only the shapes of its weights tell."""
    weights, linear, p = StateDict(), StateDict(), 3.0
    for key, value in state_dict.items():
        name = re.sub(r"^(module\.|backbone\.)+", "", key)
        if name == "pool.p":
            p = float(value.flatten()[0])
        elif name.startswith("projector."):
            linear[f"linear.{name.rpartition('.')[2]}"] = value
        else:
            child, _, rest = name.partition(".")
            weights[f"{_CHILDREN.get(child, child)}.{rest}"] = value
    kernel, architecture = weights.get("layer1.0.conv2.weight"), None
    if kernel is not None and kernel.ndim == 4:
        blocks = tuple(len({key.split(".")[1] for key in weights if key.startswith(f"layer{i}.")}) for i in range(1, 5))
        groups = kernel.shape[0] // max(kernel.shape[1], 1)
        architecture = _RESNETS.get(("layer1.0.conv3.weight" in weights, blocks, groups, kernel.shape[0]))
    if architecture is None:
        raise UserError(f"{path}: neither metilr's nor the reference code's: its weights are of no ResNet known here")
    source = f"{path} for {architecture}"
    refuse_unfit(backbone_shapes(TIMM + architecture), weights, ("fc.",), source)
    backbone = build_backbone(TIMM + architecture, RANDOM)
    load_strictly(backbone.model, weights, ("fc.",), source)
    backbone.mean, backbone.std = IMAGENET_MEAN, IMAGENET_STD
    projector = None
    if linear:
        weight = linear["linear.weight"].flatten(1)  # a 1x1 convolution's or a linear layer's
        if weight.shape[1] != backbone.width:
            raise UserError(f"{path}: its projector takes {weight.shape[1]} channels, {architecture} gives others")
        bias = linear.get("linear.bias", torch.zeros(len(weight))).flatten()
        projector = Projector(backbone.width, len(weight))
        load_strictly(projector, {**linear, "linear.weight": weight, "linear.bias": bias}, (), f"{path}, its projector")
    return Embedder(backbone, build_pooling("gem", p), projector, SCALES if scales is None else scales)
