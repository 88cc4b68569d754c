"""Geometric verification: do the local features of two images lie as if one surface was seen twice?

Descriptors propose matches, a robust fit says how many of them agree about one transform.
"""

import io
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

MIN_INLIERS = 5  # an affine map goes through any three matches: two more must agree
MAX_SCALE = 6.0  # a catalogue image of 500 px against an exhibit 80 px wide
MAX_STRETCH = 3.0  # beyond a plane seen at about 70 degrees
NEAR = 3.0  # tolerances: how far a steep view may bend what one affine map explains
RANSAC: dict[str, Any] = {"method": cv2.RANSAC, "maxIters": 2000, "confidence": 0.999}  # finds a share of 15 % inliers
BLOCK = 128  # features whose similarities are made at a time: they stay in the processor's cache

SIDE = 260  # px of each of the two in a picture
GAP = 6  # px between them
LINES = 30  # matches drawn: more hide the images
COLOUR = (255, 190, 0)


class LocalFeatures(NamedTuple):
    """Where one image has local features, and what each looks like."""

    positions: np.ndarray  # x and y in px, float32 (n, 2); 0 is the image's left or upper edge
    descriptors: np.ndarray  # float32 (n, C), unit length


@dataclass(frozen=True, eq=False)
class Verification:
    """What two images have in common."""

    matches: np.ndarray  # features of the first and the second image that agree with the transform, int64 (m, 2)
    transform: np.ndarray | None  # homography to the second image, float64 (3, 3); None where none is plausible

    @property
    def n_inliers(self) -> int:
        """Number of matches that agree."""
        return len(self.matches)


NOTHING_IN_COMMON = Verification(np.empty((0, 2), dtype=np.int64), None)


