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

from metilr.data.ground_truth import QUERY_FILES, GroundTruth
from metilr.data.transforms import BadImageError, load_image
from metilr.extraction import default_workers
from metilr.feature_cache import FeatureCache
from metilr.geometry import NOTHING_IN_COMMON, LocalFeatures, Verification, verify
from metilr.knn import NO_LABEL, NO_ROW, Predictions
from metilr.matches import Matches
from metilr.matching_picture import matching_picture
from metilr.metrics.functional import gap
from metilr.models.embedder import Embedder
from metilr.models.local_features import LocalFeatureExtractor
from metilr.progress import tracked
from metilr.recognition import Recognition, figures_of

WEIGHT_GRID = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # 0 is off
ENOUGH_GRID = (10.0, 30.0, 100.0)  # wrong matches of 1200 features have 0 to 20 inliers, right ones 20 to 400


@dataclass(frozen=True)
class Gate:
    """How inliers change the confidence of an answer: confidence · ((1 + n) / (1 + n + enough)) ^ weight.

    n is the number of inliers. Many leave the confidence as it is, few lower it, and it stays below 1.

    Attributes:
        weight: 0 or more; 0 leaves every confidence as it is.
        enough: Inliers from about which on more make little difference, above 0.
    """

    weight: float
    enough: float

    def apply(self, log_confidence: np.ndarray, inliers: np.ndarray) -> np.ndarray:
        """Return the gated logarithm of the confidence, log_confidence − weight · log1p(enough / (1 + n)).

        Args:
            log_confidence: ``(Q,)``; -inf stays.
            inliers: Of each answer, see ``inliers_of_answers``, ``(Q,)``.

        Returns:
            float64 ``(Q,)``, nowhere larger than before.
        """
        return log_confidence - self.weight * np.log1p(self.enough / (1 + inliers))


OFF = Gate(0.0, ENOUGH_GRID[0])
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
        reorder: Whether inliers decide between them; else the label stays.
        gate: Of the confidence.
    """

    extractor: LocalFeatureExtractor
    cache: FeatureCache
    image_size: int | None
    candidates: int
    reorder: bool
    gate: Gate = OFF


def check_recognition(
    recognition: Recognition, ground_truth: GroundTruth, check: GeometricCheck, quiet: bool = True
) -> tuple[Recognition, GeometricCheck]:
    """Check the answers to val and test, choosing the gate on val.

    Args:
        recognition: Has the candidates, ``check.candidates`` exhibits a query.
        ground_truth: Names the images.
        check: What is done; its own gate is left aside.
        quiet: Show no progress.

    Returns:
        The recognition with other confidences and, with ``reorder``, labels; and the check with the gate.

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
    answers, evidence = {}, {}
    for split in QUERY_FILES:
        matches = recognition.matches[split]
        answers[split] = recognition.answers[split]
        if check.reorder:
            answers[split] = reordered(answers[split], matches, database_labels, inliers[split], recognition.tau)
        candidate_labels = labels_of(matches.rows[:, : check.candidates], database_labels)
        evidence[split] = inliers_of_answers(answers[split].labels, candidate_labels, inliers[split])
    val = answers["val"]
    gate = tune_gate(val.log_confidence, val.labels, ground_truth.labels["val"], evidence["val"])
    answers = {
        split: dataclasses.replace(of, log_confidence=gate.apply(of.log_confidence, evidence[split]))
        for split, of in answers.items()
    }
    figures = {
        split: figures_of(of, ground_truth.labels[split], of.labels != NO_LABEL) for split, of in answers.items()
    }
    checked = dataclasses.replace(recognition, answers=answers, figures=figures, inliers=inliers)
    return checked, dataclasses.replace(check, gate=gate)


def reordered(
    answers: Predictions, matches: Matches, database_labels: np.ndarray, inliers: np.ndarray, tau: float
) -> Predictions:
    """Answer by the candidate with most inliers, see ``reorder``; its confidence is that of its own similarity.

    The softmax of another class differs by tau times the difference of similarities.

    Args:
        answers: To Q queries.
        matches: Their candidates, the first M of which were checked.
        database_labels: Class of each database row, ``(N,)``.
        inliers: Of the candidates, ``(Q, M)``.
        tau: Inverse temperature.
    """
    rows = matches.rows[:, : inliers.shape[1]]
    labels = reorder(answers.labels, labels_of(rows, database_labels), inliers)
    place = inliers.argmax(axis=1)[:, None]
    is_new = labels != answers.labels
    similarity = np.take_along_axis(matches.similarities, place, axis=1)[:, 0]
    return Predictions(
        labels=labels,
        log_confidence=np.where(
            is_new, answers.log_confidence - tau * (answers.similarity - similarity), answers.log_confidence
        ),
        similarity=np.where(is_new, similarity, answers.similarity),
        nearest=np.where(is_new, np.take_along_axis(rows, place, axis=1)[:, 0], answers.nearest),
    )


