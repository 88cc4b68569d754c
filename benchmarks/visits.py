"""How long a simulated visit takes, and how long composed of torchvision's own transforms at the full resolution.

    python benchmarks/visits.py --root DIR [--images 30]

Simulates a visit of each preset to the first catalogue images of a data root, at their own size, in one thread, both
ways in turn in one run, and compares the photographs before noise and compression.
"""

import argparse
import dataclasses
import io
import math
import statistics
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from measuring import show
from PIL import Image
from torchvision.transforms.v2 import functional as F

from metilr.data.decode import load_image
from metilr.data.ground_truth import load_ground_truth
from metilr.data.visit_effects import (
    _WALL_COLOURS,
    Stream,
    choose_frame,
    put_in_frame,
    shrunk_shape,
)
from metilr.data.visits import PRESETS, VisitStrengths, _choose_viewpoint, derive_seed, simulate_visit


def main() -> None:
    """Simulate both ways, compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--images", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    truth = load_ground_truth(options.root)
    images = [load_image(truth.image(path)) for path in truth.paths["database"][: options.images]]
    ways = {"torchvision": plain_visit, "metilr": simulate_visit}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    apart = []
    for number, image in enumerate(images):
        for strengths in PRESETS.values():
            made = {}
            for name, visit in ways.items():
                begun = time.process_time()
                visit(image, strengths, number)
                seconds[name].append(time.process_time() - begun)
                made[name] = visit(image, dataclasses.replace(strengths, noise=0, jpeg=0), number).float()
            apart.append((made["torchvision"] - made["metilr"]).abs().mean().item())
    plain, ours = (1000 * statistics.mean(of) for of in seconds.values())
    figures = {
        "visits": len(apart),
        "torchvision_ms": round(plain, 1),
        "metilr_ms": round(ours, 1),
        "ratio": round(plain / ours, 2),
        "mean_levels_apart": round(statistics.mean(apart), 2),
    }
    columns = ["visits", "torchvision's, ms", "metilr's, ms", "ratio", "mean levels apart"]
    show("simulated visits, of a core", columns, [[*figures.values()]], figures)


def plain_visit(image: torch.Tensor, strengths: VisitStrengths, seed: int) -> torch.Tensor:
    """The same visit by torchvision, each part at the resolution that the photograph has before it shrinks."""

    def stream(part: str) -> Stream:
        return Stream(derive_seed(seed, part, 0))

    height, width = image.shape[1:]
    view = _choose_viewpoint(height, width, dataclasses.replace(strengths, scale=0), stream, None)
    framed = put_in_frame(image.numpy(), choose_frame(height, width, strengths.frame, stream("frame")))
    picture = F.to_dtype(torch.from_numpy(framed), torch.float32, scale=True)
    picture = F.resize(picture, [side + 2 * view.frame.width for side in view.picture], antialias=True)
    seen = plain_warp(picture, view.corners, view.size)
    photograph, coverage = seen[:3], seen[3:]
    if view.is_cropped:
        photograph, coverage = photograph / coverage.clamp(min=0.01), torch.ones_like(coverage)
    else:
        photograph = photograph + (1 - coverage) * plain_wall(coverage, stream("wall"))
    photograph = plain_light(photograph, strengths.light, stream("light"))
    photograph = plain_glare(photograph, coverage, strengths.glare, stream("glare"))
    photograph = plain_blur(photograph, strengths.blur, stream("blur"))
    shape = shrunk_shape(*view.size, strengths.scale, stream("scale"))
    photograph = F.resize(photograph, list(shape), antialias=True)
    if strengths.noise:
        noise = stream("noise")
        sigma, (height, width) = 0.12 * noise.effect(strengths.noise), shape
        fine = torch.from_numpy(noise.normal(1, height, width))
        coarse = torch.from_numpy(noise.normal(3, max(1, round(height / 3)), max(1, round(width / 3))))
        photograph = photograph + sigma * (0.8 * fine + 0.6 * F.resize(coarse, [height, width], antialias=True))
    photograph = F.to_dtype(photograph.clamp(0, 1), torch.uint8, scale=True)
    if not strengths.jpeg:
        return photograph
    file = io.BytesIO()
    F.to_pil_image(photograph).save(file, "JPEG", quality=round(95 - 85 * stream("jpeg").effect(strengths.jpeg)))
    return F.pil_to_tensor(Image.open(file))


def plain_warp(picture: torch.Tensor, corners: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    """Place a picture's corners as torchvision does, which keeps the canvas: there is room for whichever is larger."""
    height, width = picture.shape[1:]
    layers = torch.cat([picture, torch.ones_like(picture[:1])])
    layers = F.pad(layers, [0, 0, max(0, size[1] - width), max(0, size[0] - height)])
    upright = [[0, 0], [width, 0], [width, height], [0, height]]
    return F.perspective(layers, upright, corners.tolist())[:, : size[0], : size[1]]


