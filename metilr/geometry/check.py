"""The geometric check of images: local features of a query and of its candidates, and how far they agree.

Features are computed when they are first needed, on a store too, and kept in a folder that later runs read.
"""

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import InterpolationMode, rotate

from metilr.data.decode import NO_FILE, BadImageError, load_image
from metilr.data.pixels import ImageSize
from metilr.distributed import default_workers, pool_of
from metilr.extraction.store import settings_fingerprint
from metilr.files import regular, replaced_file
from metilr.geometry.evidence import OFF, Gate
from metilr.geometry.verify import LocalFeatures, matching_picture, verify
from metilr.models import SCALES, UnfitSizeError
from metilr.models.backbone import Backbone
from metilr.models.embedder import BFLOAT16_LEAST_SIDE, Embedder, features_of, keep_float32_exact
from metilr.models.engines import folded, map_of
from metilr.models.weights import tensors_sha256
from metilr.progress import tracked
from metilr.retrieval.knn import NO_ROW

FEATURES = Path("runs/local_features")
STRIDE = 8  # px; on val nearly as good as 16 at twice the image size, for a sixth of the work; 32 tells little
N_FEATURES = 1200  # of 4200 in 480 x 320 px; 600 do worse on val, 2000 take twice the time for a match or more
TOLERANCE = 1.5  # strides: a position is known to half a cell of the coarsest scale (2 strides) in either image
LEAST_SPREAD = 1e-5  # of a channel, relative to its largest value: below it is rounding
SURE = 40  # inliers: 325 photos of other things have 33 at most, in 400 pairs each
RECIPE = 2  # to be raised with any change here that changes features


Map = Callable[..., Iterable[Any]]  # ``map``, or that of a pool


class LocalFeatureExtractor:
    """Turns images into local features with an embedder's weights, and no others, on its device.

    The map is that of the stage with the wanted stride in px or, where none has it, as in ViTs, the one that the
    embedder pools; ``stride`` is then that one's. Features of all ``scales`` are put together.
    """

    def __init__(
        self, embedder: Embedder, stride: int = STRIDE, scales: Sequence[float] = SCALES, n_features: int = N_FEATURES
    ) -> None:
        self.embedder = embedder
        self.scales = tuple(float(scale) for scale in scales)
        self.n_features = n_features
        model = embedder.backbone.model
        strides = [stage["reduction"] for stage in getattr(model, "feature_info", [])]
        self._index: int | None = None  # in timm's ``feature_info``; None is the pooled map
        self.stride: int = strides[-1] if strides else stride
        # The blocks of a ViT all have one stride: the last does best there, with its norm.
        if hasattr(model, "forward_intermediates") and stride in strides and len(set(strides)) > 1:
            self._index, self.stride = len(strides) - 1 - strides[::-1].index(stride), stride
        self.tolerance = TOLERANCE * self.stride  # what ``verify`` is to be given, in px
        self.backbone = folded(embedder.backbone, self._map_of)

    @torch.inference_mode()
    def extract(self, image: Tensor) -> LocalFeatures:
        """Compute the features of one image, uint8 ``(3, H, W)``, at most ``n_features``, by scales and rows.

        Each channel is standardised over the positions of all scales, so that descriptors tell what differs from place
        to place; the strongest by their norm are L2-normalised, and rounded to what float16 can say, as they are kept.
        A map that is the same everywhere or not finite gives none, nor does a scale at which the image is too small
        for the network. Autocast is as in ``Embedder``.
        """
        height, width = image.shape[1:]
        normalised = self.embedder.normalise(image[None].to(self.embedder.mean.device))
        maps = []
        for scaled in [self._resize(normalised, scale) for scale in self.scales]:
            with contextlib.suppress(UnfitSizeError):
                maps.append(self._map(scaled)[0].float().cpu())  # Cxhxw
        if not maps:
            return LocalFeatures(np.empty((0, 2), np.float32), np.empty((0, 1), np.float32))
        positions = np.concatenate([cell_centres(m.shape[1], m.shape[2], height, width) for m in maps])
        features = torch.cat([m.flatten(1).T for m in maps]).numpy()  # Cxhxw to (h*w)xC
        if not np.isfinite(features).all():
            return LocalFeatures(positions[:0], features[:0])
        spread = features.std(axis=0)
        varies = spread > LEAST_SPREAD * np.abs(features).max(axis=0)
        standard = np.where(varies, (features - features.mean(axis=0)) / np.where(varies, spread, 1), 0)
        norms = np.linalg.norm(standard, axis=1)
        kept = np.sort(np.argsort(-norms, kind="stable")[: self.n_features])
        kept = kept[norms[kept] > 0]
        descriptors = (standard[kept] / norms[kept, None]).astype(np.float16)
        return LocalFeatures(positions[kept], descriptors.astype(np.float32))

    def extract_turned(self, image: Tensor, degrees: float) -> LocalFeatures:
        """Compute the features of an image turned counter-clockwise, at positions in the image as it is.

        The grey beyond a turned image's edges gives none.
        """
        if degrees == 0:
            return self.extract(image)
        grey = (255 * self.embedder.mean.flatten()).tolist()
        turned = rotate(image, degrees, InterpolationMode.BILINEAR, expand=True, fill=grey)
        positions, descriptors = self.extract(turned)
        here, there = (np.array([each.shape[2], each.shape[1]], np.float32) for each in (image, turned))
        sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
        back = (positions - there / 2) @ np.array([[cosine, sine], [-sine, cosine]], np.float32) + here / 2
        is_inside = ((back >= 0) & (back <= here)).all(axis=1)
        return LocalFeatures(back[is_inside], descriptors[is_inside])

    def settings(self) -> dict[str, Any]:
        """Return everything that determines the features besides the image, as JSON types."""
        backbone, device = self.embedder.backbone, self.embedder.mean.device.type
        return {
            "recipe": RECIPE, "backbone": backbone.name, "weights_sha256": tensors_sha256(backbone.model.state_dict()),
            "patch_rounding": backbone.patch_rounding if backbone.patch > 1 else None,
            "mean": self.embedder.mean.flatten().tolist(), "std": self.embedder.std.flatten().tolist(),
            "map": f"stage {backbone.stage}" if self._index is None else f"index {self._index}",
            "scales": list(self.scales), "n_features": self.n_features, "device": device,
            "precision": str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "32",
        }  # fmt: skip

    def _resize(self, images: Tensor, scale: float) -> Tensor:
        height, width = images.shape[-2:]
        size = self.embedder.backbone.fit_size(max(1, math.floor(height * scale)), max(1, math.floor(width * scale)))
        if size == (height, width):
            return images
        return F.interpolate(images, size=size, mode="bilinear", align_corners=False)

    def _map(self, images: Tensor) -> Tensor:
        is_small = min(images.shape[-2:]) < BFLOAT16_LEAST_SIDE
        with torch.autocast("cpu", enabled=False) if is_small else contextlib.nullcontext():
            return features_of(images, self.backbone, partial(self._map_of, self.backbone))

    def _map_of(self, backbone: Backbone, images: Tensor) -> Tensor:
        if self._index is None:
            return map_of(backbone, images)
        features: list[Tensor] = backbone.model.forward_intermediates(
            images, indices=[self._index], stop_early=True, intermediates_only=True
        )
        return features[0]


