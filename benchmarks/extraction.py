"""Multi-scale extraction from JPEG files to a descriptor store, against a plain loop in the same run.

The plain path describes one image after another in float32, batch size 1: Pillow, to_tensor, the network, GeM, the
sum over three scales. Both take all images of a data root; ``--plain_share`` measures the plain way on fewer, spread
over all. Prints, for each backbone, the time of an image by both, the peak memory of both with the decoding processes
(the plain way comes first, and what it leaves behind counts as metilr's), the lowest cosine between their descriptors,
GAP of both (with all images), and the multiply-adds a second beside those of large bfloat16 and float32 matrix products
measured in between.

    python benchmarks/extraction.py --root DIR --backbones lite0_in r18_in r50_in
"""

import argparse
import copy
import math
import shutil
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from measuring import Clock, PeakMemory, show
from PIL import Image
from rich.console import Console
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import to_tensor

from metilr.data.decode import image_shape
from metilr.data.ground_truth import GroundTruth, load_ground_truth
from metilr.demo import DEMO, make_demo
from metilr.distributed import quieten_lightning
from metilr.evaluation.options import MethodOptions
from metilr.evaluation.recognition import recognise
from metilr.evaluation.runs import RUNS
from metilr.extraction.describe import describe_images
from metilr.extraction.descriptors import Descriptors, open_descriptors
from metilr.extraction.options import ExtractionOptions
from metilr.metrics import gap
from metilr.models import SCALES
from metilr.models.embedder import Embedder, build_embedder

SPLITS = ("database", "val", "test")
PRODUCTS = {"bfloat16": torch.bfloat16, "float32": torch.float32}
PRODUCT_SIDE, PRODUCT_SECONDS = 4096, 1.0


