"""How long a simulated visit takes, and how long with torchvision's own blur and perspective in its place.

    python benchmarks/visits.py --root DIR [--images 30]

Simulates a visit of each preset to the first catalogue images of a data root, at their own size, in one thread, both
ways in turn in one run, and compares the photographs before they are compressed.
"""

import argparse
import dataclasses
import math
import statistics
import time
from pathlib import Path

import torch
from measuring import show
from torchvision.transforms.v2 import functional as F

from metilr.data import visit_effects, visits
from metilr.data.decode import load_image
from metilr.data.ground_truth import load_ground_truth
from metilr.data.visits import PRESETS, simulate_visit

OURS = (visit_effects.gaussian_blur, visits.warp)


def main() -> None:
    """Simulate both ways, compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--images", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    truth = load_ground_truth(options.root)
    images = [load_image(truth.image(path)) for path in truth.paths["database"][: options.images]]
    seconds: dict[str, list[float]] = {"torchvision": [], "metilr": []}
    worst = changed = n_values = 0
    for number, image in enumerate(images):
        for strengths in PRESETS.values():
            made = {}
            for name, (blur, warp) in {"torchvision": (plain_blur, plain_warp), "metilr": OURS}.items():
                visit_effects.gaussian_blur, visits.warp = blur, warp
                begun = time.process_time()
                simulate_visit(image, strengths, number)
                seconds[name].append(time.process_time() - begun)
                made[name] = simulate_visit(image, dataclasses.replace(strengths, jpeg=0), number).int()
            apart = (made["torchvision"] - made["metilr"]).abs()
            worst, changed, n_values = (
                max(worst, int(apart.max())),
                changed + int((apart > 0).sum()),
                n_values + apart.numel(),
            )
    visit_effects.gaussian_blur, visits.warp = OURS
    plain, ours = (1000 * statistics.mean(of) for of in seconds.values())
    figures = {
        "visits": len(seconds["metilr"]),
        "torchvision_ms": round(plain, 1),
        "metilr_ms": round(ours, 1),
        "ratio": round(plain / ours, 2),
        "most_levels_apart": worst,
        "share_of_values_apart": changed / n_values,
    }
    columns = ["visits", "torchvision's, ms", "metilr's, ms", "ratio", "most levels apart"]
    show("simulated visits, of a core", columns, [[len(seconds["metilr"]), plain, ours, plain / ours, worst]], figures)


def plain_blur(image: torch.Tensor, sigma_x: float, sigma_y: float) -> torch.Tensor:
    """Blur as torchvision does."""
    sizes = [2 * min(math.ceil(3 * s), n - 1) + 1 for s, n in ((sigma_x, image.shape[2]), (sigma_y, image.shape[1]))]
    return F.gaussian_blur(image, sizes, [sigma_x, sigma_y])


def plain_warp(picture: torch.Tensor, corners: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Place a picture's corners as torchvision does, which keeps the canvas: there is room for whichever is larger."""
    height, width = picture.shape[1:]
    layers = torch.cat([picture, torch.ones_like(picture[:1])])
    layers = F.pad(layers, [0, 0, max(0, size[1] - width), max(0, size[0] - height)])
    upright = [[0, 0], [width, 0], [width, height], [0, height]]
    return F.perspective(layers, upright, corners.tolist())[:, : size[0], : size[1]]


if __name__ == "__main__":
    main()
