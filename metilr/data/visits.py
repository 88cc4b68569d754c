"""Simulated visits: a seeded transform from a catalogue image to a visitor's photograph of it."""

import dataclasses
import hashlib
import math
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torchvision.transforms.v2 import functional as F

from metilr.data import visit_effects as effects
from metilr.data.visit_effects import Frame, Stream, whole_pixels
from metilr.errors import UserError

Streams = Callable[[str], Stream]  # random numbers of each part of a visit, by the part's name
Window = tuple[float, float, float, float]  # left, top, width, height in the picture's pixels, its centre at 0


def project_corners(width: int, height: int, strengths: "VisitStrengths", stream: Streams) -> np.ndarray:
    """Where a camera in front of the picture sees its corners, clockwise from top left, ``(4, 2)``.

    In the picture's pixels, its centre at 0.
    """
    side, askew = stream("perspective"), stream("rotation")
    yaw = math.radians(45) * side.sign() * side.effect(strengths.perspective)
    pitch = math.radians(25) * side.sign() * side.effect(strengths.perspective)
    roll = math.radians(15) * askew.sign() * askew.effect(strengths.rotation)

    xs, ys = np.array([-0.5, 0.5, 0.5, -0.5]) * width, np.array([-0.5, -0.5, 0.5, 0.5]) * height
    # From 1.5 longest sides away a picture fills a phone's field of view.
    depth = 1 + (xs * math.sin(yaw) + ys * math.sin(pitch)) / (1.5 * max(width, height))
    xs, ys = xs * math.cos(yaw) / depth, ys * math.cos(pitch) / depth
    turned_xs = xs * math.cos(roll) - ys * math.sin(roll)
    turned_ys = xs * math.sin(roll) + ys * math.cos(roll)
    return np.stack([turned_xs, turned_ys], axis=1)


def window_inside(corners: np.ndarray, width: int, height: int, strength: float, stream: Stream) -> Window:
    """Where a photograph lies that shows nothing but the picture."""
    edges = np.roll(corners, -1, 0) - corners
    outward = np.stack([edges[:, 1], -edges[:, 0]], axis=1)  # the corners run clockwise
    reach = (outward * corners).sum(1)
    share = float((reach / (np.abs(outward) @ [width / 2, height / 2])).min())
    kept_x, kept_y = 1 - 0.5 * stream.effect(strength), 1 - 0.5 * stream.effect(strength)
    full_width, full_height = share * width, share * height
    left = -full_width / 2 + stream.uniform() * (1 - kept_x) * full_width
    top = -full_height / 2 + stream.uniform() * (1 - kept_y) * full_height
    return left, top, kept_x * full_width, kept_y * full_height


def window_around(corners: np.ndarray, strength: float, stream: Stream) -> Window:
    """Where a photograph lies that shows the whole picture and wall on each side."""
    (left, top), (right, bottom) = corners.min(0).tolist(), corners.max(0).tolist()
    width, height = right - left, bottom - top
    to_left, above, to_right, below = (0.6 * strength * stream.uniform(0.05, 1.0) for _ in range(4))
    corner = left - to_left * width, top - above * height
    return *corner, (1 + to_left + to_right) * width, (1 + above + below) * height


def warp(picture: np.ndarray, corners: np.ndarray, size: tuple[int, int], is_cropped: bool) -> np.ndarray:
    """Place the picture's corners in a photograph of that height and width, uint8, ``(3, H, W)`` to ``(4, H', W')``.

    The fourth plane is the picture's coverage, by which the others are multiplied. Past a cropped picture's edge lies
    what is at its edge, so that nothing else is seen.
    """
    height, width = picture.shape[1:]
    layers = cv2.merge([*picture, np.full((height, width), 255, np.uint8)])
    upright = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)
    # OpenCV counts from the first pixel's centre.
    matrix = cv2.getPerspectiveTransform(upright - 0.5, corners.astype(np.float32) - 0.5)
    border = cv2.BORDER_REPLICATE if is_cropped else cv2.BORDER_CONSTANT
    return np.stack(cv2.split(cv2.warpPerspective(layers, matrix, size[::-1], borderMode=border)))


