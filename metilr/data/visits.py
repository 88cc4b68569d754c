"""Simulated visits: a seeded transform from a catalogue image to a visitor's photograph of it."""

import dataclasses
import hashlib
import math
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch.nn.functional import grid_sample
from torchvision.transforms.v2 import functional as F

from metilr.data.visit_effects import (
    Stream,
    add_glare,
    add_noise,
    blur,
    compress,
    framed_shape,
    light_badly,
    paint_wall,
    put_in_frame,
    shrink,
    shrunk_shape,
    whole_pixels,
)
from metilr.errors import UserError


def project_corners(
    width: int, height: int, perspective: float, rotation: float, side: Stream, askew: Stream
) -> torch.Tensor:
    """Where a camera in front of the picture sees its corners, clockwise from top left, ``(4, 2)``.

    In the picture's pixels, its centre at 0. ``side`` draws yaw and pitch, ``askew`` the camera's roll.
    """
    yaw = math.radians(45) * side.sign() * side.effect(perspective)
    pitch = math.radians(25) * side.sign() * side.effect(perspective)
    roll = math.radians(15) * askew.sign() * askew.effect(rotation)

    xs = torch.tensor([-0.5, 0.5, 0.5, -0.5]) * width
    ys = torch.tensor([-0.5, -0.5, 0.5, 0.5]) * height
    # From 1.5 longest sides away a picture fills a phone's field of view.
    depth = 1 + (xs * math.sin(yaw) + ys * math.sin(pitch)) / (1.5 * max(width, height))
    xs, ys = xs * math.cos(yaw) / depth, ys * math.cos(pitch) / depth
    turned_xs = xs * math.cos(roll) - ys * math.sin(roll)
    turned_ys = xs * math.sin(roll) + ys * math.cos(roll)
    return torch.stack([turned_xs, turned_ys], dim=1)


def window_inside(
    corners: torch.Tensor, width: int, height: int, strength: float, stream: Stream
) -> tuple[float, float, float, float]:
    """Left, top, width, height of a photograph that shows nothing but the picture."""
    edges = corners.roll(-1, 0) - corners
    outward = torch.stack([edges[:, 1], -edges[:, 0]], dim=1)  # the corners run clockwise
    reach = (outward * corners).sum(1)
    share = (reach / (outward.abs() @ torch.tensor([width / 2, height / 2]))).min().item()
    kept_x, kept_y = 1 - 0.5 * stream.effect(strength), 1 - 0.5 * stream.effect(strength)
    full_width, full_height = share * width, share * height
    left = -full_width / 2 + stream.uniform() * (1 - kept_x) * full_width
    top = -full_height / 2 + stream.uniform() * (1 - kept_y) * full_height
    return left, top, kept_x * full_width, kept_y * full_height


def window_around(corners: torch.Tensor, strength: float, stream: Stream) -> tuple[float, float, float, float]:
    """Left, top, width, height of a photograph that shows the whole picture and wall on each side."""
    (left, top), (right, bottom) = corners.min(0).values.tolist(), corners.max(0).values.tolist()
    width, height = right - left, bottom - top
    margins = [0.6 * strength * stream.uniform(0.05, 1.0) for _ in range(4)]
    return (
        left - margins[0] * width,
        top - margins[1] * height,
        (1 + margins[0] + margins[2]) * width,
        (1 + margins[1] + margins[3]) * height,
    )


def warp(picture: torch.Tensor, corners: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Place the picture's corners in a photograph of that size: premultiplied RGB and coverage, (4, H, W)."""
    layers = torch.cat([picture, torch.ones_like(picture[:1])])
    # Where each pixel of the photograph lies in the picture, from -1 to 1: a ratio of linear functions of its centre.
    upright = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], np.float32)
    matrix = cv2.getPerspectiveTransform(corners.numpy().astype(np.float32), upright)
    xs, ys = (np.arange(n, dtype=np.float32) + 0.5 for n in (size[1], size[0]))
    x, y, w = (row[0] * xs + (row[1] * ys + row[2])[:, None] for row in matrix.astype(np.float32))
    place = torch.from_numpy(np.stack([x / w, y / w], axis=2))
    return grid_sample(layers[None], place[None], "bilinear", "zeros", align_corners=False)[0]


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


RECIPE = 2  # raise it when code here or in visit_*.py changes what a visit looks like