def plain_wall(coverage: torch.Tensor, stream: Stream) -> torch.Tensor:
    """Plaster, shadow and label."""
    height, width = coverage.shape[1:]
    colour = stream.choose(_WALL_COLOURS)[:, None, None] * stream.uniform(0.85, 1.05)
    plaster = F.resize(1 + 0.03 * torch.from_numpy(stream.normal(1, 12, 12)), [height, width], antialias=True)
    offset = max(1, round(0.02 * max(height, width)))
    shadow = F.gaussian_blur(coverage.roll(offset, 1), [6 * offset + 1] * 2, [float(offset)] * 2)
    wall = torch.from_numpy(colour) * plaster * (1 - 0.45 * shadow)
    if stream.uniform() < 0.6:
        left, top = int(stream.uniform(0, 0.9) * width), int(stream.uniform(0.5, 0.9) * height)
        label = wall[:, top : top + max(1, height // 18), left : left + max(1, width // 12)]
        label.copy_(0.25 * label + 0.7)
    return wall


def plain_light(image: torch.Tensor, strength: float, stream: Stream) -> torch.Tensor:
    """Brightness, saturation, a tint, and less light with the distance from the lamp."""
    if strength == 0:
        return image
    image = F.adjust_brightness(image, 1 - 0.6 * stream.effect(strength))
    image = F.adjust_saturation(image, 1 - 0.4 * stream.effect(strength))
    warmth = 0.3 * stream.effect(strength) * (1 if stream.uniform() < 0.7 else -1)
    green = 0.05 * strength * stream.uniform(-1, 1)
    xs, ys = places(image)
    angle = stream.uniform(0, 2 * math.pi)
    along = math.cos(angle) * (xs - 0.5) + math.sin(angle) * (ys - 0.5)
    falloff = 1 - 0.6 * stream.effect(strength) * (along / math.sqrt(2) + 0.5)
    return image * torch.tensor([1 + warmth / 2, 1 + green, 1 - warmth / 2])[:, None, None] * falloff


def plain_glare(image: torch.Tensor, coverage: torch.Tensor, strength: float, stream: Stream) -> torch.Tensor:
    """One lamp after the other."""
    if strength == 0:
        return image
    xs, ys = places(image)
    for _ in range(1 + int(stream.uniform(0, 3) * strength)):
        x, y = stream.uniform(0.15, 0.85), stream.uniform(0.1, 0.8)
        wide = 0.12 * stream.effect(strength) + 0.02
        high = wide * stream.uniform(0.5, 1.8)
        lamp = torch.exp(-(((xs - x) / wide) ** 4) - ((ys - y) / high) ** 4)
        halo = torch.exp(-((xs - x) ** 2 + (ys - y) ** 2) / (3 * wide) ** 2)
        image = image + (1 - image) * stream.effect(strength) * (0.8 * lamp + 0.25 * halo) * coverage
    return image


def plain_blur(image: torch.Tensor, strength: float, stream: Stream) -> torch.Tensor:
    """Lens and shaking hand."""
    if strength == 0:
        return image
    sigma = max(0.3, 0.012 * max(image.shape[1:]) * stream.effect(strength))
    shake = stream.uniform(0.4, 1.0)
    sigmas = [sigma, sigma * shake] if stream.sign() > 0 else [sigma * shake, sigma]
    return F.gaussian_blur(image, [2 * math.ceil(3 * each) + 1 for each in sigmas], sigmas)


def places(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns ``(1, W)`` and rows ``(H, 1)``, in shares of the sides."""
    height, width = image.shape[1:]
    return ((torch.arange(width) + 0.5) / width)[None], ((torch.arange(height) + 0.5) / height)[:, None]


if __name__ == "__main__":
    main()
