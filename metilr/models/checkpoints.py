"""Checkpoints: what training writes and evaluation reads, and those of the Met benchmark's reference code.

A checkpoint of metilr is Lightning's, a dict that ``torch.load(weights_only=True)`` reads, with one more entry:
``checkpoint["metilr"]``, plain values that say all that is needed to build the model without the run's options.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from metilr.data.pixels import ImageSize
from metilr.errors import UserError, one_line
from metilr.files import file_sha256, replaced_file
from metilr.models import RANDOM, SCALES, ModelOptions, PatchRounding, PoolingName, is_on_hub
from metilr.models.backbone import TIMM, backbone_shapes, build_backbone
from metilr.models.embedder import Embedder, Projector, build_embedder
from metilr.models.hub import CHECKPOINTS, locate
from metilr.models.pooling import Pooling
from metilr.models.weights import (
    SAFETENSORS,
    Provenance,
    StateDict,
    as_safetensors,
    from_safetensors,
    is_state_dict,
    load_strictly,
    read_file,
    refuse_unfit,
    tensors_sha256,
)
from metilr.models.zoo import BACKBONES, IMAGENET_MEAN, IMAGENET_STD
from metilr.provenance import commit, library_versions, machine

FORMAT = "metilr.checkpoint/1"
EMBEDDER = "embedder."  # where the LightningModule keeps the model
CLASS_WEIGHTS = "classifier.weight"

Positive = Annotated[float, Field(gt=0)]


class ModelEntry(BaseModel):
    """What `load_embedder` needs besides the weights: ``checkpoint["metilr"]["model"]``."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    backbone: str
    stage: int | None
    patch_rounding: PatchRounding
    pooling: PoolingName
    p: Positive | None  # GeM's
    projector_dim: int | None
    scales: Sequence[Positive]
    mean: Annotated[Sequence[float], Field(min_length=3, max_length=3)]
    std: Annotated[Sequence[Positive], Field(min_length=3, max_length=3)]
    image_size: ImageSize | None


def model_entry(embedder: Embedder, image_size: ImageSize | None) -> dict[str, Any]:
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


def checkpoint_entry(
    embedder: Embedder, image_size: ImageSize | None, data: Mapping[str, Any] | None, config: Mapping[str, Any]
) -> dict[str, Any]:
    """What a training adds to Lightning's checkpoint: the model, what it was trained on, and how."""
    provenance = embedder.backbone.provenance
    return {
        "format": FORMAT,
        "model": model_entry(embedder, image_size),
        "provenance": {"source": provenance.source, "licence": provenance.licence},
        "data": data,
        "config": config,
        "versions": {**library_versions(), "commit": commit()},
        "machine": machine(),
    }


class ClassWeights(NamedTuple):
    """A classifier's weights as rows that can be searched, and which exhibit each stands for."""

    rows: np.ndarray  # float32 (M, D), of any length but 0
    exhibit_ids: np.ndarray  # the museum's numbers, int64 (M,); an exhibit may have several rows

    def sha256(self) -> str:
        """A digest of both: two checkpoints of one frozen backbone differ in nothing else."""
        return hashlib.sha256(self.rows.tobytes() + self.exhibit_ids.tobytes()).hexdigest()