def cell_centres(n_rows: int, n_columns: int, height: int, width: int) -> np.ndarray:
    """Return the centres of a grid's cells that tile an image, x and y in px, row by row, float32 ``(n, 2)``."""
    y, x = np.meshgrid(np.arange(n_rows) + 0.5, np.arange(n_columns) + 0.5, indexing="ij")
    return np.stack([x * (width / n_columns), y * (height / n_rows)], axis=-1).reshape(-1, 2).astype(np.float32)


@dataclass(frozen=True, eq=False)
class GeometricCheck:
    """A check of each query's best candidates."""

    extractor: LocalFeatureExtractor
    folder: Path  # of the features of this model and these settings, a file for each image; grows until it is deleted
    image_size: ImageSize | None  # of ``load_image``: what the descriptors were made with
    candidates: int  # exhibits that are checked, the nearest image of each
    reorder: bool  # whether inliers may decide between them; else the label stays
    turns: int = 1  # of each query, in steps of a full circle; early maps differ from some 25 degrees on
    boost: float = 0.0  # of the candidates' similarities, chosen on val; see ``reordered``
    gate: Gate = OFF  # of the confidence, chosen on val

    def features(self, image: Path, degrees: float = 0) -> LocalFeatures | None:
        """Return the features of an image file, turned, kept or computed; None if it cannot be decoded.

        Of another size or time of change it is another image. What is kept takes 0.1 MB (lite0_in) to 1.2 MB
        (ResNet-50), in float16, to which the extractor rounds: figures do not depend on it.
        """
        try:
            status = image.stat()
            content = f"{image.resolve()}\n{status.st_size}\n{status.st_mtime_ns}" + (f"\n{degrees}" if degrees else "")
            file = self.folder / f"{hashlib.sha256(content.encode()).hexdigest()[:32]}.npz"
            with contextlib.suppress(Exception), np.load(regular(file)) as arrays:  # damage raises many types
                return LocalFeatures(arrays["positions"], arrays["descriptors"].astype(np.float32))
            positions, descriptors = self.extractor.extract_turned(load_image(image, self.image_size), degrees)
        except (BadImageError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in NO_FILE:
                raise
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        with replaced_file(file) as stream:
            np.savez(stream, positions=positions, descriptors=descriptors.astype(np.float16))
        return LocalFeatures(positions, descriptors)

    def query_features(self, query: Path | Tensor) -> list[LocalFeatures]:
        """Return the features of a query, a file or uint8 ``(3, H, W)``, in each turn; none if it cannot be decoded."""
        degrees = [360 * i / self.turns for i in range(self.turns)]
        if isinstance(query, Tensor) and self.turns > 1:
            with pool_of(torch.get_num_threads()) as pool:
                return [*pool.map(partial(self.extractor.extract_turned, query), degrees)]
        if isinstance(query, Tensor):
            return [self.extractor.extract(query)]
        return [features for each in degrees if (features := self.features(query, each)) is not None]

    def count(
        self, query: Sequence[LocalFeatures], candidates: Iterable[LocalFeatures | None], each: Map = map
    ) -> np.ndarray:
        """Count the matches of each turn of a query with each image that agree about one transform, int64 ``(M, T)``.

        They are 0 without either. Once an image has ``SURE``, those behind are counted upright and in its turn alone.
        """

        def agreeing(others: LocalFeatures | None, turns: Sequence[int]) -> np.ndarray:
            counts = np.zeros(self.turns, dtype=np.int64)
            if others is not None:
                counts[turns] = [verify(query[i], others, self.extractor.tolerance).n_inliers for i in turns]
            return counts

        turns, rest, counts = [*range(len(query))], iter(candidates), []
        for others in rest if len(turns) > 2 else ():
            counts.append(np.sum([*each(partial(agreeing, others), [[i] for i in turns])], axis=0))
            if counts[-1].max() >= SURE:
                turns = sorted({0, int(counts[-1].argmax())})
                break
        counts += each(lambda others: agreeing(others, turns), rest)
        return np.array(counts, dtype=np.int64).reshape(len(counts), self.turns)

    def draw(self, photo: Path | Tensor, query: Sequence[LocalFeatures], candidate: Path) -> bytes | None:
        """Draw what a photo, a file or uint8 ``(3, H, W)``, and an image share, as a JPEG; None if that is nothing."""
        others = self.features(candidate)
        if others is None or not query:
            return None
        turns = [(turned, verify(turned, others, self.extractor.tolerance)) for turned in query]
        features, verified = max(turns, key=lambda each: each[1].n_inliers)  # of equals the first
        if not verified.n_inliers:
            return None
        photo = photo if isinstance(photo, Tensor) else load_image(photo, self.image_size)
        return matching_picture(photo, load_image(candidate, self.image_size), features, others, verified)


def geometric_check_of(
    embedder: Embedder, image_size: ImageSize | None, candidates: int, reorder: bool, turns: int = 1,
    boost: float = 0.0, gate: Gate = OFF, folder: Path = FEATURES,
) -> GeometricCheck:  # fmt: skip
    """Put a check together from a model; features are kept in the folder."""
    keep_float32_exact()
    if embedder.mean.device.type == "cpu":  # as the extraction leaves it, so that features are the same without one
        embedder.to(memory_format=torch.channels_last)
    extractor = LocalFeatureExtractor(embedder)
    kept = folder / settings_fingerprint({"features": extractor.settings(), "image_size": image_size})
    return GeometricCheck(extractor, kept, image_size, candidates, reorder, turns, boost, gate)


def count_inliers(
    check: GeometricCheck, queries: Sequence[Path], candidates: np.ndarray, database: Sequence[Path], quiet: bool = True
) -> np.ndarray:
    """Count the matches of each query with each candidate that agree about one transform, by turn, int64 ``(Q, M, T)``.

    ``candidates`` are rows of ``database``, int64 ``(Q, M)``; where there is none, NO_ROW, or an image cannot be
    decoded, the count is 0. Queries do not change each other's counts.
    """

    def of_query(i: int) -> np.ndarray:
        images = (None if j == NO_ROW else check.features(database[j]) for j in candidates[i])
        return check.count(check.query_features(queries[i]), images)

    with pool_of(default_workers(1)) as pool:
        done = pool.map(of_query, range(len(queries)))
        counts = [*tracked(done, "checking geometry", len(queries), "queries", quiet)]
    return np.array(counts, dtype=np.int64).reshape(*candidates.shape, check.turns)