PRESETS = {
    # Somebody who takes care, straight on, the whole picture, well lit.
    "mild": VisitStrengths(
        frame=0.4, wall=0.3, crop=0.1, perspective=0.2, rotation=0.15, light=0.3, glare=0.15, blur=0.1, noise=0.1,
        scale=0.1, jpeg=0.3,
    ),
    # The usual snapshot in passing.
    "medium": VisitStrengths(
        frame=0.5, wall=0.5, crop=0.2, perspective=0.4, rotation=0.3, light=0.5, glare=0.4, blur=0.25, noise=0.2,
        scale=0.25, jpeg=0.5,
    ),
    # A dark room, over other people's heads, on an old phone.
    "severe": VisitStrengths(
        frame=0.9, wall=0.9, crop=0.3, perspective=0.9, rotation=0.8, light=0.8, glare=0.8, blur=0.5, noise=0.4,
        scale=0.5, jpeg=0.8,
    ),
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
    stream, longest_side = _streams(seed), longest_side or max(image.shape[1:])
    photograph = F.to_dtype(image, torch.float32, scale=True)
    photograph = put_in_frame(photograph, strengths.frame, stream("frame"))
    photograph, coverage = _hang_on_wall(photograph, strengths, stream, longest_side)
    photograph = light_badly(photograph, strengths.light, stream("light"))
    photograph = add_glare(photograph, coverage, strengths.glare, stream("glare"))
    photograph = blur(photograph, strengths.blur, stream("blur"))
    photograph = shrink(photograph, strengths.scale, stream("scale"))
    photograph = add_noise(photograph, strengths.noise, stream("noise"))
    photograph = F.to_dtype(photograph.clamp(0, 1), torch.uint8, scale=True)
    return compress(photograph, strengths.jpeg, stream("jpeg"))


def _streams(seed: int) -> Callable[[str], Stream]:
    """Random numbers of each part of a visit, by the part's name."""
    return lambda part: Stream(derive_seed(seed, part, 0))


def visit_shape(
    height: int, width: int, strengths: VisitStrengths, seed: int, longest_side: int | None = None
) -> tuple[int, int]:
    """Height and width of the photograph that ``simulate_visit`` makes of an image of that size, without making it."""
    stream, longest_side = _streams(seed), longest_side or max(height, width)
    framed = framed_shape(height, width, strengths.frame, stream("frame"))
    viewpoint = _choose_viewpoint(*framed, strengths, stream, longest_side)
    return shrunk_shape(*viewpoint.size, strengths.scale, stream("scale"))


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
    """Where the picture lies in the photograph."""

    corners: torch.Tensor | None  # in px of the photograph, clockwise from top left, (4, 2); None: it fills it
    size: tuple[int, int]  # height and width of the photograph
    zoom: float  # size of the picture in the photograph, relative to its own


def _choose_viewpoint(
    height: int, width: int, strengths: VisitStrengths, stream: Callable[[str], Stream], longest_side: int
) -> _Viewpoint:
    """See a picture of that size from somewhere, with wall around it or cut off by the photograph's edge."""
    if strengths.wall == strengths.crop == strengths.perspective == strengths.rotation == 0:
        zoom = min(1.0, longest_side / max(height, width))
        return _Viewpoint(None, (whole_pixels(height * zoom), whole_pixels(width * zoom)), zoom)

    corners = project_corners(
        width, height, strengths.perspective, strengths.rotation, stream("perspective"), stream("rotation")
    )
    surround = strengths.wall + strengths.crop
    cropped = surround == 0 or stream("crop or wall").uniform() * surround < strengths.crop
    if cropped:
        window = window_inside(corners, width, height, strengths.crop, stream("crop"))
    else:
        window = window_around(corners, strengths.wall, stream("margin"))

    # window: left, top, width, height in the picture's pixels, its centre at 0
    zoom = min(1.0, longest_side / max(window[2:]))
    size = (whole_pixels(window[3] * zoom), whole_pixels(window[2] * zoom))
    corners = (corners - torch.tensor(window[:2])) * torch.tensor([size[1] / window[2], size[0] / window[3]])
    return _Viewpoint(corners, size, zoom)


def _hang_on_wall(
    picture: torch.Tensor, strengths: VisitStrengths, stream: Callable[[str], Stream], longest_side: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The photograph, ``(3, H', W')``, and the picture's share of each of its pixels, ``(1, H', W')``."""
    height, width = picture.shape[1:]
    viewpoint = _choose_viewpoint(height, width, strengths, stream, longest_side)
    # The warp below does not antialias, so the picture shrinks to its size in the photograph first.
    picture = F.resize(
        picture, [whole_pixels(height * viewpoint.zoom), whole_pixels(width * viewpoint.zoom)], antialias=True
    )
    if viewpoint.corners is None:
        return picture, torch.ones_like(picture[:1])
    seen = warp(picture, viewpoint.corners, viewpoint.size)
    wall = paint_wall(seen[3:], strengths.wall, stream("wall"))
    return torch.addcmul(seen[:3], 1 - seen[3:], wall, out=wall), seen[3:]
