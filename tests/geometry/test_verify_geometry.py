"""Verification: a known transform is found among outliers, and nothing where there is nothing."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from metilr.geometry.verify import (
    COLOUR,
    GAP,
    SIDE,
    LocalFeatures,
    Verification,
    is_plausible,
    matching_picture,
    mutual_nearest,
    verify,
)

TOLERANCE = 4.0
# A turn by 20 degrees, half the size, and a view from the side.
HOMOGRAPHY = np.array([[0.47, -0.17, 120.0], [0.17, 0.47, 30.0], [4e-4, 2e-4, 1.0]])


def unit_rows(rng: np.random.Generator, n: int, width: int = 32) -> np.ndarray:
    rows = rng.normal(size=(n, width))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def random_features(rng: np.random.Generator, n: int) -> LocalFeatures:
    return LocalFeatures(rng.uniform(0, 480, (n, 2)).astype(np.float32), unit_rows(rng, n))


def moved_by_hand(transform: np.ndarray, position: np.ndarray) -> tuple[float, float]:
    (a, b, c), (d, e, f), (g, h, i) = transform.tolist()
    x, y = position.tolist()
    return (a * x + b * y + c) / (g * x + h * y + i), (d * x + e * y + f) / (g * x + h * y + i)


def seen_again(
    rng: np.random.Generator, first: LocalFeatures, transform: np.ndarray, n_outliers: int, noise: float = 1.0
) -> LocalFeatures:
    """The same features where the transform puts them, the first ``n_outliers`` of them anywhere."""
    positions = np.array([moved_by_hand(transform, position) for position in first.positions])
    positions += rng.normal(0, noise, positions.shape)
    positions[:n_outliers] = rng.uniform(0, 480, (n_outliers, 2))
    return LocalFeatures(positions.astype(np.float32), first.descriptors)


@pytest.mark.parametrize("seed", range(5))
def test_a_known_homography_is_recovered_among_60_percent_outliers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first = random_features(rng, 300)
    second = seen_again(rng, first, HOMOGRAPHY, n_outliers=180)
    found = verify(first, second, TOLERANCE)
    assert found.transform is not None
    corners = np.array([[0, 0], [480, 0], [480, 480], [0, 480], [240, 240]], dtype=float)
    for corner in corners:
        expected = moved_by_hand(HOMOGRAPHY, corner)
        assert math.dist(moved_by_hand(found.transform, corner), expected) < TOLERANCE
    verify(second, random_features(rng, 300), TOLERANCE)  # a call in between draws nothing from a common source
    np.testing.assert_array_equal(verify(first, second, TOLERANCE).transform, found.transform)
    assert found.n_inliers == len(found.matches) >= 0.95 * 120
    assert (found.matches[:, 0] == found.matches[:, 1]).all()  # row i was moved to row i
    assert (found.matches[:, 0] < 180).sum() <= 3  # outliers that fell near their place
    for i, j in found.matches.tolist():
        assert math.dist(moved_by_hand(found.transform, first.positions[i]), second.positions[j]) <= TOLERANCE + 1e-3


@pytest.mark.parametrize("seed", range(5))
def test_unrelated_images_have_almost_nothing_in_common(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = random_features(rng, 600), random_features(rng, 600)
    assert len(mutual_nearest(first.descriptors, second.descriptors)) > 100
    assert verify(first, second, TOLERANCE).n_inliers <= 8


@pytest.mark.parametrize(
    "transform",
    [
        np.diag([-1.0, 1.0, 1.0]),  # mirrored
        np.diag([0.1, 0.1, 1.0]),  # ten times smaller
        np.diag([10.0, 10.0, 1.0]),
        np.diag([1.0, 0.25, 1.0]),  # squeezed to a quarter in one direction
        np.array([[1.0, 2.0, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]]),  # onto a line
    ],
)
def test_transforms_that_no_view_makes_are_refused(transform: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    first = random_features(rng, 100)
    found = verify(first, seen_again(rng, first, transform, n_outliers=0, noise=0.1), TOLERANCE)
    assert found.n_inliers == 0 and found.transform is None
    assert not is_plausible(transform, first.positions)


@pytest.mark.parametrize("places", [[[7, 7]], [[0, 0], [90, 0], [0, 90], [90, 90]], [[7, i] for i in range(3)]])
def test_features_at_few_places_have_nothing_in_common(places: list[list[int]]) -> None:
    rng = np.random.default_rng(0)
    first = random_features(rng, 60)
    together = LocalFeatures(np.resize(np.float32(places), (60, 2)), first.descriptors)
    for pair in ((first, together), (together, first), (together, together)):
        assert verify(*pair, TOLERANCE).n_inliers == 0


@pytest.mark.parametrize(("n", "m"), [(40, 30), (300, 20), (20, 300), (257, 1)])
def test_mutual_nearest_is_its_definition(n: int, m: int) -> None:
    rng = np.random.default_rng(0)
    first, second = unit_rows(rng, n, 4), unit_rows(rng, m, 4)
    expected = []
    for i, descriptor in enumerate(first):
        j = max(range(m), key=lambda other: float(descriptor @ second[other]))
        back = max(range(n), key=lambda other: float(second[j] @ first[other]))
        if back == i and descriptor @ second[j] > 0:
            expected.append([i, j])
    np.testing.assert_array_equal(mutual_nearest(first, second), expected)
    assert mutual_nearest(np.zeros((3, 4), np.float32), np.zeros((2, 4), np.float32)).shape == (0, 2)


def test_of_equally_near_features_the_first_are_matched() -> None:
    a, b = np.eye(2, dtype=np.float32)
    first = np.stack([a, a, b] * 100)  # of which some are far from the first ones
    assert mutual_nearest(first, np.stack([a, b, b])).tolist() == [[0, 0], [2, 1]]


def test_the_region_is_outlined_in_both_images():
    """Four corners in a photo of 520 px, which is shown at half its size, and the same moved in an image of 260 px."""
    corners = np.array([[100, 100], [300, 100], [300, 300], [100, 300]], dtype=np.float32)
    first = LocalFeatures(corners, np.eye(4, dtype=np.float32))
    second = LocalFeatures(corners / 2 + 20, np.eye(4, dtype=np.float32))
    transform = np.array([[0.5, 0, 20], [0, 0.5, 20], [0, 0, 1.0]])
    verified = Verification(np.stack([np.arange(4)] * 2, axis=1), transform)
    grey = [torch.full((3, side, side), 90, dtype=torch.uint8) for side in (2 * SIDE, SIDE)]
    with Image.open(io.BytesIO(matching_picture(*grey, first, second, verified))) as picture:
        assert picture.size == (2 * SIDE + GAP, SIDE)
        pixels = np.array(picture).astype(int)
    for edge in ((100, 50), (50, 100), (100 + 20, 50 + 20 + SIDE + GAP), (50 + 20, 100 + 20 + SIDE + GAP)):  # y, x
        assert np.abs(pixels[edge] - COLOUR).max() < 60
    assert np.abs(pixels[10, 10] - 90).max() < 10 and np.abs(pixels[200, SIDE + GAP + 240] - 90).max() < 10