def load_class_weights(ckpt: str | Path, also_untrained: bool = False) -> ClassWeights:
    """Read the classifier that a training has put into its checkpoint; UserError if it holds none.

    Exhibits that had no usable image in training are left out: nothing was learned of them.
    """
    path, _ = locate(ckpt, CHECKPOINTS, "ckpt")
    content = read_checkpoint(path)
    entry = content.get("metilr")
    classifier = entry.get("classifier") if isinstance(entry, Mapping) else None
    if classifier is None:
        raise UserError(f"{path}: holds no classifier; train one, or search images or prototypes", "ckpt")
    try:
        ids, weights = classifier["exhibit_ids"], content["state_dict"][CLASS_WEIGHTS]
        if any(each.nelement() * each.element_size() > each.untyped_storage().nbytes() for each in (ids, weights)):
            raise ValueError("a tensor claims more numbers than the file has")
        is_whole = ids.dtype == torch.int64 and ids.ndim == 1 and len(ids) and weights.ndim == 2
        if not is_whole or weights.shape[0] != len(ids) or not weights.dtype.is_floating_point:
            raise ValueError("weights and exhibits do not belong together")
        rows = weights.float().contiguous()
        if not also_untrained:
            kept = ~torch.isin(ids, classifier.get("untrained", torch.empty(0, dtype=torch.int64)))
            ids, rows = ids[kept], rows[kept]
        if not (torch.isfinite(rows).all() and (rows.norm(dim=1) > 0).all()):
            raise ValueError("a weight is not finite, or all of a class are 0")
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        reason = f"its classifier cannot be read ({one_line(error)})"
        raise UserError(f"{path}: {reason}; copy it again, or take another one", "ckpt") from None
    return ClassWeights(rows.numpy(), ids.numpy())


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint whole or not at all; ``.safetensors`` take what `load_embedder` needs, and no optimizer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as stream:
        if path.suffix == SAFETENSORS:
            stream.write(as_safetensors(content))
            return
        try:
            torch.save(content, stream)
        except RuntimeError as error:  # into which torch's writer turns a full disk
            raise error.__context__ or error from None


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """Read a checkpoint to the CPU without executing pickle code."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file in it, such as {path / 'best.ckpt'}")
    content = read_file(path, remedy := "copy it again, or take another one")
    if path.suffix == SAFETENSORS:
        try:
            content = from_safetensors(path, content)
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(f"{path}: what it says of its model cannot be read ({one_line(error)}); {remedy}") from None
    if not isinstance(content, Mapping) or not isinstance(content.get("state_dict"), Mapping):
        raise UserError(f"{path}: holds no 'state_dict', so it is no checkpoint; files of weights are given as weights")
    return content


def load(model: str | Path) -> Embedder:
    """Open a backbone by name, such as ``r18_swsl`` or ``timm/NAME``, or a checkpoint, for `Embedder.embed`.

    A checkpoint is a file, or an address on the Hugging Face Hub: ``hf://OWNER/NAME[@REVISION][/FILE]``.
    """
    name, path = str(model), Path(model)
    is_file = is_on_hub(model) or path.suffix or path.exists()
    is_name = name in BACKBONES or name.startswith(TIMM) or not is_file
    return build_embedder(name) if is_name else load_embedder(model)


def build_model(options: ModelOptions) -> Embedder:
    """Build the model that options name, in eval mode."""
    parts = {field.name: getattr(options, field.name) for field in fields(options)}
    ckpt = parts.pop("ckpt")
    return build_embedder(**parts) if ckpt is None else load_embedder(ckpt, options.scales)


def load_embedder(ckpt: str | Path, scales: Sequence[float] | None = None) -> Embedder:
    """Build the model that a checkpoint holds, here or on the Hub, in eval mode: metilr's own, or the reference code's.

    Unless scales are given, they are the checkpoint's or, since the reference's have none, the paper's.
    """
    path, name = locate(ckpt, CHECKPOINTS, "ckpt")
    content = read_checkpoint(path)
    state_dict = content["state_dict"]
    if not is_state_dict(state_dict):
        raise UserError(f"{path}: its 'state_dict' holds more than named tensors; take another one")
    claimed = sum(value.numel() * value.element_size() for value in state_dict.values())
    if claimed > 2 * path.stat().st_size:  # weights that layers share are in the file once
        raise UserError(f"{path}: its tensors claim more numbers than the file has; take another one")
    try:
        if (entry := content.get("metilr")) is None:
            licence, (model, weights) = None, _read_reference(state_dict)
        elif entry["format"] != FORMAT:
            raise ValueError(f"it is not of the form {FORMAT}: another version of metilr wrote it")
        else:
            model = ModelEntry.model_validate(entry["model"])
            licence = TypeAdapter(str | None).validate_python(entry["provenance"]["licence"], strict=True)
            weights = {k.removeprefix(EMBEDDER): value for k, value in state_dict.items() if k.startswith(EMBEDDER)}
        embedder = _build(model, weights, scales, f"{path} for {model.backbone}")
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, UserError) and error.parameter is None:  # says which file
            raise
        if isinstance(error, ValidationError):  # whose own text would quote what may be gigabytes
            first = error.errors(include_input=False, include_url=False)[0]
            error = ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
        raise UserError(f"{path}: makes no model ({one_line(error)}); copy it again, or take another one") from None
    digest = tensors_sha256(embedder.backbone.model.state_dict())
    embedder.backbone.provenance = Provenance(f"checkpoint {name}", licence, file_sha256(path), None, digest)
    return embedder.eval()


def _build(model: ModelEntry, weights: StateDict, scales: Sequence[float] | None, source: str) -> Embedder:
    # The file may name a network of any size: compared before there is memory for it.
    shapes = {f"backbone.model.{name}": shape for name, shape in backbone_shapes(model.backbone).items()}
    refuse_unfit(shapes, {name: value for name, value in weights.items() if name.startswith("backbone.")}, (), source)
    backbone = build_backbone(model.backbone, RANDOM, model.stage, model.patch_rounding)
    projector = None
    if model.projector_dim is not None:
        shape = weights["projector.linear.weight"].shape
        if shape != (model.projector_dim, backbone.pooled_dim):
            raise ValueError(f"the projector is {tuple(shape)}, not {(model.projector_dim, backbone.pooled_dim)}")
        projector = Projector(backbone.pooled_dim, model.projector_dim)
    # p as a parameter or as a buffer has the same key; only its shape matters here.
    pooling = Pooling(model.pooling, 3.0 if model.p is None else model.p)
    embedder = Embedder(backbone, pooling, projector, model.scales if scales is None else scales, model.image_size)
    load_strictly(embedder, weights, (), source)
    # Not every published network of a name has the same normalisation: the checkpoint's counts.
    backbone.mean, backbone.std = tuple(model.mean), tuple(model.std)
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


def _read_reference(state_dict: StateDict) -> tuple[ModelEntry, StateDict]:
    """Put a reference checkpoint into metilr's form; only the shapes of its weights tell the architecture."""
    network, linear, p = StateDict(), StateDict(), torch.tensor([3.0])
    for key, value in state_dict.items():
        name = re.sub(r"^(module\.|backbone\.)+", "", key)
        child, _, rest = name.partition(".")
        if name == "pool.p":
            p = value.flatten()[:1]
        elif child == "projector":
            linear[rest.rpartition(".")[2]] = value
        elif child != "fc":
            network[f"{_CHILDREN.get(child, child)}.{rest}"] = value
    kernel, architecture = network.get("layer1.0.conv2.weight"), None
    if kernel is not None and kernel.ndim == 4:
        blocks = tuple(len({key.split(".")[1] for key in network if key.startswith(f"layer{i}.")}) for i in range(1, 5))
        groups = kernel.shape[0] // max(kernel.shape[1], 1)
        architecture = _RESNETS.get(("layer1.0.conv3.weight" in network, blocks, groups, kernel.shape[0]))
    if architecture is None:
        raise ValueError("neither metilr's nor the reference code's: its weights are of no ResNet known here")
    if linear:  # a 1x1 convolution's or a linear layer's
        linear["weight"] = linear["weight"].flatten(1)
        linear["bias"] = linear.get("bias", torch.zeros(len(linear["weight"]))).flatten()
    weights = {f"backbone.model.{name}": value for name, value in network.items()}
    weights |= {f"projector.linear.{name}": value for name, value in linear.items()}
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    weights |= {"pooling.p": p, "mean": mean, "std": std}
    model = ModelEntry(
        backbone=TIMM + architecture, stage=None, patch_rounding="nearest", pooling="gem", p=p.item(),
        projector_dim=len(linear["weight"]) if linear else None, scales=SCALES, mean=IMAGENET_MEAN, std=IMAGENET_STD,
        image_size=None,
    )  # fmt: skip
    return model, weights
