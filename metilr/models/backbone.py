"""Backbones: any network as a module that turns images into a map of local features, built by name."""

import bisect
import contextlib
import difflib
import functools
import inspect
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import timm
import timm.models
import torch
from timm.layers.hybrid_embed import HybridEmbed
from timm.layers.patch_embed import PatchEmbed
from timm.models import EfficientNet
from torch import Tensor, nn

from metilr.distributed import is_lack_of_memory
from metilr.errors import UserError, one_line
from metilr.files import file_sha256
from metilr.models import RANDOM, PatchRounding, UnfitSizeError, weights as weight_files
from metilr.models.hub import WEIGHTS, locate, verify_hub_file
from metilr.models.weights import Provenance
from metilr.models.zoo import BACKBONES, IMAGENET_MEAN, IMAGENET_STD, BackboneSpec, first_timm, version

FLOAT32_STAGES = 4  # of an EfficientNet that describes, whatever the precision
TIMM = "timm/"  # the prefix that asks for one of timm's models
TRIED = (97, 130)  # px, odd: a network that does not take such an image is refused
LONG_SIDE = 777  # px, more than any network's own size


class Features(NamedTuple):
    """What a backbone makes of a batch of images."""

    map: Tensor  # (B, C, h, w)
    cls: Tensor | None  # (B, C); None without a class token
    attention: Tensor | None = None  # (B, C), what the network's own attention pooling gives; None without one


