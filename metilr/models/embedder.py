"""The embedder: images to unit-length embeddings and multi-scale descriptors."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from metilr.data.decode import load_image, to_tensor
from metilr.data.pixels import ImageSize, resized_shape
from metilr.distributed import is_lack_of_memory
from metilr.errors import UserError, one_line, shown
from metilr.models import SCALES, PatchRounding, PoolingName, UnfitSizeError
from metilr.models.backbone import Backbone, Features, build_backbone
from metilr.models.pooling import Pooling
from metilr.models.weights import tensors_sha256

MAX_SCALES, MAX_SCALE = 32, 8  # of an image: more is a mistake, and takes gigabytes
# oneDNN's bfloat16 convolutions with stride 2 give random values on AMX where a map is 1 or 2 px wide (seen with
# PyTorch 2.7 and 2.15). No common backbone makes so narrow a map of an image with sides of 128 px or more.
BFLOAT16_LEAST_SIDE = 128
SOUND = (160, 192)  # px, of any backbone and engine: what fails here too is not an image's fault

T = TypeVar("T")


class Projector(nn.Module):
    """A linear map with bias of the pooled vector."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_dim, out_dim)

    @classmethod
    def from_whitening(cls, mean: Tensor, projection: Tensor) -> "Projector":
        """Return x ↦ (x − mean) · projection, of ``(D,)`` and ``(D, dim)``."""
        projector = cls(*projection.shape)
        with torch.no_grad():
            projector.linear.weight.copy_(projection.T)
            projector.linear.bias.copy_(-mean @ projection)
        return projector

    def forward(self, pooled: Tensor) -> Tensor:
        """Map ``(B, in_dim)`` to ``(B, out_dim)``."""
        return self.linear(pooled)


def keep_float32_exact() -> None:
    """Switch TF32 off for this process: GPUs would round float32 convolutions to it, in mixed precision too."""
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")


