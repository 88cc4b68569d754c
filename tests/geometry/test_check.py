"""The geometric check: inliers of drawn museums by a plain loop."""

from pathlib import Path

import numpy as np
import pytest
import torch

from metilr.data.decode import load_image
from metilr.data.ground_truth import GroundTruth, load_ground_truth
from metilr.demo import MuseumSize, make_demo
from metilr.errors import UserError
from metilr.geometry.check import GeometricCheck, count_inliers, geometric_check_of
from metilr.geometry.features import LocalFeatureExtractor
from metilr.geometry.verify import LocalFeatures, verify
from metilr.models.backbone import build_backbone
from metilr.models.embedder import Embedder
from metilr.models.pooling import build_pooling
from metilr.retrieval.knn import NO_ROW

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
    return LocalFeatureExtractor(Embedder(backbone, build_pooling("gem")).eval())


def files(museum: GroundTruth, split: str) -> list[Path]:
    return [museum.image(path) for path in museum.paths[split]]


def everything(museum: GroundTruth, split: str) -> np.ndarray:
    """All database rows as candidates of each query."""
    return np.tile(np.arange(len(museum.paths["database"])), (len(museum.paths[split]), 1))


def check_at(folder: Path, extractor: LocalFeatureExtractor) -> GeometricCheck:
    return geometric_check_of(extractor.embedder, None, 5, False, folder=folder)


def test_counts_are_those_of_a_plain_loop(museum, extractor, tmp_path) -> None:
    queries, database = files(museum, "val"), files(museum, "database")
    inliers = count_inliers(check_at(tmp_path, extractor), queries, everything(museum, "val"), database)

    seen = [extractor.extract(load_image(file)) for file in database]
    for i in (0, 3, len(queries) - 1):
        asked = extractor.extract(load_image(queries[i]))
        assert inliers[i].tolist() == [verify(asked, other, extractor.tolerance).n_inliers for other in seen]


def test_the_right_exhibit_has_most_inliers(museum, extractor, tmp_path) -> None:
    if extractor.embedder.backbone.name != "lite0_in":
        pytest.skip("needs metilr[demo]: random weights recognise nothing")
    candidates = everything(museum, "val")
    inliers = count_inliers(check_at(tmp_path, extractor), files(museum, "val"), candidates, files(museum, "database"))
    labels = museum.labels["database"][candidates]
    is_met = museum.labels["val"] >= 0
    geometric = np.take_along_axis(labels, inliers.argmax(axis=1)[:, None], axis=1)[:, 0]
    assert (geometric == museum.labels["val"])[is_met].mean() >= 0.6


def test_counts_do_not_depend_on_order_company_or_cache(museum, extractor, tmp_path) -> None:
    queries, database = files(museum, "val")[:4], files(museum, "database")
    candidates = everything(museum, "val")[:4, :5]
    counts = count_inliers(check_at(tmp_path / "a", extractor), queries, candidates, database)
    cached = count_inliers(check_at(tmp_path / "a", extractor), queries, candidates, database)
    np.testing.assert_array_equal(cached, counts)
    backwards = count_inliers(check_at(tmp_path / "b", extractor), queries[::-1], candidates[::-1, ::-1], database)
    np.testing.assert_array_equal(backwards[::-1, ::-1], counts)
    alone = count_inliers(check_at(tmp_path / "c", extractor), queries[2:3], candidates[2:3, 1:2], database)
    assert alone[0, 0] == counts[2, 1]


def test_a_second_check_extracts_nothing(museum, extractor, tmp_path, monkeypatch) -> None:
    arguments = (files(museum, "val")[:2], everything(museum, "val")[:2, :2], files(museum, "database"))
    counts = count_inliers(check_at(tmp_path, extractor), *arguments)

    def refuse(self, image: torch.Tensor) -> LocalFeatures:
        raise AssertionError("extracted again")

    monkeypatch.setattr(LocalFeatureExtractor, "extract", refuse)
    np.testing.assert_array_equal(count_inliers(check_at(tmp_path, extractor), *arguments), counts)


def test_no_candidate_and_bad_images_have_no_inliers(museum, extractor, tmp_path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no image")
    database = [files(museum, "database")[0], bad, tmp_path / "missing.jpg"]
    queries = [database[0], bad, tmp_path / "missing.jpg"]
    candidates = np.array([[0, 1, 2, NO_ROW]] * 3)
    inliers = count_inliers(check_at(tmp_path / "cache", extractor), queries, candidates, database)
    assert inliers[0, 0] > 50  # an image and itself
    assert inliers.sum() == inliers[0, 0]