@dataclasses.dataclass(frozen=True)
class VisitStrengths:
    """How strongly each part of a visit acts: 0 is off, 1 is the extreme stated here.

    A part draws its effect anew for each seed, between 40% and 100% of its strength times that extreme.

    Attributes:
        frame: A bevelled frame, at 1 up to 16% of the picture's shorter side wide.
        wall: Wall on all four sides, at 1 each up to 60% of the picture's side, with a shadow, often a label.
        crop: The photograph's edge cuts the picture: at 1 up to half of its height and of its width is lost.
            A visit shows either wall or crop: with both on, crop has probability crop / (crop + wall).
        perspective: Seen from the side, at 1 up to 45 degrees of yaw and 25 degrees of pitch.
        rotation: The camera held askew, at 1 up to 15 degrees.
        light: Dim (at 1 down to 40% brightness), tinted (up to 30% between red and blue), pale (up to 40%
            less saturation) and uneven (the far corner up to 60% darker).
        glare: One to three lamps mirrored in varnish or glass, at 1 each white over up to 25% of a side.
        blur: Lens and shaking hand: at 1 a Gaussian, its standard deviation up to 1.2% of the longest side,
            unequal along the two axes.
        noise: Sensor noise, at 1 a standard deviation of up to 0.12 of white, with coarse colour blotches.
        scale: A small file: at 1 the sides shrink to as little as 25%.
        jpeg: Compression, quality 95 and, at 1, down to 10.
    """

    frame: float = 0.0
    wall: float = 0.0
    crop: float = 0.0
    perspective: float = 0.0
    rotation: float = 0.0
    light: float = 0.0
    glare: float = 0.0
    blur: float = 0.0
    noise: float = 0.0
    scale: float = 0.0
    jpeg: float = 0.0

    def __post_init__(self) -> None:
        for part, strength in dataclasses.asdict(self).items():
            if not 0 <= strength <= 1:
                raise ValueError(f"the strength of {part!r} is {strength}; choose one in [0, 1]")


RECIPE = 3  # raise it when code here or in visit_*.py changes what a visit looks like

PRESETS = {
    # Somebody who takes care, straight on, the whole picture, well lit.
    "mild": VisitStrengths(frame=0.4, wall=0.3, crop=0.1, perspective=0.2, rotation=0.15, light=0.3, glare=0.15,
                           blur=0.1, noise=0.1, scale=0.1, jpeg=0.3),
    # The usual snapshot in passing.
    "medium": VisitStrengths(frame=0.5, wall=0.5, crop=0.2, perspective=0.4, rotation=0.3, light=0.5, glare=0.4,
                             blur=0.25, noise=0.2, scale=0.25, jpeg=0.5),
    # A dark room, over other people's heads, on an old phone.
    "severe": VisitStrengths(frame=0.9, wall=0.9, crop=0.3, perspective=0.9, rotation=0.8, light=0.8, glare=0.8,
                             blur=0.5, noise=0.4, scale=0.5, jpeg=0.8),
}  # fmt: skip


def simulate_visit(
    image: torch.Tensor, strengths: VisitStrengths, seed: int, longest_side: int | None = None
) -> torch.Tensor:
    """Turn a catalogue image into a visitor's photograph of it.

    The same image, strengths and seed give the same photograph, in any thread or process; the global random
    state is neither read nor changed. With all strengths 0 the photograph is a copy of the image.

    RGB, uint8, ``(3, H, W)`` to ``(3, H', W')``, of any size down to one pixel. The longest side is at most
    ``longest_side``, by default the image's own; nothing is magnified to reach it.
    """
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
        raise ValueError(f"image must be uint8 (3, H, W), not {image.dtype} {tuple(image.shape)}")
    stream = _streams(seed)
    viewpoint = _choose_viewpoint(image.shape[1], image.shape[2], strengths, stream, longest_side)
    photograph, coverage = _hang_on_wall(image, viewpoint, strengths, stream)
    effects.light_badly(photograph, strengths.light, stream("light"))
    effects.add_glare(photograph, coverage, strengths.glare, stream("glare"))
    effects.blur(photograph, strengths.blur, stream("blur"))
    effects.add_noise(photograph, strengths.noise, stream("noise"))
    # Rounds and clips, and OpenCV's order is blue first.
    levels = cv2.merge([cv2.addWeighted(plane, 255, plane, 0, 0, dtype=cv2.CV_8U) for plane in photograph[::-1]])
    return torch.from_numpy(np.stack(cv2.split(effects.compress(levels, strengths.jpeg, stream("jpeg")))[::-1]))