def mutual_nearest(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Match unit-length descriptors, ``(n, C)`` and ``(m, C)``, that are each other's nearest: int64 ``(matches, 2)``.

    Of equally near ones the one of smaller index counts; an inner product of 0 or less is no match.
    """
    if not len(first) or not len(second):
        return NOTHING_IN_COMMON.matches
    rows, columns = np.empty(len(first), np.float32), np.full(len(second), -np.inf, np.float32)  # each one's largest
    nearest = np.empty(len(first), np.int64)
    for block in np.split(np.arange(len(first)), range(BLOCK, len(first), BLOCK)):
        # By PyTorch, which takes no more threads than the caller allows; NumPy's BLAS takes all cores in each thread.
        similarity = (torch.from_numpy(first[block]) @ torch.from_numpy(second).T).numpy()  # block x m
        nearest[block] = similarity.argmax(axis=1)
        rows[block] = np.take_along_axis(similarity, nearest[block, None], axis=1)[:, 0]
        np.maximum(columns, similarity.max(axis=0), out=columns)
    i = np.flatnonzero((rows == columns[nearest]) & (rows > 0))
    _, first_of_equals = np.unique(nearest[i], return_index=True)
    i = np.sort(i[first_of_equals])
    return np.stack([i, nearest[i]], axis=1)


def verify(first: LocalFeatures, second: LocalFeatures, tolerance: float) -> Verification:
    """Find the homography that explains most of the mutual nearest neighbours, and keep those.

    A match agrees if the transform puts the first position within ``tolerance``, in px of the second image, of the
    second one. RANSAC, with OpenCV's fixed seed, fits an affine map first: chance agrees less often with three matches
    than with four. A homography is then fitted to the matches near that map, and taken if more agree with it. Nothing
    is found if those lie in fewer than ``MIN_INLIERS`` squares of the tolerance's size in either image, or the
    transform is not plausible.

    Source: Fischler and Bolles, Random Sample Consensus, 1981; to check retrieved images: Philbin et al., Object
    Retrieval with Large Vocabularies and Fast Spatial Matching, CVPR 2007.
    """
    matches = mutual_nearest(first.descriptors, second.descriptors)
    if len(matches) < MIN_INLIERS:
        return NOTHING_IN_COMMON
    here, there = first.positions[matches[:, 0]], second.positions[matches[:, 1]]
    affine, _ = cv2.estimateAffine2D(here, there, ransacReprojThreshold=tolerance, **RANSAC)
    if affine is None:
        return NOTHING_IN_COMMON
    transform = np.vstack([affine, [0.0, 0.0, 1.0]])
    errors = _errors(transform, here, there)
    agrees, near = errors <= tolerance, errors <= NEAR * tolerance
    if near.sum() >= MIN_INLIERS:
        refined, _ = cv2.findHomography(here[near], there[near], ransacReprojThreshold=tolerance, **RANSAC)
        if refined is not None and refined.any():
            agrees_refined = _errors(refined, here, there) <= tolerance
            if agrees_refined.sum() > agrees.sum() and is_plausible(refined, here[agrees_refined]):
                transform, agrees = refined, agrees_refined
    # Features of several scales lie together: places count, not features.
    n_places = min(len({*map(tuple, np.floor(of[agrees] / tolerance).tolist())}) for of in (here, there))
    if n_places < MIN_INLIERS or not is_plausible(transform, here[agrees]):
        return NOTHING_IN_COMMON
    return Verification(matches[agrees], transform)


def apply_transform(transform: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Take positions ``(n, 2)`` where a homography ``(3, 3)`` puts them, float64 ``(n, 2)``."""
    homogeneous = np.concatenate([positions, np.ones((len(positions), 1))], axis=1) @ transform.T
    return homogeneous[:, :2] / homogeneous[:, 2:]


def matching_picture(
    photo: Tensor, image: Tensor, first: LocalFeatures, second: LocalFeatures, verified: Verification
) -> bytes:
    """Draw two images, uint8 ``(3, H, W)``, with the matches' convex hull and lines between matches; a JPEG.

    ``first`` are the photo's features, ``second`` the image's; some match.
    """
    assert verified.transform is not None
    (left, left_zoom), (right, right_zoom) = _thumbnail(photo), _thumbnail(image)
    offset = np.array([left.width + GAP, 0])
    canvas = Image.new("RGB", (left.width + GAP + right.width, max(left.height, right.height)), "white")
    canvas.paste(left, (0, 0))
    canvas.paste(right, (int(offset[0]), 0))
    draw = ImageDraw.Draw(canvas)
    for place in np.linspace(0, verified.n_inliers - 1, min(LINES, verified.n_inliers)).astype(int):
        i, j = verified.matches[place]
        ends = [first.positions[i] * left_zoom, second.positions[j] * right_zoom + offset]
        draw.line([tuple(end.tolist()) for end in ends], fill=COLOUR, width=1)
    hull = cv2.convexHull(first.positions[verified.matches[:, 0]])[:, 0].astype(np.float64)
    for outline in (hull * left_zoom, apply_transform(verified.transform, hull) * right_zoom + offset):
        draw.line([tuple(corner) for corner in [*outline.tolist(), outline[0].tolist()]], fill=COLOUR, width=3)
    stream = io.BytesIO()
    canvas.save(stream, "JPEG", quality=80, optimize=True)
    return stream.getvalue()


def _thumbnail(image: Tensor) -> tuple[Image.Image, float]:  # and its size relative to the image
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    zoom = min(1.0, SIDE / max(picture.size))
    return picture.resize((max(1, round(picture.width * zoom)), max(1, round(picture.height * zoom)))), zoom


def is_plausible(transform: np.ndarray, positions: np.ndarray) -> bool:
    """Say whether a homography can be that of a surface seen twice, near positions ``(n, 2)`` in the first image.

    There it may neither mirror, pass the horizon, scale any direction by more than ``MAX_SCALE`` or less than its
    inverse, nor stretch one ``MAX_STRETCH`` times as much as another.
    """
    depth = positions @ transform[2, :2] + transform[2, 2]
    if not np.isfinite(transform).all() or (depth * depth[0] <= 0).any():
        return False
    moved = apply_transform(transform, positions)
    # Derivative of the homography at each position, n x 2 x 2.
    linear = (transform[:2, :2] - moved[:, :, None] * transform[2, :2]) / depth[:, None, None]
    largest, smallest = np.linalg.svd(linear, compute_uv=False).T
    within = (largest <= MAX_SCALE) & (smallest >= 1 / MAX_SCALE) & (largest <= MAX_STRETCH * smallest)
    return bool((within & (np.linalg.det(linear) > 0)).all())


def _errors(transform: np.ndarray, here: np.ndarray, there: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):  # a position on the horizon agrees with nothing
        return np.linalg.norm(apply_transform(transform, here) - there, axis=1)
