"""Local features of images, and the folder that keeps them: computed when first needed, read by later runs."""

import contextlib
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from metilr.errors import UserError
from metilr.extraction.store import settings_fingerprint
from metilr.files import replaced_file
from metilr.geometry.verify import LocalFeatures
from metilr.models import SCALES
from metilr.models.embedder import BFLOAT16_LEAST_SIDE, Embedder
from metilr.models.weights import tensors_sha256

STRIDE = 8  # px; on val nearly as good as 16 at twice the image size, for a sixth of the work; 32 tells little
N_FEATURES = 1200  # of 4200 in 480 x 320 px; 600 do worse on val, 2000 take twice the time for a match or more
TOLERANCE = 1.5  # strides: a position is known to half a cell of the coarsest scale (2 strides) in either image
LEAST_SPREAD = 1e-5  # of a channel, relative to its largest value: below it is rounding
RECIPE = 2  # to be raised with any change here that changes features


class LocalFeatureExtractor:
    """Turns images into local features with an embedder's weights, and no others, on its device.

    The map is that of the stage with the wanted stride. Where no stage has it, as in ViTs, it is the one that the
    embedder pools. Each channel is standardised over the image's positions at all scales, (x − mean)/std, so that
    descriptors tell what differs from place to place. The strongest by their norm are kept, and L2-normalised.

    ``stride`` is the distance in px between neighbouring positions at scale 1, as it is wanted and then as it is;
    features of all relative image sizes, ``scales``, are put together.
    """

    def __init__(
        self, embedder: Embedder, stride: int = STRIDE, scales: Sequence[float] = SCALES, n_features: int = N_FEATURES
    ) -> None:
        self.embedder = embedder
        self.scales = tuple(float(scale) for scale in scales)
        self.n_features = n_features
        self._index, self.stride = _find_map(embedder.backbone.model, stride)
        self.tolerance = TOLERANCE * self.stride  # what ``verify`` is to be given, in px

    @torch.inference_mode()
    def extract(self, image: Tensor) -> LocalFeatures:
        """Compute the features of one image, uint8 ``(3, H, W)``.

        The backbone runs in whatever precision the caller's autocast sets, with ``Embedder``'s exception for small
        images; all else runs in float32.

        Returns:
            At most ``n_features``, in order of scales and rows, positions in px of this image. None where the map is
            the same everywhere or not finite. Descriptors are rounded to what float16 can say, as they are kept.
        """
        height, width = image.shape[1:]
        normalised = self.embedder.normalise(image[None].to(self.embedder.mean.device))
        maps = [self._map(self._resize(normalised, scale))[0].float().cpu() for scale in self.scales]  # Cxhxw
        positions = np.concatenate([cell_centres(m.shape[1], m.shape[2], height, width) for m in maps])
        descriptors = torch.cat([m.flatten(1).T for m in maps])  # Cxhxw to (h*w)xC
        return _strongest(positions, descriptors.numpy(), self.n_features)

    def settings(self) -> dict[str, Any]:
        """Return everything that determines the features besides the image, as JSON types."""
        backbone, device = self.embedder.backbone, self.embedder.mean.device.type
        return {
            "recipe": RECIPE,
            "backbone": backbone.name,
            "weights_sha256": tensors_sha256(backbone.model.state_dict()),
            "patch_rounding": backbone.patch_rounding if backbone.patch > 1 else None,
            "mean": self.embedder.mean.flatten().tolist(),
            "std": self.embedder.std.flatten().tolist(),
            "map": f"stage {backbone.stage}" if self._index is None else f"index {self._index}",
            "scales": list(self.scales),
            "n_features": self.n_features,
            "device": device,
            "precision": str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "32",
        }

    def _resize(self, images: Tensor, scale: float) -> Tensor:
        height, width = images.shape[-2:]
        size = self.embedder.backbone.fit_size(max(1, math.floor(height * scale)), max(1, math.floor(width * scale)))
        if size == (height, width):
            return images
        return F.interpolate(images, size=size, mode="bilinear", align_corners=False)

    def _map(self, images: Tensor) -> Tensor:
        backbone, device = self.embedder.backbone, images.device.type
        too_small = device == "cpu" and min(images.shape[-2:]) < BFLOAT16_LEAST_SIDE
        with torch.autocast("cpu", enabled=False) if too_small else contextlib.nullcontext():
            if self._index is None:
                features: Tensor = backbone(images).map
            else:
                [features] = backbone.model.forward_intermediates(
                    images, indices=[self._index], stop_early=True, intermediates_only=True
                )
        return features


