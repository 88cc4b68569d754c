"""Where a simulated visit sees the picture from: its corners in the photograph, and the photograph's edges."""

import math

import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from metilr.data.visit_stream import Stream


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
    height, width = picture.shape[1:]
    layers = torch.cat([picture, torch.ones_like(picture[:1])])
    # torchvision's perspective keeps the canvas, so make room for whichever is larger.
    layers = F.pad(layers, [0, 0, max(0, size[1] - width), max(0, size[0] - height)])
    upright = [[0, 0], [width, 0], [width, height], [0, height]]
    layers = F.perspective(layers, upright, corners.tolist(), interpolation=InterpolationMode.BILINEAR)
    return layers[:, : size[0], : size[1]]
