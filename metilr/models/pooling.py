"""Pooling: one vector from a map of local features.

The functions take features ``(B, C, H, W)`` and return ``(B, C)``, float32 or, of float64, float64, whatever autocast
says.
"""

import math
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metilr.errors import UserError
from metilr.models import PoolingName
from metilr.models.backbone import Features

EPS = 1e-6  # GeM's clamp: keeps powers and their gradients finite
LEVELS = 3  # of R-MAC


def gem(features: Tensor, p: Tensor | float = 3.0, eps: float = EPS) -> Tensor:
    """Pool by the generalised mean: the p-th root of the mean p-th power over the positions, p > 0.

    p = 1 is the mean, and large p tends to the maximum. Values below ``eps`` count as ``eps``: of a ViT's tokens that
    drops about half. The maximum is taken out of the power and put back after, so that no p overflows float32.

    Source: Radenović et al., Fine-tuning CNN Image Retrieval with No Human Annotation, TPAMI 2019, eq. 3.
    """
    features = _full_precision(features).clamp(min=eps)
    p = torch.as_tensor(p, dtype=features.dtype, device=features.device)
    peak = features.detach().amax(dim=(-2, -1), keepdim=True)  # it cancels out, so it needs no gradient
    mean = (features / peak).pow(p.view(1, 1, 1)).mean(dim=(-2, -1))
    return peak[..., 0, 0] * mean.pow(1 / p.view(1))


def mac(features: Tensor) -> Tensor:
    """Pool by the maximum; source: Tolias et al., Particular Object Retrieval, ICLR 2016, section 2.2."""
    return _full_precision(features).amax(dim=(-2, -1))


def spoc(features: Tensor) -> Tensor:
    """Pool by the mean; source: Babenko and Lempitsky, ICCV 2015, without its centre prior."""
    return _full_precision(features).mean(dim=(-2, -1))


def rmac(features: Tensor) -> Tensor:
    """Pool by regional maxima: the sum over ``rmac_regions`` of each one's unit-length maximum vector, not normalised.

    Source: Tolias et al., section 3.2, without its PCA; unlike in some public code, the whole map is no further region.
    """
    features = _full_precision(features)
    pooled = torch.zeros_like(features[..., 0, 0])
    for top, left, side in rmac_regions(features.shape[-2], features.shape[-1]):
        region = features[..., top : top + side, left : left + side]
        pooled = pooled + F.normalize(region.amax(dim=(-2, -1)), dim=1)
    return pooled


def rmac_regions(height: int, width: int, levels: int = LEVELS) -> list[tuple[int, int, int]]:
    """Return R-MAC's square regions on a map, in positions, as (top, left, side).

    Level 1 has the largest squares that fit, as many along the longer side as bring the overlap of neighbours closest
    to 40%; level l has squares of side ⌊2·min(H, W)/(l+1)⌋, l along the shorter side and l − 1 more than level 1 along
    the longer, evenly spaced from edge to edge, starts rounded down. Levels with squares below one position fall away.
    """
    short, long = min(height, width), max(height, width)
    # 2 to 7 squares along the longer side, as in the authors' code; a square map has one.
    along = 1 if short == long else min(range(2, 8), key=lambda n: abs(1 - (long - short) / (n - 1) / short - 0.4))
    regions: list[tuple[int, int, int]] = []
    for level in range(1, min(levels, 2 * short - 1) + 1):
        side = 2 * short // (level + 1)
        rows = level if height == short else level + along - 1
        columns = level if width == short else level + along - 1
        tops = [i * (height - side) // max(rows - 1, 1) for i in range(rows)]
        lefts = [i * (width - side) // max(columns - 1, 1) for i in range(columns)]
        regions += [(top, left, side) for top in tops for left in lefts]
    return regions


def _full_precision(features: Tensor) -> Tensor:
    return features if features.dtype == torch.float64 else features.float()


class Pooling(nn.Module):
    """One vector from a backbone's features, by kind; ``cls`` and ``attention`` take a ViT's in the map's place.

    GeM has an exponent ``p``, ``(1,)``: a parameter if learnable, else a buffer; other kinds ignore it.
    """

    p: Tensor

    def __init__(self, kind: PoolingName, p: float = 3.0, learnable: bool = False) -> None:
        super().__init__()
        if kind not in get_args(PoolingName):
            raise UserError(f"{kind}: unknown; choose {', '.join(get_args(PoolingName))}", "pooling")
        if learnable and kind != "gem":
            raise UserError(f"{kind}: has no exponent to learn; take pooling gem", "pooling")
        self.kind = kind
        if kind == "gem":
            if not (math.isfinite(p) and p > 0):
                raise UserError(f"{p}: GeM's exponent must be a finite number above 0", "p")
            value = torch.full((1,), float(p))
            self.p = nn.Parameter(value) if learnable else nn.Buffer(value)

    def forward(self, features: Features) -> Tensor:
        """Pool a batch of features to ``(B, C)``."""
        if self.kind == "gem":
            return gem(features.map, self.p)
        if self.kind in ("cls", "attention"):
            token = getattr(features, self.kind)
            assert token is not None, "Embedder refuses such a backbone"
            return _full_precision(token)
        return {"mac": mac, "spoc": spoc, "rmac": rmac}[self.kind](features.map)

    def settings(self) -> dict[str, Any]:
        """Return what determines the output, in the words that stores keep."""
        if self.kind == "gem":
            return {"kind": "gem", "p": self.p.item(), "p_sha256": None, "eps": EPS}
        return {"kind": self.kind} | ({"levels": LEVELS} if self.kind == "rmac" else {})