class Backbone(nn.Module):
    """A network without classifier that gives a map of local features, and the class token if it has one.

    The last stage's map is the output of timm's ``forward_features``: with ``conv_head`` for EfficientNets, after the
    final norm for transformers. Earlier stages are numbered from 1: a ResNet's ``layer1`` and on, a ViT's blocks
    (without the final norm), and in other families timm's ``feature_info``. What comes after is not computed.

    ``mean`` and ``std`` are what images are normalised with, per channel, for values in [0, 1]; ``width`` is the number
    of the map's channels, ``patch`` what a ViT's image sides must be a multiple of, 1 where any size will do.
    """

    model: Any  # a timm model: nn.Module does not declare the methods that timm's models share

    def __init__(
        self, model: nn.Module, name: str, mean: Sequence[float], std: Sequence[float], provenance: Provenance,
        stage: int | None = None, patch_rounding: PatchRounding = "nearest",
    ) -> None:  # fmt: skip
        super().__init__()
        self.model, self.name, self.provenance = model.eval(), name, provenance
        self.mean, self.std = tuple(mean), tuple(std)
        self.stage, self.patch_rounding = stage, patch_rounding
        self.patch = _patch_of(getattr(self.model, "patch_embed", None))
        self.has_cls = getattr(self.model, "cls_token", None) is not None
        self.has_attention = stage is None and getattr(self.model, "attn_pool", None) is not None
        self.width: int = self.model.num_features
        self.head_dim = BACKBONES[name].head_dim if name in BACKBONES else None
        if stage is None:
            return
        if self.head_dim is not None:
            raise UserError(f"{stage}: {name} has a layer behind the last one; leave it out", "stage")
        if not hasattr(self.model, "forward_intermediates"):
            raise UserError(f"{stage}: timm gives only the last stage of {name}; leave it out", "stage")
        stages = list(self.model.feature_info)
        stems = 1 if stages[0]["module"] in ("act1", "stem") else 0  # of ResNets and RegNets, which is no stage
        if not 1 <= stage <= len(stages) - stems:
            raise UserError(f"{stage}: {name} has stages 1 to {len(stages) - stems}", "stage")
        self._index = stage - 1 + stems
        self.width = stages[self._index]["num_chs"]
        # Not every family hands out the tokens that precede the grid; those that do have this option.
        options = inspect.signature(self.model.forward_intermediates).parameters
        self.has_cls = self.has_cls and "return_prefix_tokens" in options

    def forward(self, images: Tensor) -> Features:
        """Compute the features of normalised images ``(B, 3, H, W)``; for a ViT, H and W as ``fit_size`` gives them.

        ``sensitive`` is computed in float32, but in autocast's precision while gradients of it are recorded.
        """
        if self.stage is not None:
            options = {"return_prefix_tokens": True} if self.has_cls else {}
            [features] = self.model.forward_intermediates(
                images, indices=[self._index], stop_early=True, intermediates_only=True, **options
            )
            return Features(features[0], features[1][:, 0]) if self.has_cls else Features(features, None)
        early = self.sensitive
        if early is not None and not (torch.is_grad_enabled() and any(p.requires_grad for p in early.parameters())):
            with torch.autocast(images.device.type, enabled=False):
                maps = early(images)
            return Features(self.rest(maps), None)
        if hasattr(self.model, "forward_intermediates"):
            output, [last_map] = self.model.forward_intermediates(images, indices=1)
        else:  # some convolutional families of older timm
            output = self.model.forward_features(images)
        if output.ndim == 4:  # Swin and a few others keep channels last
            return Features(output if output.shape[1] == self.width else output.permute(0, 3, 1, 2), None)
        # Tokens BxNxC: class and register tokens first, then the grid row by row.
        height, width = last_map.shape[-2:]
        grid = output[:, output.shape[1] - height * width :]
        features = grid.transpose(1, 2).unflatten(2, (height, width))  # BxNxC to BxCxhxw
        attention = self.model.forward_head(output, pre_logits=True) if self.has_attention else None
        return Features(features, output[:, 0] if self.has_cls else None, attention)

    @property
    def pooled_dim(self) -> int:
        """Length of a pooled vector, behind the head."""
        return self.head_dim or self.width

    def head(self, pooled: Tensor) -> Tensor:
        """Apply the network's own linear layer behind the pooling, ``(B, width)`` to ``(B, pooled_dim)``, if any."""
        return pooled if self.head_dim is None else self.model.get_classifier()(pooled)

    @property
    def sensitive(self) -> nn.Sequential | None:
        """What describes in float32 whatever the precision, before ``rest``: an EfficientNet's stem and first stages.

        In bfloat16 they would make most of what it changes in a descriptor, and save little on CPUs without AMX.
        """
        if self.stage is not None or not isinstance(self.model, EfficientNet):
            return None
        return nn.Sequential(self.model.conv_stem, self.model.bn1, *self.model.blocks[:FLOAT32_STAGES])

    @property
    def rest(self) -> nn.Sequential:
        """What follows ``sensitive``, up to the map."""
        return nn.Sequential(*self.model.blocks[FLOAT32_STAGES:], self.model.conv_head, self.model.bn2)

    @functools.cached_property
    def least_side(self) -> int:
        """Smallest side in px that the network takes, found with small blank images when it is first asked for."""
        sides = range(self.patch, TRIED[0] + self.patch, self.patch)
        return sides[bisect.bisect_left(sides, True, hi=len(sides) - 1, key=lambda side: not self.fault_at(side, side))]

    def fault_at(self, height: int, width: int) -> str | None:
        """Try a blank image; say what is wrong if it gives no map of features."""
        device = next(self.parameters()).device
        try:
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                features = self(torch.zeros(1, 3, height, width, device=device)).map
        except Exception as error:  # each family in its own way
            if is_lack_of_memory(error):
                raise
            return f"{type(error).__name__}: {one_line(error)}"
        is_map = features.ndim == 4 and features.shape[1] == self.width and features.numel()
        return None if is_map else f"its features are {tuple(features.shape)}"

    def fit_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the size to use for a requested one: multiples of the patch, at least one.

        ``patch_rounding`` "nearest" rounds to the nearest (up when half-way), "down" down; "off" refuses other sizes.
        """
        if self.patch_rounding == "off" and (height % self.patch or width % self.patch):
            reason = f"{height}x{width} px is no multiple of {self.name}'s patch of {self.patch} px"
            raise UnfitSizeError(f"off: {reason}; take nearest or down", "patch_rounding")
        added = self.patch // 2 if self.patch_rounding == "nearest" else 0
        height, width = (max(1, (side + added) // self.patch) * self.patch for side in (height, width))
        return height, width


def _patch_of(embedding: nn.Module | None) -> int:
    """What image sides must be a multiple of, so that patches tile the image; 1 for strided convolutions."""
    if isinstance(embedding, PatchEmbed):
        return int(embedding.patch_size[0])
    if not isinstance(embedding, HybridEmbed):
        return 1
    # Behind a convolutional network that rounds sides up there are more tokens than timm lays out: tried just below
    # a multiple, where any rounding shows.
    ratio: Any = embedding.feat_ratio()
    size = (2 * ratio - 1, 2 * ratio - 1)
    with torch.no_grad():
        n_tokens = math.prod(embedding(torch.zeros(1, 3, *size)).shape[1:-1])
    return 1 if n_tokens == math.prod(embedding.dynamic_feat_size(size)) else ratio


def build_backbone(
    name: str, weights: str | None = None, stage: int | None = None, patch_rounding: PatchRounding = "nearest",
    seed: int = 0,
) -> Backbone:  # fmt: skip
    """Build a backbone with its weights, in eval mode, without a classifier; see ``ModelOptions``."""
    spec = BACKBONES.get(name)
    config = _timm_config(name) if spec is None else {}
    of_timm = spec is None and weights is None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # of the CPU, where timm draws initial weights
        model = _create(name, pretrained=of_timm)
    source, licence, digest = RANDOM, None, None
    if of_timm:
        hub_id, licence = config.get("hf_hub_id"), config.get("license")
        source = f"hf-hub:{hub_id}" if hub_id else config["url"]
        digest = verify_hub_file(hub_id, config.get("hf_hub_filename")) if hub_id else None
    elif weights != RANDOM:
        if spec is not None and weights is None:
            file, source, licence = weight_files.official_file(spec), spec.url, spec.licence
        else:
            file, source = locate(str(weights), WEIGHTS, "weights")
        _load_file(model, spec, file, f"{file} for {name}")
        digest = file_sha256(file)
    weights_sha256 = weight_files.tensors_sha256(model.state_dict())
    provenance = Provenance(source, licence, digest, seed if weights == RANDOM else None, weights_sha256)
    mean, std = (spec.mean, spec.std) if spec else (config.get("mean", IMAGENET_MEAN), config.get("std", IMAGENET_STD))
    backbone = Backbone(model, name, mean, std, provenance, stage, patch_rounding)
    if spec is None:
        _check_any_size(backbone)
    return backbone


def backbone_shapes(name: str) -> dict[str, torch.Size]:
    """Names and shapes of a backbone's weights, without memory for them."""
    if name not in BACKBONES:
        _timm_config(name)
    # Older timm asks for this function's values, of the layers' drop rates.
    with torch.device("meta"), mock.patch.object(torch, "linspace", functools.partial(torch.linspace, device="cpu")):
        model = _create(name)
    return {key: value.shape for key, value in model.state_dict().items()}


