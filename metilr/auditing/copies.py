"""Whether two images are copies: one picture, compressed, resized, cropped, framed, turned or mirrored anew.

Both are looked at in grey, at 320 px. Matches of SIFT give a first transformation of one to the other, or their frames
if they have none; maximising the correlation (ECC) refines it to fractions of a pixel. A copy's transformation is a
scale, quarter turns and a shift; under the nearest of that kind its details lie on each other. A second photograph of
an object is turned by a degree or stretched by a hundredth, and its details do not. They have to agree everywhere: two
plates of a series differ in a corner.

Source: Lowe, Distinctive Image Features from Scale-Invariant Keypoints, IJCV 2004; Evangelidis and Psarakis, Parametric
Image Alignment Using Enhanced Correlation Coefficient Maximization, PAMI 2008.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import cv2
import numpy as np

SIDE, LEAST_SIDE, MOST_SIDE = 320, 64, 2000  # px of the longer side; more where the shorter would be too thin
POINTS = 400  # of SIFT, the strongest
RECIPE = 2  # raise it when code here changes what two images give
RATIO = 0.85  # of the distances to the nearest and to the second nearest point: matches beyond it are left out
LEAST_MATCHES = 4
LEAST_INLIERS = 8  # matches that one transformation explains: four or five do so by chance
MANY_POINTS = 40  # fewer may not match
ALIKE = 0.5  # correlation of 32 x 32 px
DETAIL = (1.0, 3.0)  # standard deviations in px between which Gaussians leave detail
BORDER = 10  # px that a frame's edge, blurred, reaches into the picture
BLOCK = 24  # px of a side of the squares that must agree, each of them
LEAST_SHARE = 0.2  # of the smaller picture's area that must be seen in the other
FLATTEST = 3.0  # times as far stretched one way as the other, by a look from the side
FLAT = 2.0  # standard deviation of grey, of 255, below which there is nothing to compare


class Sketch(NamedTuple):
    """An image as it is compared."""

    grey: np.ndarray  # uint8 (h, w)
    size: tuple[int, int]  # width and height of the image itself
    points: np.ndarray  # float32 (n, 2), in px of ``grey``
    descriptors: np.ndarray  # float32 (n, 128)


class Likeness(NamedTuple):
    """How far one image is a copy of another."""

    score: float  # correlation of their details where it is least, at most 1; 0 if they cannot be laid on each other
    mirrored: bool = False
    quarter_turns: int = 0  # counter-clockwise, of the first, to lie as the second


def sketch(image: np.ndarray) -> Sketch:
    """Reduce an image, uint8 RGB ``(H, W, 3)``, to what is compared of it."""
    height, width = image.shape[:2]
    factor = max(SIDE / max(height, width), min(LEAST_SIDE / min(height, width), MOST_SIDE / max(height, width)))
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    grey = cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), size, interpolation=cv2.INTER_AREA)
    return _described(grey, (width, height))


def mirrored(image: Sketch) -> Sketch:
    """Reduce what a mirror shows of an image."""
    return _described(np.ascontiguousarray(image.grey[:, ::-1]), image.size)


def likeness(first: Sketch, second: Sketch, in_mirror: Sketch | None = None) -> Likeness:
    """Compare two images as they are, and with the second mirrored, which may be given."""
    if min(first.grey.std(), second.grey.std()) < FLAT:
        return Likeness(0.0)
    in_mirror = in_mirror or mirrored(second)
    found = [*_under_each(first, second, False), *_under_each(first, in_mirror, True), Likeness(0.0)]
    return max(found, key=lambda each: each.score)


def _described(grey: np.ndarray, size: tuple[int, int]) -> Sketch:
    points, descriptors = cv2.SIFT.create(nfeatures=POINTS).detectAndCompute(grey, None)
    if descriptors is None:
        return Sketch(grey, size, np.empty((0, 2), np.float32), np.empty((0, 128), np.float32))
    roots = np.sqrt(descriptors / np.maximum(descriptors.sum(axis=1, keepdims=True), 1e-9))
    return Sketch(grey, size, np.array([point.pt for point in points], np.float32), roots)


def _under_each(first: Sketch, second: Sketch, is_mirrored: bool) -> Iterator[Likeness]:
    for start in _starts(first, second):
        with contextlib.suppress(cv2.error):  # the correlation does not rise
            to_first = cv2.invertAffineTransform(start).astype(np.float32)
            criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 50, 1e-5)
            _, refined = _ecc(second.grey, first.grey, to_first, cv2.MOTION_AFFINE, criteria, None, 5)
            nearest, turns = _rigid(cv2.invertAffineTransform(refined), first, second)
            yield Likeness(_agreement(nearest, first, second), is_mirrored, turns)


def inliers(first: Sketch, second: Sketch) -> int:
    """Different points of the second that an affine transformation lays points of the first on, wherever both are seen.

    One that flattens the picture lays it on nothing.
    """
    ours, theirs = _matching_points(first, second)
    if len(ours) < LEAST_MATCHES:
        return 0
    cv2.setRNGSeed(0)
    found, is_inlier = cv2.estimateAffine2D(ours, theirs, ransacReprojThreshold=3.0)
    if found is None:
        return 0
    least, most = sorted(np.linalg.svd(found[:, :2], compute_uv=False).tolist())
    if not 0 < most < FLATTEST * least:
        return 0
    return len(np.unique(np.round(theirs[is_inlier[:, 0] > 0]), axis=0))


def _matching_points(first: Sketch, second: Sketch) -> tuple[np.ndarray, np.ndarray]:
    """Points of both that match, float32 ``(m, 2)`` each."""
    if min(len(first.points), len(second.points)) < LEAST_MATCHES:
        return first.points[:0], second.points[:0]
    pairs = cv2.BFMatcher(cv2.NORM_L2).knnMatch(first.descriptors, second.descriptors, k=2)
    matches = [pair[0] for pair in pairs if len(pair) == 2 and pair[0].distance < RATIO * pair[1].distance]
    ours = first.points[[match.queryIdx for match in matches]]
    return ours, second.points[[match.trainIdx for match in matches]]


def _starts(first: Sketch, second: Sketch) -> Iterator[np.ndarray]:
    """Affine transformations ``(2, 3)`` to begin with: by matching points, or else of one frame onto the other."""
    ours, theirs = _matching_points(first, second)
    if len(ours) >= LEAST_MATCHES:
        cv2.setRNGSeed(0)
        found, is_inlier = cv2.estimateAffinePartial2D(ours, theirs, ransacReprojThreshold=3.0)
        if found is not None and is_inlier.sum() >= LEAST_INLIERS:
            yield found
            return
    # Nothing to match, or a pattern that repeats itself: frame on frame, if that is alike at all.
    (height, width), (to_height, to_width) = first.grey.shape, second.grey.shape
    if abs(np.log(width / height * to_height / to_width)) < 0.1:
        small = [cv2.resize(each.grey, (32, 32), interpolation=cv2.INTER_AREA).ravel() for each in (first, second)]
        is_alike = min(each.std() for each in small) > 0 and np.corrcoef(small[0], small[1])[0, 1] >= ALIKE
        if is_alike or min(len(first.points), len(second.points)) < MANY_POINTS:
            yield np.array([[to_width / width, 0, 0], [0, to_height / height, 0]], np.float32)


def _rigid(found: np.ndarray, first: Sketch, second: Sketch) -> tuple[np.ndarray, int]:
    """The transformation nearest to an affine one that scales evenly, turns by quarters and shifts; and the turns.

    Evenly in px of the images themselves: those of ``grey`` are rounded.
    """
    (height, width), (to_height, to_width) = first.grey.shape, second.grey.shape
    ours = np.array([first.size[0] / width, first.size[1] / height])
    theirs = np.array([second.size[0] / to_width, second.size[1] / to_height])
    corners = np.array([[0, 0], [width, 0], [0, height], [width, height]], float)
    source, target = corners * ours, (corners @ found[:, :2].T + found[:, 2]) * theirs
    middle, aim = source.mean(axis=0), target.mean(axis=0)
    turned = [(source - middle) @ np.linalg.matrix_power(_QUARTER, turns).T for turns in range(4)]
    scales = [float((each * (target - aim)).sum() / (each * each).sum()) for each in turned]
    turns = int(np.argmax(scales))
    linear = scales[turns] * np.linalg.matrix_power(_QUARTER, turns)
    linear_of_grey = (linear * ours) / theirs[:, None]
    shift = (aim - linear @ middle) / theirs
    return np.column_stack([linear_of_grey, shift]), turns


_ecc: Any = cv2.findTransformECC  # its type stubs know no call without a mask
_QUARTER = np.array([[0.0, 1.0], [-1.0, 0.0]])  # counter-clockwise where y points down


def _agreement(transformation: np.ndarray, first: Sketch, second: Sketch) -> float:
    """The correlation of details in the block where it is least; 0 if too little of either picture is seen.

    Of details of equal mean and variance in all, ``1 - (x - y)**2 / 2`` is the correlation where it is averaged; in a
    block with more than usual it is held against what that has, in one with less against the usual.
    """
    size = second.grey.shape[::-1]
    area = abs(float(np.linalg.det(transformation[:, :2])))
    if not 0.02 < area < 50:
        return 0.0
    whole = np.full(first.grey.shape, 255, np.uint8)
    seen = cv2.warpAffine(whole, transformation, size, flags=cv2.INTER_NEAREST)
    share = (seen > 0).sum() / min(first.grey.size * area, second.grey.size)
    kernel = np.ones((2 * BORDER + 1,) * 2, np.uint8)
    inner = cv2.erode(seen, kernel, borderType=cv2.BORDER_CONSTANT, borderValue=0) > 0
    if share < LEAST_SHARE or inner.sum() < BLOCK**2:
        return 0.0
    x = _standard(cv2.warpAffine(_detail(first.grey), transformation, size), inner)
    y = _standard(_detail(second.grey), inner)
    in_block = cv2.blur(inner.astype(np.float32), (BLOCK, BLOCK))
    apart, usual = (
        cv2.blur(each, (BLOCK, BLOCK)) / np.maximum(in_block, 0.5) for each in ((x - y) ** 2, (x**2 + y**2) / 2)
    )
    least = (1 - apart / 2 / np.maximum(usual, 1))[in_block >= 0.5]
    return max(0.0, float(least.min())) if len(least) else 0.0


def _standard(detail: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """Detail of mean 0 and variance 1 within a mask, and 0 outside."""
    within = detail[inner]
    return np.where(inner, (detail - within.mean()) / max(float(within.std()), 1e-6), 0).astype(np.float32)


def _detail(grey: np.ndarray) -> np.ndarray:
    fine, coarse = (cv2.GaussianBlur(grey.astype(np.float32), (0, 0), sigma) for sigma in DETAIL)
    return fine - coarse