def labels_of(rows: np.ndarray, database_labels: np.ndarray) -> np.ndarray:
    """Class of each candidate, int64 in the shape of ``rows``; NO_LABEL for NO_ROW."""
    return np.where(rows == NO_ROW, NO_LABEL, database_labels[rows])


def tune_gate(
    log_confidence: np.ndarray,
    predicted: np.ndarray,
    target: np.ndarray,
    inliers: np.ndarray,
    weight_grid: Sequence[float] = WEIGHT_GRID,
    enough_grid: Sequence[float] = ENOUGH_GRID,
) -> Gate:
    """Choose a gate by GAP on val.

    No gate is among the choices, so GAP on val is never lower with the result than without. Equal GAPs: no gate,
    then the smaller weight, then the smaller ``enough``.

    Args:
        log_confidence: Of each answer, ``(Q,)``.
        predicted: Predicted labels, ``(Q,)``.
        target: True labels, ``(Q,)``; DISTRACTOR where no exhibit is shown.
        inliers: Of each answer, ``(Q,)``.
        weight_grid: Weights to try.
        enough_grid: Values of ``enough`` to try with each.
    """
    best, highest = OFF, gap(log_confidence, predicted, target)
    for weight in sorted(weight_grid):
        for enough in sorted(enough_grid):
            gate = Gate(weight, enough)
            reached = gap(gate.apply(log_confidence, inliers), predicted, target)
            if reached > highest:
                best, highest = gate, reached
    return best


def geometric_check_of(
    embedder: Embedder, image_size: int | None, candidates: int, reorder: bool, gate: Gate = OFF
) -> GeometricCheck:
    """Put a check together from a model; features are kept in ``runs/local_features``."""
    extractor = LocalFeatureExtractor(embedder)
    cache = FeatureCache(FEATURES, check_settings(extractor, image_size))
    return GeometricCheck(extractor, cache, image_size, candidates, reorder, gate)


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
        extractor: Makes features; runs in the caller's autocast.
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
    except (BadImageError, FileNotFoundError):
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


def check_photo(check: GeometricCheck, photo: Tensor, files: Sequence[Path]) -> CheckedPhoto:
    """Verify a photo, uint8 ``(3, H, W)``, with candidates' images.

    Raises:
        UserError: If features cannot be kept.
    """
    features = check.extractor.extract(photo)
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
    try:
        photo = load_image(query, check.image_size)
    except BadImageError:
        return None
    return check_photo(check, photo, [candidate]).draw(0, check.image_size)


def check_settings(extractor: LocalFeatureExtractor, image_size: int | None) -> dict[str, object]:
    """Return what determines the features of an image file: the settings of their cache."""
    return {"features": extractor.settings(), "image_size": image_size}


def inliers_of_answers(predicted: np.ndarray, candidate_labels: np.ndarray, inliers: np.ndarray) -> np.ndarray:
    """Return the most inliers with a candidate of the answered class, int64 ``(Q,)``; 0 without such a candidate.

    Args:
        predicted: Answered label of each query, ``(Q,)``.
        candidate_labels: Label of each candidate, ``(Q, M)``; NO_LABEL for none.
        inliers: Of each candidate, ``(Q, M)``.
    """
    speaks = (candidate_labels == predicted[:, None]) & (candidate_labels != NO_LABEL)
    return np.where(speaks, inliers, 0).max(axis=1, initial=0)


def reorder(predicted: np.ndarray, candidate_labels: np.ndarray, inliers: np.ndarray) -> np.ndarray:
    """Answer by geometry: the label of the candidate with most inliers, where it has more than the answer has.

    Of equal candidates the first counts. Unlike a gate this changes labels, so ACC as well.

    Args:
        predicted: Answered label of each query, ``(Q,)``.
        candidate_labels: Label of each candidate, ``(Q, M)``; NO_LABEL for none.
        inliers: Of each candidate, ``(Q, M)``.

    Returns:
        Labels, int64 ``(Q,)``.
    """
    if not inliers.shape[1]:
        return predicted.copy()
    place = inliers.argmax(axis=1)[:, None]
    most = np.take_along_axis(inliers, place, axis=1)[:, 0]
    labels = np.take_along_axis(candidate_labels, place, axis=1)[:, 0]
    return np.where(most > inliers_of_answers(predicted, candidate_labels, inliers), labels, predicted)