class Embedder(nn.Module):
    """Images to descriptors: f(x) = L2(projector(L2(pooling(backbone(x))))), summed over scales, L2 again.

    Without a projector the normalisation after it is left out, too; a zero vector stays zero. A backbone's ``head``
    comes right behind the pooling. The backbone runs in the precision of the caller's autocast, but in float32 on the
    CPU where a scaled image has a side below ``BFLOAT16_LEAST_SIDE``; all else runs in float32. ``embed`` resizes to
    ``image_size``, that of the images that it was trained with (see ``load_image``); None: as they are.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, backbone: Backbone, pooling: Pooling, projector: Projector | None = None,
        scales: Sequence[float] = SCALES, image_size: ImageSize | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if pooling.kind == "cls" and not backbone.has_cls:
            other = "attention" if backbone.has_attention else "gem"
            raise UserError(f"cls: {backbone.name} gives no class token here; take {other}", "pooling")
        if pooling.kind == "attention" and not backbone.has_attention:
            other = "cls or gem" if backbone.has_cls else "gem"
            raise UserError(f"attention: {backbone.name} has no attention pooling here; take {other}", "pooling")
        if not 0 < len(scales) <= MAX_SCALES or not all(0 < scale <= MAX_SCALE for scale in scales):
            limits = f"give 1 to {MAX_SCALES} numbers above 0, none above {MAX_SCALE}"
            raise UserError(f"{shown(list(scales))}: {limits}", "scales")
        self.backbone, self.pooling, self.projector = backbone, pooling, projector
        self.scales = tuple(float(scale) for scale in scales)
        self.image_size = image_size
        self.register_buffer("mean", torch.tensor(backbone.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(backbone.std).view(3, 1, 1))

    @property
    def dim(self) -> int:
        """Length of an embedding."""
        return self.backbone.pooled_dim if self.projector is None else self.projector.linear.out_features

    @torch.inference_mode()
    def embed(
        self, images: Sequence[Image.Image | str | Path | Tensor] | Tensor, normalised: bool = False
    ) -> np.ndarray:
        """Describe images of any mode and size, down to ``check_size``'s; float32 ``(N, dim)``, unit length.

        Leaves the embedder in eval mode, and TF32 switched off for this process.

        Args:
            images: PIL images and files' paths, which are resized to ``image_size``; tensors ``(3, H, W)``, or one of
                ``(N, 3, H, W)``, RGB on any device, uint8 or float from 0 to 1, which keep their size.
            normalised: Tensors of floats have the backbone's mean and standard deviation already.
        """
        keep_float32_exact()
        self.eval()
        if isinstance(images, (str, Path)):
            raise UserError(f"{images}: give a list of images", "images")
        descriptors = np.empty((len(images), self.dim), dtype=np.float32)
        for i, image in enumerate(images):
            try:
                descriptors[i] = self.describe(self._input(image, normalised))[0].cpu().numpy()
            except UnfitSizeError as error:
                raise UserError(f"{i}: cannot be described ({error}); leave it out", "images") from error
            except UserError as error:
                raise UserError(f"{i}: {error.message}", "images") if error.parameter == "images" else error from None
        return descriptors

    def _input(self, image: Any, normalised: bool) -> Tensor:
        """What ``describe`` takes of one image that ``embed`` does, ``(1, 3, H, W)`` float32."""
        if isinstance(image, Tensor):
            if image.ndim != 3 or len(image) != 3:
                raise UserError(f"a tensor of shape {tuple(image.shape)}: expected (3, H, W)", "images")
            if normalised and not image.is_floating_point():
                raise UserError(f"{image.dtype}: what is normalised is a tensor of floats", "images")
            pixels = image[None].to(self.mean.device)
            return pixels.float() if normalised else self.normalise(pixels)
        if normalised:
            raise UserError("true: is for tensors alone; leave it out", "normalised")
        if isinstance(image, (str, Path)):
            return self.normalise(load_image(Path(image), self.image_size)[None].to(self.mean.device))
        if not isinstance(image, Image.Image):
            raise UserError(f"a {type(image).__name__}: give PIL images, files' paths or tensors", "images")
        return self.normalise(to_tensor(image, self.image_size)[None].to(self.mean.device))

    def check_size(self, height: int, width: int) -> None:
        """Refuse an image's size, by UnfitSizeError, that at one of the scales is too small for the backbone."""
        for scale in self.scales:
            self._scaled_size(height, width, scale)

    def check_image_size(self, image_size: ImageSize | None) -> None:
        """Refuse a size at which even square images would be too small."""
        try:
            if image_size is not None:
                self.check_size(*resized_shape(1, 1, image_size))
        except UnfitSizeError as error:
            side = max(resized_shape(1, 1, image_size))
            raise UserError(f"{side}: {error}", "image_size") from None

    def normalise(self, images: Tensor) -> Tensor:
        """Turn images ``(B, 3, H, W)``, uint8 or float from 0 to 1, into the backbone's input, float32."""
        if images.dtype == torch.uint8:
            return (images.float() / 255 - self.mean) / self.std
        if not images.is_floating_point() or (images.numel() and not 0 <= images.min() <= images.max() <= 1):
            held = f"{images.min():.4g} to {images.max():.4g}" if images.numel() else "nothing"
            raise UserError(f"{images.dtype}, {held}: give uint8, or floats from 0 to 1", "images")
        return (images.float() - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        """Embed normalised images ``(B, 3, H, W)`` at their own size: ``(B, dim)``, unit length, float32."""
        return self._embed(self._resize(images, 1.0))

    def describe(self, images: Tensor, engine: Callable[[Tensor], Features] | None = None) -> Tensor:
        """Describe normalised images: the sum of their embeddings over the scales, L2-normalised, ``(B, dim)``.

        An engine of ``start_engine`` computes in the backbone's place, but for the small images.
        """
        embeddings = [self._embed(self._resize(images, scale), engine) for scale in self.scales]
        return F.normalize(torch.stack(embeddings).sum(dim=0), dim=1)

    def _embed(self, images: Tensor, engine: Callable[[Tensor], Features] | None = None) -> Tensor:
        if images.device.type != "cpu" or min(images.shape[-2:]) >= BFLOAT16_LEAST_SIDE:
            features = features_of(images, self.backbone, engine or self.backbone)
        else:  # other engines are not safe there either: OpenVINO averages wrongly a map smaller than the window
            with torch.autocast("cpu", enabled=False):
                features = features_of(images, self.backbone, self.backbone)
        with torch.autocast(images.device.type, enabled=False):
            return self.project(F.normalize(self.backbone.head(self.pooling(features)), dim=1))

    def project(self, pooled: Tensor) -> Tensor:
        """Turn unit-length pooled vectors ``(B, backbone.pooled_dim)`` into embeddings ``(B, dim)``."""
        return pooled if self.projector is None else F.normalize(self.projector(pooled), dim=1)

    def _resize(self, images: Tensor, scale: float) -> Tensor:
        """Scale images to ⌊side · scale⌋, at least 1 px; for a ViT, on to the size that fits its patches."""
        height, width = images.shape[-2:]
        size = self._scaled_size(height, width, scale)
        if scale == 1 and size == (height, width):
            return images
        if self.backbone.patch == 1 and min(height, width) * scale >= 1:
            # Samples at exact multiples of 1/scale, as the Met paper's code does, not of the ratio of rounded sides.
            return F.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False, antialias=False)
        return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=False)

    def _scaled_size(self, height: int, width: int, scale: float) -> tuple[int, int]:
        size = self.backbone.fit_size(max(1, math.floor(height * scale)), max(1, math.floor(width * scale)))
        least = self.backbone.least_side
        if min(size) < least:
            enough, scales = math.ceil(least / min(self.scales)), ", ".join(f"{each:.3g}" for each in self.scales)
            needed = f"sides of {enough} px or more at the scales {scales}"
            raise UnfitSizeError(f"{height}x{width} px is too small for {self.backbone.name}: it needs {needed}")
        return size

    def freeze_unused(self) -> None:
        """Freeze what no embedding depends on, such as the stages after ``stage``: DDP waits for its gradients."""
        side = max(64, self.backbone.least_side)
        self(torch.zeros(1, 3, *self.backbone.fit_size(side, side))).sum().backward()
        for parameter in self.backbone.parameters():
            parameter.requires_grad_(parameter.grad is not None)
        self.zero_grad(set_to_none=True)

    def describe_settings(self) -> dict[str, Any]:
        """Return everything that determines a descriptor besides the image, as JSON types.

        The digests are of the tensors as they are now; ``provenance`` is of the weights that training started from.
        """
        backbone, projector = self.backbone, None
        if self.projector is not None:
            sha256 = tensors_sha256(self.projector.state_dict())
            projector = {"in_dim": backbone.pooled_dim, "out_dim": self.dim, "sha256": sha256}
        return {
            "backbone": backbone.name, "weights_sha256": tensors_sha256(backbone.model.state_dict()),
            "stage": backbone.stage, "width": backbone.width, "patch": backbone.patch,
            "patch_rounding": backbone.patch_rounding if backbone.patch > 1 else None,
            "pooling": self.pooling.settings(), "projector": projector, "scales": list(self.scales),
            "mean": self.mean.flatten().tolist(), "std": self.std.flatten().tolist(),
            "provenance": asdict(backbone.provenance),
        }  # fmt: skip


