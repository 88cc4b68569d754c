"""The calibrated confidence of an evaluation: evidence of its answers, fitted on val, where it ranks better there."""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from metilr.data.ground_truth import NOT_NAMED, QUERY_FILES, GroundTruth
from metilr.evaluation.database import Searchable, query_views
from metilr.evaluation.options import MethodOptions
from metilr.evaluation.recognition import Recognition
from metilr.geometry.evidence import Checked, inlier_lead, inliers_of_answers
from metilr.metrics import DISTRACTOR
from metilr.retrieval.confidence import (
    COUNTED,
    LEAST_BACKGROUND,
    Evidence,
    Fit,
    background_similarities,
    evidence_of_search,
    feature_names,
    fit_calibration,
)
from metilr.retrieval.knn import Matches, Predictions, spread
from metilr.retrieval.whitening import PCAWhitening

if TYPE_CHECKING:
    from metilr.extraction.descriptors import Descriptors


def calibrate_recognition(
    recognition: Recognition, descriptors: "Descriptors", ground_truth: GroundTruth, method: MethodOptions
) -> tuple[Recognition, Fit | None]:
    """Put the probability that an answer is right in place of its confidence, if that ranks better on val.

    Val's distractors are the background; a query of val is not compared with itself, its copies and what its
    photographer took. The recognition stays as it is where cross-validation on val sees no gain, or nothing can be
    fitted; the second is None then.
    """
    target, is_valid = ground_truth.labels["val"], descriptors.is_valid
    taken_by = ground_truth.photographers.get("val", np.full(len(target), NOT_NAMED))
    queries = {split: query_views(descriptors, split, method, recognition.whitening) for split in QUERY_FILES}
    copies = -1 - np.arange(len(target))
    _, same_file = np.unique(queries["val"][:, 0], axis=0, return_inverse=True)  # of one descriptor, down to each bit
    copies[is_valid["val"]] = same_file.ravel()
    photographs = background_of(descriptors, ground_truth, recognition.whitening)
    background = np.flatnonzero(is_valid["val"] & (target == DISTRACTOR))[: len(photographs)]
    is_same = copies[:, None] == copies[background]
    is_same |= (taken_by[:, None] == taken_by[background]) & (taken_by[:, None] != NOT_NAMED)
    evidence = {}
    for split, views in queries.items():
        of_views = (background_similarities if split == "val" else nearest_similarities)(views, photographs)
        evidence[split] = gather_evidence(
            recognition.answers[split],
            recognition.matches[split],
            ground_truth.labels["database"],
            recognition.most_similar[split],
            None if recognition.checked is None else recognition.checked[split],
            spread(of_views, is_valid[split], 0),
            is_same if split == "val" else None,
        )
    groups = np.where(target == DISTRACTOR, copies, len(target) + target)  # copies of one photo, or of one exhibit
    groups = np.where(taken_by == NOT_NAMED, groups, -1 - len(target) - taken_by)
    fit = fit_calibration(recognition.answers["val"], evidence["val"], target, groups, background)
    if fit is None or not fit.gains:
        return recognition, fit
    answers = {split: fit.calibration.apply(of, evidence[split]) for split, of in recognition.answers.items()}
    return replace(recognition, answers=answers, calibration=fit.calibration), fit


def background_of(descriptors: "Descriptors", ground_truth: GroundTruth, whitening: PCAWhitening | None) -> np.ndarray:
    """Val's distractors as they are compared, ``(C, D)``; none if they are too few to tell anything."""
    is_distractor = (ground_truth.labels["val"] == DISTRACTOR)[descriptors.is_valid["val"]]
    photographs = query_views(descriptors, "val", MethodOptions(), whitening)[is_distractor, 0]
    return photographs if len(photographs) >= LEAST_BACKGROUND else photographs[:0]


def nearest_similarities(views: np.ndarray, photographs: np.ndarray) -> np.ndarray:
    """Similarities of queries to the nearest photographs, as many as count where none is left out: ``(Q, 20)``."""
    places = np.arange(len(photographs))
    n = min(COUNTED[-1], len(photographs))
    return Searchable(photographs, places, places).nearest(views, n).similarities if n else np.empty((len(views), 0))


def gather_evidence(
    answers: Predictions,
    matches: Matches,
    database_labels: np.ndarray,
    most_similar: np.ndarray,
    checked: Checked | None,
    background: np.ndarray,
    is_same: np.ndarray | None = None,
) -> Evidence:
    """Put together what is known of answers; see ``Evidence`` and ``evidence_of_search`` for the arrays."""
    parts = [evidence_of_search(answers, matches, database_labels[matches.rows], most_similar)]
    if checked is not None:
        parts += [np.log1p(count(answers, checked))[:, None] for count in (inliers_of_answers, inlier_lead)]
    names = feature_names(checked is not None, background.shape[1])
    is_same = np.zeros(background.shape, dtype=bool) if is_same is None else is_same
    return Evidence(names, np.concatenate(parts, axis=1), background, is_same)
