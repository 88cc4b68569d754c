"""The geometric check: inliers of drawn museums by a plain loop, and gates that never lower GAP on val."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from metilr.data.demo import MuseumSize, make_demo
from metilr.data.ground_truth import GroundTruth, load_ground_truth
from metilr.data.transforms import load_image
from metilr.errors import UserError
from metilr.feature_cache import FeatureCache
from metilr.geometric_check import (
    ENOUGH_GRID,
    OFF,
    WEIGHT_GRID,
    Gate,
    check_settings,
    count_inliers,
    inliers_of_answers,
    reorder,
    tune_gate,
)
from metilr.geometry import LocalFeatures, verify
from metilr.knn import NO_LABEL, NO_ROW
from metilr.metrics.functional import gap
from metilr.models.backbones import build_backbone
from metilr.models.embedder import Embedder
from metilr.models.local_features import LocalFeatureExtractor
from metilr.models.pooling import build_pooling

SIZE = MuseumSize(exhibits=6, mini_exhibits=5, val=(6, 2, 1), test=(2, 1, 1), longest_side=200)


@pytest.fixture(scope="module")
def museum(tmp_path_factory) -> GroundTruth:
    return load_ground_truth(make_demo(tmp_path_factory.mktemp("check") / "museum", size=SIZE, progress=False))


@pytest.fixture(scope="module")
def extractor() -> LocalFeatureExtractor:
    try:
        backbone = build_backbone("lite0_in")
    except UserError:  # its package is not installed
        backbone = build_backbone("r18_in", "random")
    return LocalFeatureExtractor(Embedder(backbone, build_pooling("gem", backbone.width)).eval())


def files(museum: GroundTruth, split: str) -> list[Path]:
    return [museum.image(path) for path in museum.paths[split]]


def everything(museum: GroundTruth, split: str) -> np.ndarray:
    """All database rows as candidates of each query."""
    return np.tile(np.arange(len(museum.paths["database"])), (len(museum.paths[split]), 1))


def cache_at(folder: Path, extractor: LocalFeatureExtractor) -> FeatureCache:
    return FeatureCache(folder, check_settings(extractor, None))


def test_counts_are_those_of_a_plain_loop(museum, extractor, tmp_path) -> None:
    queries, database = files(museum, "val"), files(museum, "database")
    inliers = count_inliers(extractor, cache_at(tmp_path, extractor), queries, everything(museum, "val"), database)

    seen = [extractor.extract(load_image(file)) for file in database]
    for i in (0, 3, len(queries) - 1):
        asked = extractor.extract(load_image(queries[i]))
        assert inliers[i].tolist() == [verify(asked, other, extractor.tolerance).n_inliers for other in seen]


def test_the_right_exhibit_has_most_inliers(museum, extractor, tmp_path) -> None:
    if extractor.embedder.backbone.name != "lite0_in":
        pytest.skip("random weights recognise nothing")
    candidates = everything(museum, "val")
    inliers = count_inliers(
        extractor, cache_at(tmp_path, extractor), files(museum, "val"), candidates, files(museum, "database")
    )
    labels = museum.labels["database"][candidates]
    is_met = museum.labels["val"] >= 0
    geometric = reorder(np.full(len(labels), NO_LABEL), labels, inliers)
    assert (geometric == museum.labels["val"])[is_met].mean() >= 0.6


def test_counts_do_not_depend_on_order_company_or_cache(museum, extractor, tmp_path) -> None:
    queries, database = files(museum, "val")[:4], files(museum, "database")
    candidates = everything(museum, "val")[:4, :5]
    counts = count_inliers(extractor, cache_at(tmp_path / "a", extractor), queries, candidates, database)
    cached = count_inliers(extractor, cache_at(tmp_path / "a", extractor), queries, candidates, database)
    np.testing.assert_array_equal(cached, counts)
    backwards = count_inliers(
        extractor, cache_at(tmp_path / "b", extractor), queries[::-1], candidates[::-1, ::-1], database
    )
    np.testing.assert_array_equal(backwards[::-1, ::-1], counts)
    alone = count_inliers(extractor, cache_at(tmp_path / "c", extractor), queries[2:3], candidates[2:3, 1:2], database)
    assert alone[0, 0] == counts[2, 1]


def test_a_second_check_extracts_nothing(museum, extractor, tmp_path, monkeypatch) -> None:
    arguments = (files(museum, "val")[:2], everything(museum, "val")[:2, :2], files(museum, "database"))
    counts = count_inliers(extractor, cache_at(tmp_path, extractor), *arguments)

    def refuse(self, image: torch.Tensor) -> LocalFeatures:
        raise AssertionError("extracted again")

    monkeypatch.setattr(LocalFeatureExtractor, "extract", refuse)
    np.testing.assert_array_equal(count_inliers(extractor, cache_at(tmp_path, extractor), *arguments), counts)


def test_no_candidate_and_bad_images_have_no_inliers(museum, extractor, tmp_path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no image")
    database = [files(museum, "database")[0], bad, tmp_path / "missing.jpg"]
    queries = [database[0], bad, tmp_path / "missing.jpg"]
    candidates = np.array([[0, 1, 2, NO_ROW]] * 3)
    inliers = count_inliers(extractor, cache_at(tmp_path / "cache", extractor), queries, candidates, database)
    assert inliers[0, 0] > 50  # an image and itself
    assert inliers.sum() == inliers[0, 0]


def test_the_gate_is_its_formula() -> None:
    log_confidence, inliers = np.array([-0.1, -2.0, 0.0, -np.inf]), np.array([0, 5, 200, 7])
    gated = Gate(weight=2.0, enough=30.0).apply(log_confidence, inliers)
    for before, n, after in zip(log_confidence.tolist(), inliers.tolist(), gated.tolist(), strict=True):
        assert math.exp(after) == pytest.approx(math.exp(before) * ((1 + n) / (1 + n + 30)) ** 2)
        assert after <= before
    np.testing.assert_array_equal(OFF.apply(log_confidence, inliers), log_confidence)


def random_answers(seed: int, informative: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Log-confidence, predicted, target and inliers of 60 queries, a third of them distractors."""
    rng = np.random.default_rng(seed)
    target = rng.integers(0, 5, 60)
    target[40:] = -1
    predicted = np.where(rng.random(60) < 0.6, np.maximum(target, 0), rng.integers(0, 5, 60))
    right = predicted == target
    inliers = np.where(right & informative, rng.integers(30, 300, 60), rng.integers(0, 15, 60))
    return -rng.exponential(1, 60), predicted, target, inliers


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("informative", [True, False])
def test_a_gate_never_lowers_gap_on_val_and_is_the_best_of_the_grid(seed: int, informative: bool) -> None:
    log_confidence, predicted, target, inliers = random_answers(seed, informative)
    gate = tune_gate(log_confidence, predicted, target, inliers)
    reached = gap(gate.apply(log_confidence, inliers), predicted, target)
    assert reached >= gap(log_confidence, predicted, target)
    surface = {
        (weight, enough): gap(Gate(weight, enough).apply(log_confidence, inliers), predicted, target)
        for weight in WEIGHT_GRID
        for enough in ENOUGH_GRID
    }
    assert reached == max(surface.values())
    if gate != OFF:
        assert (gate.weight, gate.enough) == min(point for point, value in surface.items() if value == reached)
        assert reached > gap(log_confidence, predicted, target)