def features_of(images: Tensor, backbone: Backbone, compute: Callable[[Tensor], T]) -> T:
    """Compute a backbone's features of normalised images; UnfitSizeError if it fails for their size, however it does.

    That is where it fails for the first image alone too, and not for a blank one of ``SOUND`` px: a lack of memory, or
    a failing device, is no fault of an image.
    """
    try:
        return compute(images)
    except UserError:
        raise
    except Exception as error:
        sound = images.new_zeros(1, 3, *(side // backbone.patch * backbone.patch for side in SOUND))
        if is_lack_of_memory(error) or _works(compute, images[:1]) or not _works(compute, sound):
            raise
        height, width = images.shape[-2:]
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UnfitSizeError(f"{backbone.name} fails at {height}x{width} px, {reason}") from error


def _works(compute: Callable[[Tensor], object], images: Tensor) -> bool:
    try:
        compute(images)
    except Exception:
        return False
    return True


def build_embedder(
    backbone: str, weights: str | None = None, pooling: PoolingName = "gem", p: float = 3.0, stage: int | None = None,
    scales: Sequence[float] | None = None, patch_rounding: PatchRounding = "nearest", seed: int = 0,
) -> Embedder:  # fmt: skip
    """Build a model, in eval mode, by the names of its parts; see ``ModelOptions``."""
    network = build_backbone(backbone, weights, stage, patch_rounding, seed)
    return Embedder(network, Pooling(pooling, p), scales=SCALES if scales is None else scales).eval()
