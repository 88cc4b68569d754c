"""The geometric check of images: local features of a query and of its candidates, and how far they agree.

It needs images: on a store, those of the candidates are read when they are needed.
"""

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from metilr.data.decode import NO_FILE, BadImageError, load_image
from metilr.distributed import default_workers
from metilr.extraction.callbacks import keep_float32_exact
from metilr.geometry.evidence import OFF, Gate
from metilr.geometry.features import FeatureCache, LocalFeatureExtractor
from metilr.geometry.verify import NOTHING_IN_COMMON, LocalFeatures, Verification, matching_picture, verify
from metilr.models.embedder import Embedder
from metilr.progress import tracked
from metilr.retrieval.knn import NO_ROW

FEATURES = Path("runs/local_features")


@dataclass(frozen=True, eq=False)
class GeometricCheck:
    """A check of each query's best candidates.

    Attributes:
        extractor: Makes local features, in float32.
        cache: Keeps them.
        image_size: See ``load_image``: what the descriptors were made with.
        candidates: Exhibits that are checked, the nearest image of each.
        reorder: Whether inliers may decide between them; else the label stays.
        boost: Of the candidates' similarities, chosen on val; see ``reordered``.
        gate: Of the confidence, chosen on val.
    """

    extractor: LocalFeatureExtractor
    cache: FeatureCache
    image_size: int | None
    candidates: int
    reorder: bool
    boost: float = 0.0
    gate: Gate = OFF

    def features(self, image: Path) -> LocalFeatures | None:
        """Return an image file's features, from the cache if they are there; None if it cannot be decoded."""
        try:
            return self.cache.features(image, lambda: self.extractor.extract(load_image(image, self.image_size)))
        except BadImageError:
            return None
        except OSError as error:
            if error.errno not in NO_FILE:
                raise
            return None

    def verify(self, query: LocalFeatures, candidate: LocalFeatures | None) -> Verification:
        """Say what a query's features have in common with a candidate's."""
        return NOTHING_IN_COMMON if candidate is None else verify(query, candidate, self.extractor.tolerance)


def geometric_check_of(
    embedder: Embedder, image_size: int | None, candidates: int, reorder: bool, boost: float = 0.0, gate: Gate = OFF,
    folder: Path = FEATURES,
) -> GeometricCheck:  # fmt: skip
    """Put a check together from a model; features are kept in the folder.

    Raises:
        UserError: If that folder cannot be made or read.
    """
    keep_float32_exact()
    if embedder.mean.device.type == "cpu":  # as the extraction leaves it, so that features are the same without one
        embedder.to(memory_format=torch.channels_last)
    extractor = LocalFeatureExtractor(embedder)
    cache = FeatureCache(folder, {"features": extractor.settings(), "image_size": image_size})
    return GeometricCheck(extractor, cache, image_size, candidates, reorder, boost, gate)


def count_inliers(
    check: GeometricCheck, queries: Sequence[Path], candidates: np.ndarray, database: Sequence[Path], quiet: bool = True
) -> np.ndarray:
    """Count the matches of each query with each of its candidates that agree about one transform.

    Each pair is verified on its own, so neither order nor company changes a count.

    Args:
        check: Makes and keeps features.
        queries: Image files, Q.
        candidates: Rows of ``database``, int64 ``(Q, M)``; NO_ROW for none.
        database: Image files, N.
        quiet: Show no progress.

    Returns:
        int64 ``(Q, M)``; 0 where there is no candidate, or an image cannot be decoded.

    Raises:
        UserError: If the cache cannot be written.
    """
    assert candidates.shape[:1] == (len(queries),), (candidates.shape, len(queries))

    def of_query(i: int) -> np.ndarray:
        counts = np.zeros(candidates.shape[1], dtype=np.int64)
        query = check.features(queries[i])
        if query is None:
            return counts
        for j in np.flatnonzero(candidates[i] != NO_ROW):
            counts[j] = check.verify(query, check.features(database[candidates[i, j]])).n_inliers
        return counts

    with ThreadPoolExecutor(default_workers(1)) as pool, _one_thread_each():
        counts = tracked(pool.map(of_query, range(len(queries))), "checking geometry", len(queries), "queries", quiet)
        return np.array([*counts], dtype=np.int64).reshape(candidates.shape)


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Leave the cores to the pool: threads of threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True, eq=False)
class CheckedPhoto:
    """What a photo has in common with each of its candidates.

    Attributes:
        photo: uint8 ``(3, H, W)``.
        features: The photo's.
        files: The candidates' images.
        candidates: Their features; None where an image cannot be decoded.
        found: What they have in common.
    """

    photo: Tensor
    features: LocalFeatures
    files: Sequence[Path]
    candidates: Sequence[LocalFeatures | None]
    found: Sequence[Verification]

    def draw(self, i: int, image_size: int | None) -> bytes | None:
        """Draw what photo and candidate i have in common, as a JPEG; None if that is nothing."""
        candidate = self.candidates[i]
        if candidate is None or not self.found[i].n_inliers:
            return None
        image = load_image(self.files[i], image_size)
        return matching_picture(self.photo, image, self.features, candidate, self.found[i])


def check_photo(
    check: GeometricCheck, photo: Tensor, files: Sequence[Path], features: LocalFeatures | None = None
) -> CheckedPhoto:
    """Verify a photo, uint8 ``(3, H, W)``, with candidates' images; its features are computed unless they are known.

    Raises:
        UserError: If features cannot be kept.
    """
    features = check.extractor.extract(photo) if features is None else features
    candidates = [check.features(file) for file in files]
    return CheckedPhoto(photo, features, files, candidates, [check.verify(features, each) for each in candidates])


def draw_matching(check: GeometricCheck, query: Path, candidate: Path) -> bytes | None:
    """Draw what a query and a database image have in common, as a JPEG; None if that is nothing.

    Raises:
        UserError: If features cannot be kept.
    """
    features = check.features(query)
    if features is None:
        return None
    photo = load_image(query, check.image_size)
    return check_photo(check, photo, [candidate], features).draw(0, check.image_size)