def _streams(seed: int) -> Streams:
    return lambda part: Stream(derive_seed(seed, part, 0))


def visit_shape(
    height: int, width: int, strengths: VisitStrengths, seed: int, longest_side: int | None = None
) -> tuple[int, int]:
    """Height and width of the photograph that ``simulate_visit`` makes of an image of that size, without making it."""
    return _choose_viewpoint(height, width, strengths, _streams(seed), longest_side).size


def strengths_between(weakest: str, strongest: str, share: float) -> VisitStrengths:
    """Strengths between two presets, ``share`` in [0, 1] of the way from the first to the second."""
    weak, strong = (dataclasses.asdict(PRESETS[name]) for name in (weakest, strongest))
    return VisitStrengths(**{part: (1 - share) * weak[part] + share * strong[part] for part in weak})


def derive_seed(base_seed: int, name: str, index: int) -> int:
    """An integer in [0, 2⁶³) for one image and one of several views or epochs, the same in every process."""
    # Python's own hash() of a string differs from process to process.
    digest = hashlib.blake2b(f"{base_seed}\0{index}\0{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def refuse_bad_seed(seed: int) -> None:
    """Refuse a seed outside [0, 2⁶³), the range that every generator takes."""
    if not 0 <= seed < 2**63:
        raise UserError(f"{seed}: out of range; choose one from 0 to 2**63 - 1", "seed")


class _Viewpoint(NamedTuple):
    """Where the framed picture lies in the photograph, all in px of the photograph."""

    size: tuple[int, int]  # height and width of the photograph
    picture: tuple[int, int]  # height and width of the picture itself, seen straight on
    frame: Frame
    corners: np.ndarray  # of the frame, clockwise from top left, (4, 2)
    is_cropped: bool  # there is no wall


def _choose_viewpoint(
    height: int, width: int, strengths: VisitStrengths, stream: Streams, longest_side: int | None
) -> _Viewpoint:
    """See a picture of that size from somewhere, with wall around it or cut off by the photograph's edge."""
    longest_side = longest_side or max(height, width)
    frame = effects.choose_frame(height, width, strengths.frame, stream("frame"))
    height, width = height + 2 * frame.width, width + 2 * frame.width
    corners = project_corners(width, height, strengths, stream)
    surround = strengths.wall + strengths.crop
    is_cropped = surround == 0 or stream("crop or wall").uniform() * surround < strengths.crop
    if is_cropped:
        window = window_inside(corners, width, height, strengths.crop, stream("crop"))
    else:
        window = window_around(corners, strengths.wall, stream("margin"))

    zoom = min(1.0, longest_side / max(window[2:]))
    size = whole_pixels(window[3] * zoom), whole_pixels(window[2] * zoom)
    size = effects.shrunk_shape(*size, strengths.scale, stream("scale"))
    zoom_y, zoom_x = size[0] / window[3], size[1] / window[2]
    # Everything is made at the size at which it is seen.
    height, width = whole_pixels(height * min(1, zoom_y)), whole_pixels(width * min(1, zoom_x))
    bar = min(whole_pixels(frame.width * min(1, zoom_x, zoom_y)), frame.width, (min(height, width) - 1) // 2)
    corners = (corners - window[:2]) * (zoom_x, zoom_y)
    # PyTorch (2.14) resizes uint8 to a width of one pixel wrongly.
    picture = height - 2 * bar, max(2, width - 2 * bar)
    return _Viewpoint(size, picture, frame._replace(width=bar), corners, is_cropped)


def _hang_on_wall(
    image: torch.Tensor, viewpoint: _Viewpoint, strengths: VisitStrengths, stream: Streams
) -> tuple[np.ndarray, np.ndarray]:
    """The photograph, ``(3, H', W')``, and the picture's share of each of its pixels, ``(H', W')``."""
    # The warp below does not antialias, so the picture shrinks to its size in the photograph first.
    picture = effects.put_in_frame(F.resize(image, list(viewpoint.picture), antialias=True).numpy(), viewpoint.frame)
    seen = warp(picture, viewpoint.corners, viewpoint.size, viewpoint.is_cropped) * np.float32(1 / 255)
    photograph, coverage = seen[:3], seen[3]
    if not viewpoint.is_cropped:
        photograph += (1 - coverage) * effects.paint_wall(coverage, stream("wall"))
    return photograph, coverage
