"""Pooling: one vector from a map of local features."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metilr.errors import UserError
from metilr.models.backbone import Features
from metilr.models.weights import tensors_sha256

PoolingName = Literal["gem", "mac", "spoc", "rmac", "cls"]

EPS = 1e-6  # GeM's clamp: keeps powers and their gradients finite


def gem(features: Tensor, p: Tensor | float = 3.0, eps: float = EPS) -> Tensor:
    """Pool by the generalised mean: the p-th root of the mean p-th power over the positions.

    p = 1 is the mean, and large p tends to the maximum. Values below ``eps`` count as ``eps``: after a ReLU
    that changes next to nothing, but a ViT's tokens are negative about half of the time, and GeM drops that
    half. Computed in float32 (float64 stays): a cube overflows float16. The maximum is taken out of the power
    before and put back after, so that no p overflows float32 either.

    Args:
        features: ``(B, C, H, W)``.
        p: Exponent > 0; a scalar, ``(1,)``, or one per channel ``(C,)``.
        eps: Lower clamp.

    Returns:
        ``(B, C)``, float32 or float64.

    Source: Radenović et al., Fine-tuning CNN Image Retrieval with No Human Annotation, TPAMI 2019, eq. 3.
    """
    features = _full_precision(features).clamp(min=eps)
    p = torch.as_tensor(p, dtype=features.dtype, device=features.device)
    # The peak cancels out of the result, so it needs no gradient.
    peak = features.detach().amax(dim=(-2, -1), keepdim=True)
    mean = (features / peak).pow(p.view(-1, 1, 1)).mean(dim=(-2, -1))
    return peak[..., 0, 0] * mean.pow(1 / p.view(-1))


def mac(features: Tensor) -> Tensor:
    """Pool by the maximum over the positions.

    Args:
        features: ``(B, C, H, W)``.

    Returns:
        ``(B, C)``, float32 or float64.

    Source: Tolias et al., Particular Object Retrieval with Integral Max-Pooling, ICLR 2016, section 2.2.
    """
    return _full_precision(features).amax(dim=(-2, -1))


def spoc(features: Tensor) -> Tensor:
    """Pool by the mean over the positions; on a ViT, the mean of the patch tokens.

    Args:
        features: ``(B, C, H, W)``.

    Returns:
        ``(B, C)``, float32 or float64.

    Source: Babenko and Lempitsky, Aggregating Deep Convolutional Features, ICCV 2015; no centre prior.
    """
    return _full_precision(features).mean(dim=(-2, -1))


def rmac(features: Tensor, levels: int = 3) -> Tensor:
    """Pool by regional maxima: the sum over square regions of each region's unit-length maximum vector.

    The regions are ``rmac_regions``. Unlike the paper, no PCA is applied to the regional vectors; unlike some
    public code, the whole map is not added as one more region.

    Args:
        features: ``(B, C, H, W)``.
        levels: Number of region sizes.

    Returns:
        ``(B, C)``, float32 or float64, not normalised.

    Source: Tolias et al., Particular Object Retrieval with Integral Max-Pooling, ICLR 2016, section 3.2.
    """
    features = _full_precision(features)
    pooled = torch.zeros_like(features[..., 0, 0])
    for top, left, side in rmac_regions(features.shape[-2], features.shape[-1], levels):
        region = features[..., top : top + side, left : left + side]
        pooled = pooled + F.normalize(region.amax(dim=(-2, -1)), dim=1)
    return pooled


def rmac_regions(height: int, width: int, levels: int = 3) -> list[tuple[int, int, int]]:
    """Return the square regions of R-MAC as (top, left, side).

    Level 1 has the largest squares that fit, as many along the longer side as bring the share that neighbours
    have in common closest to 40%; level l has squares of side ⌊2·min(H, W)/(l+1)⌋, l along the shorter side
    and l − 1 more than level 1 along the longer, evenly spaced from edge to edge (starts rounded down).
    Levels whose squares would be smaller than one position are left out.

    Args:
        height: Of the map, in positions.
        width: Of the map, in positions.
        levels: Number of region sizes.
    """
    short, long = min(height, width), max(height, width)
    # 2 to 7 squares along the longer side, as in the authors' code; a square map has one.
    along = 1 if short == long else min(range(2, 8), key=lambda n: abs(1 - (long - short) / (n - 1) / short - 0.4))
    regions: list[tuple[int, int, int]] = []
    for level in range(1, levels + 1):
        side = 2 * short // (level + 1)
        if side == 0:
            break
        rows = level if height == short else level + along - 1
        columns = level if width == short else level + along - 1
        for top in _starts(height, side, rows):
            regions.extend((top, left, side) for left in _starts(width, side, columns))
    return regions


def _starts(length: int, side: int, count: int) -> list[int]:
    """Return where ``count`` squares start that are spread evenly over a length."""
    if count == 1:
        return [0]
    return [math.floor(i * (length - side) / (count - 1)) for i in range(count)]


def _full_precision(features: Tensor) -> Tensor:
    # No autocast casts the operations of this file down from float32, so the input's type settles it.
    return features if features.dtype == torch.float64 else features.float()


class GeM(nn.Module):
    """Generalised-mean pooling, see ``gem``.

    Args:
        width: Channels of the features.
        p: Exponent, its start if learnable.
        learnable: Whether training may change p.
        per_channel: Whether each channel has its own p.

    Attributes:
        p: ``(1,)`` or ``(width,)``; a parameter if learnable, else a buffer.

    Raises:
        UserError: If p is not a finite number above 0.
    """

    p: Tensor

    def __init__(self, width: int, p: float = 3.0, learnable: bool = False, per_channel: bool = False) -> None:
        super().__init__()
        if not (math.isfinite(p) and p > 0):
            raise UserError(f"--p {p}: GeM's exponent must be a finite number above 0")
        value = torch.full((width if per_channel else 1,), float(p))
        if learnable:
            self.p = nn.Parameter(value)
        else:
            self.register_buffer("p", value)

    def forward(self, features: Features) -> Tensor:
        """Pool a batch of features to ``(B, C)``."""
        return gem(features.map, self.p)

    def settings(self) -> dict[str, Any]:
        """Return what determines the output; one p as a number, one per channel by its digest."""
        single = self.p.numel() == 1
        return {
            "kind": "gem",
            "p": self.p.item() if single else None,
            "p_sha256": None if single else tensors_sha256({"p": self.p}),
            "eps": EPS,
        }


class MAC(nn.Module):
    """Maximum pooling, see ``mac``."""

    def forward(self, features: Features) -> Tensor:
        """Pool a batch of features to ``(B, C)``."""
        return mac(features.map)

    def settings(self) -> dict[str, Any]:
        """Return what determines the output."""
        return {"kind": "mac"}


class SPoC(nn.Module):
    """Mean pooling, see ``spoc``."""

    def forward(self, features: Features) -> Tensor:
        """Pool a batch of features to ``(B, C)``."""
        return spoc(features.map)

    def settings(self) -> dict[str, Any]:
        """Return what determines the output."""
        return {"kind": "spoc"}


class RMAC(nn.Module):
    """Regional maximum pooling, see ``rmac``.

    Args:
        levels: Number of region sizes.
    """

    def __init__(self, levels: int = 3) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, features: Features) -> Tensor:
        """Pool a batch of features to ``(B, C)``."""
        return rmac(features.map, self.levels)

    def settings(self) -> dict[str, Any]:
        """Return what determines the output."""
        return {"kind": "rmac", "levels": self.levels}


class CLS(nn.Module):
    """A ViT's class token in place of pooling."""

    def forward(self, features: Features) -> Tensor:
        """Return the class token ``(B, C)``, float32 or float64.

        Raises:
            UserError: If the backbone has none.
        """
        if features.cls is None:
            raise UserError("--pooling cls: the backbone gives no class token; use --pooling gem")
        return _full_precision(features.cls)

    def settings(self) -> dict[str, Any]:
        """Return what determines the output."""
        return {"kind": "cls"}


Pooling = GeM | MAC | SPoC | RMAC | CLS


def build_pooling(
    name: PoolingName, width: int, p: float = 3.0, learnable: bool = False, per_channel: bool = False
) -> Pooling:
    """Build a pooling by name.

    Args:
        name: ``gem``, ``mac``, ``spoc``, ``rmac`` or ``cls``.
        width: Channels of the features.
        p: GeM's exponent, its start if learnable.
        learnable: Whether training may change p.
        per_channel: Whether each channel has its own p.

    Raises:
        UserError: If the name is unknown, p is not above 0, or an option of GeM is set for another pooling.
    """
    if name == "gem":
        return GeM(width, p, learnable, per_channel)
    others: dict[str, type[MAC | SPoC | RMAC | CLS]] = {"mac": MAC, "spoc": SPoC, "rmac": RMAC, "cls": CLS}
    if name not in others:
        raise UserError(f"--pooling {name}: unknown; use gem, {', '.join(others)}")
    if learnable or per_channel:
        raise UserError(f"--pooling {name}: has no exponent to learn or to set per channel; use --pooling gem")
    return others[name]()
