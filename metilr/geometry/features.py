"""Local features on disk, within a limit: computed when first needed, the least recently used thrown away.

One small file an image, named by a digest of everything that determines its features. Several processes may share a
folder: files appear whole, and one that another process removes meanwhile is computed again.
"""

import contextlib
import hashlib
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from metilr.errors import UserError
from metilr.extraction.store import settings_fingerprint
from metilr.files import read_npz, replaced_file
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
    """Turns images into local features with an embedder's weights, and no others.

    The map is that of the stage with the wanted stride. Where no stage has it, as in ViTs, it is the one that the
    embedder pools.

    Each channel is standardised over the image's positions at all scales, (x − mean)/std, so that descriptors tell
    what differs from place to place. The strongest by their norm are kept, and L2-normalised.

    Args:
        embedder: Has the backbone. The work is done on its device.
        stride: Wanted distance in px between neighbouring positions at scale 1.
        scales: Relative image sizes; features of all are put together.
        n_features: Most features of an image.

    Attributes:
        stride: Distance in px between neighbouring positions at scale 1, as it is.
        tolerance: What ``verify`` is to be given, in px.
    """

    def __init__(
        self,
        embedder: Embedder,
        stride: int = STRIDE,
        scales: Sequence[float] = SCALES,
        n_features: int = N_FEATURES,
    ) -> None:
        self.embedder = embedder
        self.scales = tuple(float(scale) for scale in scales)
        self.n_features = n_features
        self._index, self.stride = _find_map(embedder.backbone.model, stride)
        self.tolerance = TOLERANCE * self.stride

    @torch.inference_mode()
    def extract(self, image: Tensor) -> LocalFeatures:
        """Compute the features of one image.

        The backbone runs in whatever precision the caller's autocast sets, with ``Embedder``'s exception for small
        images; all else runs in float32.

        Args:
            image: uint8 ``(3, H, W)``.

        Returns:
            At most ``n_features``, in order of scales and rows, positions in px of this image. None where the map
            is the same everywhere or not finite. Descriptors are rounded to what float16 can say, so that a cache
            keeps them as they are.
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


LIMIT = 4 << 30  # bytes: 40,000 images by lite0_in, 3,000 by a ResNet-50
SUFFIX = ".local.npz"  # of entries; nothing else in the folder is touched
ROOM = 0.9  # of the limit is left after throwing away, so that not every new entry looks through the folder


class FeatureCache:
    """Gives an image's features from disk, or computes and keeps them.

    Descriptors are kept in float16 and returned as kept even when they are new, so figures do not depend on what was
    there. Those of ``LocalFeatureExtractor`` lose nothing by it.

    Args:
        folder: Where the files lie; made if missing.
        settings: Everything besides the image file that determines features; others are never mixed up.
        limit: Most bytes of all entries in the folder. With several processes at work, each may pass it by a
            hundredth.

    Raises:
        UserError: If the folder cannot be made or read.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], limit: int = LIMIT) -> None:
        self.folder = folder
        self.limit = limit
        self._fingerprint = settings_fingerprint(settings)
        self._new_bytes = 0  # written since the folder was looked through
        self._lock = threading.Lock()  # of the two counts
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._old_bytes = sum(size for _, size, _ in self._entries())
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be used as a cache ({error.strerror}); make it writable, or start in another folder"
            ) from None

    def features(self, image: Path, compute: Callable[[], LocalFeatures]) -> LocalFeatures:
        """Return the features of an image file.

        Args:
            image: The file. One of another size or time of change counts as another image.
            compute: Called where they are not on disk, or damaged there.

        Raises:
            UserError: If they cannot be written.
            OSError: If the image file is missing.
        """
        entry = self._entry(image)
        kept = _read(entry)
        if kept is not None:
            return kept
        computed = compute()
        features = LocalFeatures(computed.positions, computed.descriptors.astype(np.float16))
        try:
            with replaced_file(entry) as stream:
                np.savez(stream, **features._asdict())
            with self._lock:
                self._make_room(entry.stat().st_size)
        except FileNotFoundError:
            pass  # another process has thrown it away already
        except OSError as error:
            raise UserError(f"{entry}: cannot be written ({error.strerror}); free some space") from None
        return _in_float32(features)

    def _entry(self, image: Path) -> Path:
        status = image.stat()
        name = f"{self._fingerprint}\n{image.resolve()}\n{status.st_size}\n{status.st_mtime_ns}"
        return self.folder / (hashlib.sha256(name.encode()).hexdigest()[:32] + SUFFIX)

    def _make_room(self, n_bytes: int) -> None:
        self._new_bytes += n_bytes
        # Others write as well: look again before that can be much.
        if self._old_bytes + self._new_bytes <= self.limit and self._new_bytes <= self.limit / 100:
            return
        entries = sorted(self._entries())
        total = sum(size for _, size, _ in entries)
        if total > self.limit:
            for _, size, file in entries:
                if total <= ROOM * self.limit:
                    break
                file.unlink(missing_ok=True)
                total -= size
        self._old_bytes, self._new_bytes = total, 0

    def _entries(self) -> list[tuple[int, int, Path]]:
        """Time of last use, bytes and path of each entry, those included that a killed process left half written."""
        entries = []
        for file in self.folder.glob(f"*{SUFFIX}*"):
            with contextlib.suppress(FileNotFoundError):  # another process throws away as well
                status = file.stat()
                entries.append((status.st_mtime_ns, status.st_size, file))
        return entries


def _read(entry: Path) -> LocalFeatures | None:
    """Return what an entry holds, and note the use; None if it is missing or damaged."""
    try:
        arrays = read_npz(entry)
        features = LocalFeatures(arrays["positions"], arrays["descriptors"])
    except Exception:  # NumPy and zipfile raise many types on damaged files; each means the same here
        return None
    positions, descriptors = features
    if positions.dtype != np.float32 or positions.ndim != 2 or positions.shape[1] != 2:
        return None
    if descriptors.dtype != np.float16 or descriptors.ndim != 2 or len(descriptors) != len(positions):
        return None
    if not np.isfinite(positions).all() or not np.isfinite(descriptors).all():
        return None
    with contextlib.suppress(OSError):  # thrown away by another process just now, or a folder to read from alone
        os.utime(entry)
    return _in_float32(features)


def _in_float32(features: LocalFeatures) -> LocalFeatures:
    return LocalFeatures(features.positions, features.descriptors.astype(np.float32))
