"""Models: backbones by name, pooling, the embedder that joins them, and the engines that run them.

What is here imports no library: the options of a command cost no PyTorch.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from metilr.errors import UserError, check_choices

PoolingName = Literal["gem", "mac", "spoc", "rmac", "cls", "attention"]
PatchRounding = Literal["nearest", "down", "off"]
Engine = Literal["torch", "compile", "openvino"]

SCALES = (1.0, 2**-0.5, 0.5)  # the Met paper's
RANDOM = "random"  # the weights that ask for none


def is_on_hub(place: Any) -> bool:
    """Whether a place is an address on the Hugging Face Hub, see `metilr.models.hub`."""
    return str(place).startswith("hf://")


class UnfitSizeError(UserError):
    """An image of a size that a model cannot take; the message says why, and leaves the name to the caller."""


@dataclass(frozen=True)
class ModelOptions:
    """The model that describes images: a checkpoint's, or one of named parts.

    Attributes:
        ckpt: Checkpoint of metilr train, or of the reference code, in place of the model options below: a file, or
            hf://OWNER/NAME[@REVISION][/FILE] on the Hugging Face Hub.
        backbone: One of r18_in, r50_in, r50_swav, r50_sin, r18_swsl, r50_swsl, rx50_32x4d_swsl, rx101_32x4d_swsl,
            rx101_32x8d_swsl, rx101_32x16d_swsl, r50_sscd, lite0_in, or timm/NAME for any timm model.
        weights: File with weights in the official file's form, here or on the Hub as above; "random" for seeded random
            weights; without it the official ones, from their cache or downloaded.
        pooling: Generalised mean, maximum, mean, regional maxima, class token (ViTs; spoc there is the mean of patch
            tokens, and gem ignores their negative values), or a ViT's own attention pooling (SigLIP, PE).
        p: Exponent of GeM.
        stage: Take the map of an earlier stage (ViT: block), counted from 1; without it the last.
        scales: Relative sizes at which an image is described; the descriptors are summed. Without it 1, 1/√2 and 1/2,
            or the checkpoint's.
        patch_rounding: How a ViT's input sides are made multiples of its patch: to the nearest, down, or off to refuse
            other sizes. No effect on CNNs.
        seed: Seeds random weights and simulated visits.
    """

    ckpt: str | Path | None = None
    backbone: str = "lite0_in"
    weights: str | None = None
    pooling: PoolingName = "gem"
    p: float = 3.0
    stage: int | None = None
    scales: Sequence[float] | None = None
    patch_rounding: PatchRounding = "nearest"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what is out of range, and what would be ignored: recorded all the same, it would lie."""
        if isinstance(self.scales, (int, float)):
            object.__setattr__(self, "scales", (self.scales,))
        if self.ckpt is not None and not is_on_hub(self.ckpt):  # an address is no path: // would become /
            object.__setattr__(self, "ckpt", Path(self.ckpt))
        changed = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
        idle = [name for name in changed if name not in ("ckpt", "scales", "seed")] if self.ckpt is not None else []
        if idle:
            raise UserError("has no effect with ckpt, which carries its model; leave it out", idle[0])
        check_choices(self)
        if self.pooling != "gem" and "p" in changed:
            raise UserError(f"has no effect with pooling {self.pooling}; leave it out", "p")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"{self.seed}: choose a number from 0 to 2**63 - 1", "seed")


def check_engine(engine: Engine, device: str) -> None:
    """Refuse an engine that is not installed or does not run on a device, before any work."""
    if engine not in get_args(Engine):
        raise UserError(f"{engine}: unknown; choose {', '.join(get_args(Engine))}", "engine")
    if engine == "openvino" and device != "cpu":
        raise UserError("openvino: runs on the CPU; take accelerator cpu, or engine torch or compile", "engine")
    if engine == "openvino" and importlib.util.find_spec("openvino") is None:
        raise UserError("openvino: is not installed; pip install openvino, or take engine torch", "engine")
