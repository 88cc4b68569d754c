"""The geometric check: local features decide how far an answer by descriptors is to be believed.

Descriptors say what two images have in common, wherever it lies; the check asks whether it lies alike. It needs
images: on a store, those of the candidates are read when they are needed.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from metilr.data.decode import NO_FILE, BadImageError, load_image
from metilr.data.ground_truth import QUERY_FILES, GroundTruth
from metilr.distributed import default_workers
from metilr.evaluation.recognition import Recognition, figures_of
from metilr.extraction.callbacks import keep_float32_exact
from metilr.geometry.evidence import OFF, Checked, Gate, apply_evidence, tune_evidence
from metilr.geometry.features import FeatureCache, LocalFeatureExtractor
from metilr.geometry.verify import NOTHING_IN_COMMON, LocalFeatures, Verification, matching_picture, verify
from metilr.models.embedder import Embedder
from metilr.progress import tracked
from metilr.retrieval.knn import NO_ROW

THREADS = default_workers(1)
FEATURES = Path("runs/local_features")


@dataclass(frozen=True, eq=False)
class GeometricCheck:
    """A check of each query's best candidates.

    Attributes:
        extractor: Makes local features, in float32.
        cache: Keeps them; made with ``check_settings``.
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


def check_recognition(
    recognition: Recognition, ground_truth: GroundTruth, check: GeometricCheck, quiet: bool = True
) -> tuple[Recognition, GeometricCheck]:
    """Check the answers to val and test, choosing boost and gate on val.

    Args:
        recognition: Has the candidates, ``check.candidates`` exhibits a query.
        ground_truth: Names the images.
        check: What is done; its own boost and gate are left aside.
        quiet: Show no progress.

    Returns:
        The recognition with other confidences and, with ``reorder``, labels; and the check with boost and gate.

    Raises:
        UserError: If features cannot be kept.
    """
    database = [ground_truth.image(path) for path in ground_truth.paths["database"]]
    database_labels = ground_truth.labels["database"]
    inliers = {
        split: count_inliers(
            check.extractor,
            check.cache,
            [ground_truth.image(path) for path in ground_truth.paths[split]],
            recognition.matches[split].rows[:, : check.candidates],
            database,
            check.image_size,
            quiet,
        )
        for split in QUERY_FILES
    }

    evidence = {
        split: Checked(
            recognition.matches[split], inliers[split], database_labels, ground_truth.n_classes, recognition.tau
        )
        for split in QUERY_FILES
    }
    boost, gate = tune_evidence(recognition.answers["val"], evidence["val"], ground_truth.labels["val"], check.reorder)
    answers = {split: apply_evidence(recognition.answers[split], evidence[split], boost, gate) for split in QUERY_FILES}
    figures = {split: figures_of(of, ground_truth.labels[split]) for split, of in answers.items()}
    checked = dataclasses.replace(recognition, answers=answers, figures=figures, checked=evidence)
    return checked, dataclasses.replace(check, boost=boost, gate=gate)


def geometric_check_of(
    embedder: Embedder, image_size: int | None, candidates: int, reorder: bool, boost: float = 0.0, gate: Gate = OFF
) -> GeometricCheck:
    """Put a check together from a model; features are kept in ``runs/local_features``.

    Raises:
        UserError: If that folder cannot be made or read.
    """
    keep_float32_exact()
    if embedder.mean.device.type == "cpu":  # as the extraction leaves it, so that features are the same without one
        embedder.to(memory_format=torch.channels_last)
    extractor = LocalFeatureExtractor(embedder)
    cache = FeatureCache(FEATURES, check_settings(extractor, image_size))
    return GeometricCheck(extractor, cache, image_size, candidates, reorder, boost, gate)


def count_inliers(
    extractor: LocalFeatureExtractor,
    cache: FeatureCache,
    queries: Sequence[Path],
    candidates: np.ndarray,
    database: Sequence[Path],
    image_size: int | None = None,
    quiet: bool = True,
) -> np.ndarray:
    """Count the matches of each query with each of its candidates that agree about one transform.

    Each pair is verified on its own, so neither order nor company changes a count.

    Args:
        extractor: Makes features.
        cache: Keeps them; made with ``check_settings``.
        queries: Image files, Q.
        candidates: Rows of ``database``, int64 ``(Q, M)``; NO_ROW for none.
        database: Image files, N.
        image_size: As in ``load_image``: what the descriptors were made with.
        quiet: Show no progress.

    Returns:
        int64 ``(Q, M)``; 0 where there is no candidate, or an image cannot be decoded.

    Raises:
        UserError: If the cache cannot be written.
    """
    assert candidates.shape[:1] == (len(queries),), (candidates.shape, len(queries))

    def of_query(i: int) -> np.ndarray:
        counts = np.zeros(candidates.shape[1], dtype=np.int64)
        asked = local_features(extractor, cache, queries[i], image_size)
        if asked is None:
            return counts
        for j in np.flatnonzero(candidates[i] != NO_ROW):
            candidate = local_features(extractor, cache, database[candidates[i, j]], image_size)
            if candidate is not None:
                counts[j] = verify(asked, candidate, extractor.tolerance).n_inliers
        return counts

    with ThreadPoolExecutor(THREADS) as pool, _one_thread_each():
        counted = pool.map(of_query, range(len(queries)))
        found = [*tracked(counted, "checking geometry", len(queries), "queries", quiet)]
    return np.array(found, dtype=np.int64).reshape(candidates.shape)


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Leave the cores to the pool: threads of threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def local_features(
    extractor: LocalFeatureExtractor, cache: FeatureCache, image: Path, image_size: int | None = None
) -> LocalFeatures | None:
    """Return an image file's features, from the cache if they are there; None if it cannot be decoded."""
    try:
        return cache.features(image, lambda: extractor.extract(load_image(image, image_size)))
    except BadImageError:
        return None
    except OSError as error:
        if error.errno not in NO_FILE:
            raise
        return None


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
    candidates = [local_features(check.extractor, check.cache, file, check.image_size) for file in files]
    found = [
        NOTHING_IN_COMMON if candidate is None else verify(features, candidate, check.extractor.tolerance)
        for candidate in candidates
    ]
    return CheckedPhoto(photo, features, files, candidates, found)


def draw_matching(check: GeometricCheck, query: Path, candidate: Path) -> bytes | None:
    """Draw what a query and a database image have in common, as a JPEG; None if that is nothing.

    Raises:
        UserError: If features cannot be kept.
    """
    features = local_features(check.extractor, check.cache, query, check.image_size)
    if features is None:
        return None
    photo = load_image(query, check.image_size)
    return check_photo(check, photo, [candidate], features).draw(0, check.image_size)


def check_settings(extractor: LocalFeatureExtractor, image_size: int | None) -> dict[str, object]:
    """Return what determines the features of an image file: the settings of their cache."""
    return {"features": extractor.settings(), "image_size": image_size}
