"""Features: the module that turns images into a map of local features, whatever network does it."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from timm.layers.patch_embed import PatchEmbed
from timm.models import EfficientNet
from torch import Tensor, nn

from metilr.errors import UserError

PatchRounding = Literal["nearest", "down", "off"]
FLOAT32_STAGES = 4  # of an EfficientNet, whatever the precision


class Features(NamedTuple):
    """What a backbone makes of a batch of images.

    Attributes:
        map: Local features, ``(B, C, h, w)``.
        cls: Class tokens, ``(B, C)``; None where the backbone has none.
    """

    map: Tensor  # (B, C, h, w)
    cls: Tensor | None  # (B, C); None without a class token


@dataclass(frozen=True)
class Provenance:
    """Where a backbone's weights came from, for the results file.

    Attributes:
        source: URL, hub name, file name, or ``random``.
        licence: As the publisher states it; None if unstated or unknown.
        file_sha256: Digest of the weights file; None if there was none.
        seed: Seed of random weights; None for trained ones.
        weights_sha256: Digest of the loaded tensors, the same whatever file form they came in.
    """

    source: str
    licence: str | None
    file_sha256: str | None
    seed: int | None
    weights_sha256: str


class Backbone(nn.Module):
    """A network without classifier that gives a map of local features, and the class token if it has one.

    The last stage's map is the output of timm's ``forward_features``: with ``conv_head`` for EfficientNets,
    after the final norm for transformers. Earlier stages are numbered from 1: a ResNet's or RegNet's residual
    stages (stage 3 of a ResNet is the output of ``layer3``), a ViT's blocks (without the final norm), and in
    other families the entries of timm's ``feature_info``. What comes after the stage is not computed.

    Starts in eval mode; a training loop that leaves it decides about BatchNorm itself.

    Autocast does not reach the stem and the first four stages of an EfficientNet: they run in float32. In bfloat16 they
    would make most of what it changes in a descriptor, and save next to nothing on CPUs without AMX. (Not with gradient
    checkpointing, which would have to keep their maps.)

    Attributes:
        name: As given to ``build_backbone``.
        mean: Per-channel mean that images are normalised with, for values in [0, 1].
        std: Per-channel standard deviation of the same.
        width: Channels of the map.
        patch: Side that a ViT's image sides must be a multiple of; 1 where any size will do.
        patch_rounding: How ``fit_size`` reaches such a multiple.
        stage: As given to ``build_backbone``.
        has_cls: Whether the features come with a class token.
        provenance: Where the weights came from.
    """

    model: Any  # a timm model: nn.Module does not declare the methods that timm's models share

    def __init__(
        self,
        model: nn.Module,
        name: str,
        mean: Sequence[float],
        std: Sequence[float],
        provenance: Provenance,
        stage: int | None = None,
        patch_rounding: PatchRounding = "nearest",
    ) -> None:
        super().__init__()
        self.model = model.eval()
        self.name = name
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.provenance = provenance
        self.stage = stage
        self.patch_rounding = patch_rounding
        embedding = getattr(self.model, "patch_embed", None)
        # Only non-overlapping patches must tile the image; other stems are strided convolutions.
        self.patch = embedding.patch_size[0] if isinstance(embedding, PatchEmbed) else 1
        self.has_cls = getattr(self.model, "cls_token", None) is not None
        self.width: int = self.model.num_features
        if stage is not None:
            self._index, self.width = _find_stage(self.model, name, stage)
            # Not every family hands out the tokens that precede the grid; those that do have this option.
            options = inspect.signature(self.model.forward_intermediates).parameters
            self.has_cls = self.has_cls and "return_prefix_tokens" in options

    def forward(self, images: Tensor) -> Features:
        """Compute the features of normalised images.

        Args:
            images: ``(B, 3, H, W)``; for a ViT, H and W as ``fit_size`` gives them.

        Returns:
            The map ``(B, C, h, w)`` and the class token ``(B, C)`` or None.
        """
        return self._last_stage(images) if self.stage is None else self._earlier_stage(images)

    @property
    def sensitive(self) -> nn.Sequential | None:
        """What runs in float32 whatever the precision; None where nothing does. The output of it is for ``rest``."""
        if self.stage is not None or not isinstance(self.model, EfficientNet):
            return None
        return nn.Sequential(self.model.conv_stem, self.model.bn1, *self.model.blocks[:FLOAT32_STAGES])

    @property
    def rest(self) -> nn.Sequential:
        """What follows ``sensitive``, up to the map."""
        return nn.Sequential(*self.model.blocks[FLOAT32_STAGES:], self.model.conv_head, self.model.bn2)

    def _last_stage(self, images: Tensor) -> Features:
        if self.sensitive is not None and not self.model.grad_checkpointing:
            with torch.autocast(images.device.type, enabled=False):
                early = self.sensitive(images)
            return Features(self.rest(early), None)
        if not hasattr(self.model, "forward_intermediates"):  # some convolutional families of older timm
            return Features(self._channels_first(self.model.forward_features(images)), None)
        output, [last_map] = self.model.forward_intermediates(images, indices=1)
        if output.ndim == 4:
            return Features(self._channels_first(output), None)
        # Tokens BxNxC: class and register tokens first, then the grid row by row.
        height, width = last_map.shape[-2:]
        grid = output[:, output.shape[1] - height * width :]
        features = grid.transpose(1, 2).unflatten(2, (height, width))  # BxNxC to BxCxhxw
        return Features(features, output[:, 0] if self.has_cls else None)

    def _earlier_stage(self, images: Tensor) -> Features:
        options = {"return_prefix_tokens": True} if self.has_cls else {}
        [features] = self.model.forward_intermediates(
            images, indices=[self._index], stop_early=True, intermediates_only=True, **options
        )
        if not self.has_cls:
            return Features(features, None)
        grid, prefix = features
        return Features(grid, prefix[:, 0])

    def _channels_first(self, features: Tensor) -> Tensor:
        # Swin and a few others keep channels last.
        return features if features.shape[1] == self.width else features.permute(0, 3, 1, 2)

    def fit_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the image size to use for a requested one: sides that are multiples of the patch.

        ``nearest`` rounds to the nearest multiple (up when half-way), ``down`` to the next smaller one, never
        below one patch; ``off`` takes fitting sizes only. Any size fits a backbone without patches.

        Raises:
            UserError: If rounding is off and the size does not fit.
        """
        return self._fit_side(height), self._fit_side(width)

    def _fit_side(self, side: int) -> int:
        if side % self.patch == 0 and side > 0:
            return side
        if self.patch_rounding == "off":
            raise UserError(
                f"--patch_rounding off: an image side of {side} px is no multiple of {self.name}'s patch of "
                f"{self.patch} px; use --patch_rounding nearest or down"
            )
        raised = side + self.patch // 2 if self.patch_rounding == "nearest" else side
        return max(1, raised // self.patch) * self.patch


def _find_stage(model: Any, name: str, stage: int) -> tuple[int, int]:
    """Return a stage's index in timm's ``feature_info`` and its channels."""
    if not hasattr(model, "forward_intermediates"):
        raise UserError(f"--stage {stage}: timm gives only the last stage of {name}; leave --stage out")
    stages = list(model.feature_info)
    # The ResNets and RegNets list their stem first, which is no stage.
    stems = 1 if stages[0]["module"] in ("act1", "stem") else 0
    if not 1 <= stage <= len(stages) - stems:
        raise UserError(f"--stage {stage}: {name} has stages 1 to {len(stages) - stems}")
    index = stage - 1 + stems
    return index, stages[index]["num_chs"]