def cell_centres(n_rows: int, n_columns: int, height: int, width: int) -> np.ndarray:
    """Return the centres of a grid's cells that tile an image, x and y in px, row by row, float32 ``(n, 2)``."""
    y, x = np.meshgrid(np.arange(n_rows) + 0.5, np.arange(n_columns) + 0.5, indexing="ij")
    return np.stack([x * (width / n_columns), y * (height / n_rows)], axis=-1).reshape(-1, 2).astype(np.float32)


def _find_map(model: Any, stride: int) -> tuple[int | None, int]:
    """Return the index in timm's ``feature_info`` and the stride of the map to use; None is the pooled one."""
    stages = list(getattr(model, "feature_info", []))
    strides = [stage["reduction"] for stage in stages]
    # The blocks of a ViT all have one stride: the last does best there, with its norm.
    if hasattr(model, "forward_intermediates") and stride in strides and len(set(strides)) > 1:
        index = len(strides) - 1 - strides[::-1].index(stride)
        return index, stride
    return None, strides[-1] if strides else stride


def _strongest(positions: np.ndarray, features: np.ndarray, n: int) -> LocalFeatures:
    """Standardise features ``(m, C)`` by channel, and return those of the n largest norms in their order."""
    if not np.isfinite(features).all():
        return LocalFeatures(positions[:0], features[:0])
    spread = features.std(axis=0)
    varies = spread > LEAST_SPREAD * np.abs(features).max(axis=0)
    standard = np.where(varies, (features - features.mean(axis=0)) / np.where(varies, spread, 1), 0)
    norms = np.linalg.norm(standard, axis=1)
    kept = np.sort(np.argsort(-norms, kind="stable")[:n])
    kept = kept[norms[kept] > 0]
    descriptors = (standard[kept] / norms[kept, None]).astype(np.float16)
    return LocalFeatures(positions[kept], descriptors.astype(np.float32))


class FeatureCache:
    """Keeps the features of image files: a folder for each model and settings, in it a file for each image.

    An image takes from 0.1 MB of the disk (lite0_in) to 1.2 MB (a ResNet-50), until somebody deletes the folder.
    Descriptors are kept in float16 and returned as kept even when they are new, so that figures do not depend on what
    was there.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder / settings_fingerprint(settings)

    def features(self, image: Path, compute: Callable[[], LocalFeatures]) -> LocalFeatures:
        """Return the features of an image file, computed where they are not there or damaged.

        Of another size or time of change it counts as another image.

        Raises:
            UserError: If they cannot be written.
            OSError: If the image file is missing.
        """
        status = image.stat()
        name = hashlib.sha256(f"{image.resolve()}\n{status.st_size}\n{status.st_mtime_ns}".encode()).hexdigest()[:32]
        file = self.folder / f"{name}.npz"
        with contextlib.suppress(Exception), np.load(file) as arrays:  # NumPy and zipfile raise many types on damage
            return LocalFeatures(arrays["positions"], arrays["descriptors"].astype(np.float32))
        positions, descriptors = compute()
        descriptors = descriptors.astype(np.float16)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replaced_file(file) as stream:
                np.savez(stream, positions=positions, descriptors=descriptors)
        except OSError as error:
            raise UserError(
                f"{error.filename or file}: cannot be written ({error.strerror}); free some space"
            ) from None
        return LocalFeatures(positions, descriptors.astype(np.float32))
