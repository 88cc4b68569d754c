"""Geometric verification: do the local features of two images lie as if one surface was seen twice?

Descriptors propose matches, a robust fit says how many of them agree about one transform.
"""

import io
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

MIN_INLIERS = 5  # an affine map goes through any three matches: two more must agree
MAX_SCALE = 6.0  # a catalogue image of 500 px against an exhibit 80 px wide
MAX_STRETCH = 3.0  # beyond a plane seen at about 70 degrees
NEAR = 3.0  # tolerances: how far a steep view may bend what one affine map explains
ITERATIONS = 2000  # find a share of 15 % inliers with 99.9 % certainty
CERTAINTY = 0.999  # stop earlier at this

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
    """What two images have in common.

    Attributes:
        matches: Features of the first and the second image that agree with the transform, int64 ``(m, 2)``.
        transform: Homography from the first image to the second, on positions ``(x, y, 1)``, float64 ``(3, 3)``; None
            where no plausible one was found, so ``matches`` is empty.
    """

    matches: np.ndarray
    transform: np.ndarray | None

    @property
    def n_inliers(self) -> int:
        """Number of matches that agree."""
        return len(self.matches)


NOTHING_IN_COMMON = Verification(np.empty((0, 2), dtype=np.int64), None)


def mutual_nearest(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Match unit-length descriptors, ``(n, C)`` and ``(m, C)``, that are each other's nearest.

    Of equally near ones the one of smaller index counts. Descriptors that point away from each other (inner product of
    0 or less) do not match, so a zero vector never does.

    Returns:
        Index into ``first`` and into ``second``, int64 ``(matches, 2)``, ascending.
    """
    if not len(first) or not len(second):
        return np.empty((0, 2), dtype=np.int64)
    similarity = first @ second.T  # n x m
    i = np.arange(len(first))
    j = similarity.argmax(axis=1)
    mutual = (similarity.argmax(axis=0)[j] == i) & (similarity[i, j] > 0)
    return np.stack([i, j], axis=1)[mutual]


def verify(first: LocalFeatures, second: LocalFeatures, tolerance: float) -> Verification:
    """Find the homography that explains most of the mutual nearest neighbours, and keep those.

    A match agrees if the transform puts the first position within ``tolerance`` of the second one. RANSAC fits an
    affine map first: it needs three matches where a homography needs four, so chance agrees with it less often.
    A homography is then fitted to the matches near that map, and taken if more agree with it. Nothing is found if
    those that agree lie in fewer than ``MIN_INLIERS`` squares of the tolerance's size, in either image, or the
    transform is not one of a surface seen twice, see ``is_plausible``.

    OpenCV's RANSAC starts from a fixed seed at each call, so equal features give equal results. The tolerance is in px
    of the second image, about what a feature's position is uncertain by.

    Source: Fischler and Bolles, Random Sample Consensus, 1981; as a check of retrieved images: Philbin et al.,
    Object Retrieval with Large Vocabularies and Fast Spatial Matching, CVPR 2007, whose hypotheses come from
    single matches with a shape, which positions of a map have not.
    """
    matches = mutual_nearest(first.descriptors, second.descriptors)
    if len(matches) < MIN_INLIERS:
        return NOTHING_IN_COMMON
    here, there = first.positions[matches[:, 0]], second.positions[matches[:, 1]]
    transform = _fit_affine(here, there, tolerance)
    if transform is None:
        return NOTHING_IN_COMMON
    errors = _errors(transform, here, there)
    agrees, near = errors <= tolerance, errors <= NEAR * tolerance
    refined = _fit_homography(here[near], there[near], tolerance)
    if refined is not None:
        agrees_refined = _errors(refined, here, there) <= tolerance
        if agrees_refined.sum() > agrees.sum() and is_plausible(refined, here[agrees_refined]):
            transform, agrees = refined, agrees_refined
    n_places = min(_count_places(here[agrees], tolerance), _count_places(there[agrees], tolerance))
    if n_places < MIN_INLIERS or not is_plausible(transform, here[agrees]):
        return NOTHING_IN_COMMON
    return Verification(matches[agrees], transform)


def apply_transform(transform: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Take positions ``(n, 2)`` where a homography ``(3, 3)`` puts them, float64 ``(n, 2)``."""
    homogeneous = np.concatenate([positions, np.ones((len(positions), 1))], axis=1) @ transform.T
    return homogeneous[:, :2] / homogeneous[:, 2:]


def matching_regions(first: LocalFeatures, verified: Verification) -> tuple[np.ndarray, np.ndarray]:
    """Outline what two images have in common: the convex hull of the matches.

    Returns:
        Corners in px of the first image, ``(k, 2)``, and where the transform puts them in the second; k is 0 where
        nothing agrees.
    """
    if verified.transform is None:
        return np.empty((0, 2)), np.empty((0, 2))
    hull = cv2.convexHull(first.positions[verified.matches[:, 0]])[:, 0].astype(np.float64)
    return hull, apply_transform(verified.transform, hull)


def matching_picture(
    photo: Tensor, image: Tensor, first: LocalFeatures, second: LocalFeatures, verified: Verification
) -> bytes:
    """Draw two images, uint8 ``(3, H, W)``, with the outline of the matching region and lines between matches; a JPEG.

    ``first`` are the photo's features, ``second`` the image's.
    """
    left, left_zoom = _thumbnail(photo)
    right, right_zoom = _thumbnail(image)
    offset = np.array([left.width + GAP, 0])
    canvas = Image.new("RGB", (left.width + GAP + right.width, max(left.height, right.height)), "white")
    canvas.paste(left, (0, 0))
    canvas.paste(right, (int(offset[0]), 0))
    draw = ImageDraw.Draw(canvas)
    for place in np.linspace(0, verified.n_inliers - 1, min(LINES, verified.n_inliers)).astype(int):
        i, j = verified.matches[place]
        ends = [first.positions[i] * left_zoom, second.positions[j] * right_zoom + offset]
        draw.line([tuple(end.tolist()) for end in ends], fill=COLOUR, width=1)
    here, there = matching_regions(first, verified)
    for outline in (here * left_zoom, there * right_zoom + offset):
        if len(outline):
            draw.line([tuple(corner) for corner in [*outline.tolist(), outline[0].tolist()]], fill=COLOUR, width=3)
    stream = io.BytesIO()
    canvas.save(stream, "JPEG", quality=80, optimize=True)
    return stream.getvalue()


def _thumbnail(image: Tensor) -> tuple[Image.Image, float]:
    """A small picture and its size relative to the image."""
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    zoom = min(1.0, SIDE / max(picture.size))
    return picture.resize((max(1, round(picture.width * zoom)), max(1, round(picture.height * zoom)))), zoom


def is_plausible(transform: np.ndarray, positions: np.ndarray) -> bool:
    """Say whether a homography can be that of a surface seen twice, near positions ``(n, 2)`` in the first image.

    There it must neither mirror nor pass the horizon, nor scale any direction by more than ``MAX_SCALE`` or less than
    its inverse, nor one direction ``MAX_STRETCH`` times as much as another.
    """
    depth = positions @ transform[2, :2] + transform[2, 2]
    if not np.isfinite(transform).all() or (depth * depth[0] <= 0).any():
        return False
    moved = apply_transform(transform, positions)
    # Derivative of the homography at each position, n x 2 x 2.
    linear = (transform[:2, :2] - moved[:, :, None] * transform[2, :2]) / depth[:, None, None]
    largest, smallest = np.linalg.svd(linear, compute_uv=False).T
    return bool(
        (np.linalg.det(linear) > 0).all()
        and (largest <= MAX_SCALE).all()
        and (smallest >= 1 / MAX_SCALE).all()
        and (largest <= MAX_STRETCH * smallest).all()
    )


def _fit_affine(here: np.ndarray, there: np.ndarray, tolerance: float) -> np.ndarray | None:
    affine, _ = cv2.estimateAffine2D(
        here, there, method=cv2.RANSAC, ransacReprojThreshold=tolerance, maxIters=ITERATIONS, confidence=CERTAINTY
    )
    return None if affine is None else np.vstack([affine, [0.0, 0.0, 1.0]])


def _fit_homography(here: np.ndarray, there: np.ndarray, tolerance: float) -> np.ndarray | None:
    if len(here) < MIN_INLIERS:
        return None
    homography, _ = cv2.findHomography(here, there, cv2.RANSAC, tolerance, maxIters=ITERATIONS, confidence=CERTAINTY)
    return None if homography is None or not homography.any() else homography


def _count_places(positions: np.ndarray, tolerance: float) -> int:
    """Count the squares with sides of ``tolerance`` that hold positions: features of several scales lie together."""
    return len(np.unique(np.floor(positions / tolerance), axis=0))


def _errors(transform: np.ndarray, here: np.ndarray, there: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):  # a position on the horizon agrees with nothing
        return np.linalg.norm(apply_transform(transform, here) - there, axis=1)