def test_evidence_that_tells_right_from_wrong_is_used_and_other_is_not() -> None:
    log_confidence, predicted, target, inliers = random_answers(0, informative=True)
    gate = tune_gate(log_confidence, predicted, target, inliers)
    assert gap(gate.apply(log_confidence, inliers), predicted, target) > gap(log_confidence, predicted, target) + 0.1
    assert tune_gate(log_confidence, predicted, target, np.full(60, 20)) == OFF
    assert tune_gate(np.where(predicted == target, -1.0, -2.0), predicted, target, inliers) == OFF  # is best already


def test_inliers_of_an_answer_are_the_most_of_its_class() -> None:
    labels = np.array([[3, 1, 3], [2, NO_LABEL, NO_LABEL], [NO_LABEL, NO_LABEL, NO_LABEL]])
    inliers = np.array([[4, 90, 7], [8, 0, 0], [0, 0, 0]])
    assert inliers_of_answers(np.array([3, 5, NO_LABEL]), labels, inliers).tolist() == [7, 0, 0]
    assert inliers_of_answers(np.array([3]), np.empty((1, 0), int), np.empty((1, 0), int)).tolist() == [0]


def test_reordering_answers_by_most_inliers_and_keeps_the_answer_in_a_tie() -> None:
    labels = np.array([[3, 1, 2], [3, 1, 2], [3, 1, 2], [3, NO_LABEL, NO_LABEL]])
    inliers = np.array([[4, 90, 7], [0, 0, 0], [9, 9, 0], [0, 0, 0]])
    assert reorder(np.array([3, 3, 1, 5]), labels, inliers).tolist() == [1, 3, 1, 5]
    assert reorder(np.array([3]), np.empty((1, 0), int), np.empty((1, 0), int)).tolist() == [3]