def plain_descriptor(file: Path, embedder: Embedder) -> torch.Tensor:
    """Describe an image as the paper's formulas say, with nothing but torch, timm and Pillow."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (embedder.backbone.mean, embedder.backbone.std))
    image = ((to_tensor(Image.open(file).convert("RGB")) - mean) / std)[None]
    total = torch.zeros(embedder.backbone.width)
    for scale in SCALES:
        scaled = image if scale == 1 else F.interpolate(image, scale_factor=scale, mode="bilinear", align_corners=False)
        features = embedder.backbone.model.forward_features(scaled)
        total += F.normalize(features.clamp(min=1e-6).pow(3).mean(dim=(2, 3)).pow(1 / 3), dim=1)[0]
    return F.normalize(total, dim=0)


def matrix_rate(kind: str) -> float:
    """Multiply-adds a second of a large matrix product, the best of several."""
    a, b = torch.randn(2, PRODUCT_SIDE, PRODUCT_SIDE).to(PRODUCTS[kind])
    best, total = math.inf, Clock()
    while total() < PRODUCT_SECONDS or best == math.inf:
        clock = Clock()
        torch.mm(a, b)
        best = min(best, clock())
    return PRODUCT_SIDE**3 / best


def multiply_adds(embedder: Embedder, shapes: Counter[tuple[int, int]]) -> int:
    """Of the backbone for images of these shapes at all scales; counted without computing, for at most 40 shapes.

    The others count in proportion to their pixels, which is exact but for rounding.
    """
    model = copy.deepcopy(embedder.backbone.model).to("meta")
    counted, pixels, all_pixels = 0, 0, 0
    step = max(1, len(shapes) // 40)
    for i, ((height, width), n) in enumerate(shapes.items()):
        all_pixels += n * height * width
        if i % step:
            continue
        pixels += n * height * width
        for scale in SCALES:
            with FlopCounterMode(display=False) as counter:
                size = math.floor(height * scale), math.floor(width * scale)
                model.forward_features(torch.empty(1, 3, *size, device="meta"))
            counted += n * counter.get_total_flops() // 2
    return counted * all_pixels // pixels


def part_of(ground_truth: GroundTruth, share: float) -> GroundTruth:
    """The first images of each split."""
    paths = {split: of_split[: math.ceil(len(of_split) * share)] for split, of_split in ground_truth.paths.items()}
    labels = {split: ground_truth.labels[split][: len(paths[split])] for split in paths}
    return replace(ground_truth, paths=paths, labels=labels)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="data root; without it the demo museum")
    parser.add_argument("--backbones", nargs="+", default=["lite0_in"], help="others than lite0_in: random weights")
    parser.add_argument("--engine", default="openvino", choices=["openvino", "torch", "compile"])
    parser.add_argument("--precision", default="bf16-mixed", choices=["bf16-mixed", "32"])
    parser.add_argument("--share", type=float, default=1.0, help="of the images of each split, for both ways")
    parser.add_argument("--plain_share", type=float, default=1.0, help="of these images, for the plain way alone")
    parser.add_argument("--growth", action="store_true", help="also a quarter and half of them, for metilr")
    arguments = parser.parse_args()
    quieten_lightning()
    root = arguments.root or make_demo(DEMO)
    ground_truth = part_of(load_ground_truth(root), arguments.share)
    names = [(split, i) for split in SPLITS for i in range(len(ground_truth.paths[split]))]
    files = [ground_truth.image(ground_truth.paths[split][i]) for split, i in names]
    shapes = Counter(image_shape(file) for file in files)
    RUNS.mkdir(exist_ok=True)
    folder, silent = Path(tempfile.mkdtemp(dir=RUNS)), Console(quiet=True)
    options = ExtractionOptions(
        accelerator="cpu", engine=arguments.engine, precision=arguments.precision, num_workers=2, quiet=True
    )
    try:
        for name in arguments.backbones:
            embedder = build_embedder(name, None if name == "lite0_in" else "random")
            with torch.inference_mode(), PeakMemory(with_children=True) as plain_memory:
                plain_descriptor(files[0], embedder)
                clock = Clock()
                chosen = np.linspace(0, len(files) - 1, math.ceil(len(files) * arguments.plain_share)).astype(int)
                plain = torch.stack([plain_descriptor(files[i], embedder) for i in chosen]).numpy()
                plain_seconds = clock() / len(chosen)
            rates, growth = {kind: matrix_rate(kind) for kind in PRODUCTS}, {}
            for share in (0.25, 0.5, 1.0) if arguments.growth else (1.0,):
                part = part_of(ground_truth, share)
                with PeakMemory(with_children=True) as memory:
                    clock = Clock()
                    store = describe_images(embedder, part, folder / f"{name}-{share}", options, silent)
                    growth[sum(map(len, part.paths.values()))] = clock()
                rates = {kind: max(rate, matrix_rate(kind)) for kind, rate in rates.items()}
            seconds = growth[len(files)] / len(files)
            fast = np.concatenate([store.descriptors(split) for split in SPLITS])
            cosines = (fast[chosen] * plain).sum(axis=1)
            gaps = {}
            if arguments.share == arguments.plain_share == 1:
                ends = np.cumsum([len(ground_truth.paths[split]) for split in SPLITS])[:-1]
                parts = {split: [rows] for split, rows in zip(SPLITS, np.split(plain, ends), strict=True)}
                made = {split: np.ones(len(rows), dtype=bool) for split, [rows] in parts.items()}
                opened = {"plain": Descriptors(parts, made, []), "fast": open_descriptors([store.path], ground_truth)}
                for way, descriptors in opened.items():
                    cases = recognise(descriptors, ground_truth, MethodOptions()).cases(ground_truth)
                    gaps[way] = {split: 100 * gap(*case) for split, case in cases.items()}
            work = multiply_adds(embedder, shapes) / len(files)
            show(
                f"extraction of {name}: {arguments.engine}, {arguments.precision}",
                ["way", "ms an image", "val GAP", "test GAP", "TFLOP/s", "peak GB"],
                [
                    [way, 1000 * s, *(gaps[way].values() if gaps else ("", "")), 2e-12 * work / s, peak.bytes / 1e9]
                    for way, s, peak in (("plain", plain_seconds, plain_memory), ("fast", seconds, memory))
                ]
                + [[f"{kind} matrix product", "", "", "", 2e-12 * rate, ""] for kind, rate in rates.items()],
                {
                    "backbone": name, "engine": arguments.engine, "precision": arguments.precision,
                    "images": len(files), "plain_images": len(chosen), "shapes": len(shapes),
                    "ratio": plain_seconds / seconds,
                    "least_cosine": float(cosines.min()), "gap": gaps,
                    "share_of_matrix_rate": work / seconds / rates["bfloat16"],
                    "multiply_adds_a_second": rates, "bfloat16_over_float32": rates["bfloat16"] / rates["float32"],
                    "seconds_by_images": growth,
                    "peak_bytes": {"plain": plain_memory.bytes, "metilr": memory.bytes},
                },
            )  # fmt: skip
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