def _timm_config(name: str) -> dict[str, Any]:
    """Return timm's record of a model's weights: source, licence, mean, std; empty if it has none."""
    model_name = name.removeprefix(TIMM)
    if model_name == name or not timm.is_model(model_name.partition(".")[0]):
        known = [*BACKBONES, *(TIMM + other for other in timm.list_models())]
        if (needed := first_timm(model_name)) and version(timm.__version__) < version(needed):
            remedy = f"pip install 'timm>={needed}'"
            raise UserError(f"{name}: timm {timm.__version__} has no such model; {remedy}", "backbone")
        near = [TIMM + name] if timm.is_model(name) else difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(BACKBONES)}"
        raise UserError(f"{name}: unknown; {hint} (any timm model is timm/NAME)", "backbone")
    try:
        config = timm.models.get_pretrained_cfg(model_name)
    except RuntimeError as error:  # the architecture exists, the tag after the dot does not
        tags = ", ".join(TIMM + other for other in timm.list_pretrained(model_name.partition(".")[0] + ".*"))
        raise UserError(f"{name}: timm has no such weights; known: {tags}", "backbone") from error
    return {} if config is None else config.to_dict()


def _create(name: str, pretrained: bool = False) -> Any:
    """Create a network without classifier that takes images of any size."""
    if name in BACKBONES:
        return timm.create_model(BACKBONES[name].architecture, num_classes=BACKBONES[name].head_dim or 0)
    model_name = name.removeprefix(TIMM)
    if pretrained and not timm.models.is_model_pretrained(model_name):
        raise UserError(f"{name}: timm has no weights for it; give a file as weights", "backbone")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of each try; the last one's reason is told
    # Of Swin, plain ViTs, others: a model that does not know an option refuses it by name.
    choices: list[dict[str, Any]] = [{"strict_img_size": False}, {"dynamic_img_size": True}, {}]
    for options in choices:
        try:
            model: Any = timm.create_model(model_name, pretrained=pretrained, **options)
            break
        except TypeError as error:
            if not any(option in str(error) for option in options):
                raise
        except OSError as error:  # what huggingface_hub and urllib raise for network, licence gate and disk alike
            reason = f"the weights cannot be had from https://huggingface.co/timm/{model_name} ({one_line(error)})"
            remedy = "get the file by other means and give it as weights"
            raise UserError(f"{name}: {reason}; {remedy}", "backbone") from error
    if not hasattr(model, "reset_classifier"):
        raise UserError(f"{name}: is no image classifier; choose a convolutional network or a plain ViT", "backbone")
    model.reset_classifier(0)
    return model


def _load_file(model: Any, spec: BackboneSpec | None, file: Path, source: str) -> None:
    """Load a file in its publisher's form: a named backbone's official one, or what timm's conversion knows."""
    layers = model.pretrained_cfg.get("classifier") or ()  # of distilled ViTs two
    ignored = tuple(f"{layer}." for layer in ([layers] if isinstance(layers, str) else layers))
    state_dict = weight_files.read_state_dict(file)
    if spec is not None:
        ignored = spec.training_only + (ignored if spec.head_dim is None else ())
        state_dict = {spec.rename(key): value for key, value in state_dict.items()} if spec.rename else state_dict
    elif {key for key in state_dict if not key.startswith(ignored)} != model.state_dict().keys():
        convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        # Only where the keys are not timm's: the conversion would also resize. A form that it does not know either
        # raises anything; strict loading is to name the keys then.
        with contextlib.suppress(Exception):
            state_dict = convert(state_dict, model) if convert else state_dict
    weight_files.load_strictly(model, state_dict, ignored, source)


def _check_any_size(backbone: Backbone) -> None:
    """Refuse a model that cannot take images of any size: try a small odd one, and a long one of its smallest side."""
    for sides in (TRIED, (backbone.least_side, LONG_SIDE)):
        height, width = (max(side // backbone.patch, 1) * backbone.patch for side in sides)
        if fault := backbone.fault_at(height, width):
            problem = f"it gives no feature map for a {height}x{width} image ({fault}), and images have any size"
            raise UserError(f"{backbone.name}: {problem}; choose a convolutional network or a plain ViT", "backbone")
