"""How evenly the batches of the Met are dealt out to processes, in multiply-adds (which go with pixels).

    python benchmarks/balance.py --root DIR [--processes 2 4 8 16]

Takes the mini ground truth of DIR (images are not needed) and makes up shapes as the Met has them: the longest side 500
px, the other from 150 to 500. Prints the busiest process' work over the mean, as metilr deals, and where every process
gets the same number of images (the plain way); the ratio is how much longer the plain way's busiest takes.
"""

import argparse
from pathlib import Path

import numpy as np
from measuring import show

from metilr.data.ground_truth import load_ground_truth
from metilr.extraction.datamodule import deal, same_shape_batches


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4, 8, 16, 64])
    parser.add_argument("--batch_size", type=int, default=32)
    arguments = parser.parse_args()
    truth = load_ground_truth(arguments.root, "mini")
    n = sum(map(len, truth.paths.values()))
    rng = np.random.default_rng(0)
    short = np.clip(np.rint(rng.normal(380, 70, n)), 150, 500).astype(np.int64)
    portrait = rng.random(n) < 0.5
    shapes = np.column_stack([np.where(portrait, 500, short), np.where(portrait, short, 500)])
    batches = same_shape_batches(shapes, arguments.batch_size)
    work = np.array([shapes[batch].prod(axis=1).sum() for batch in batches])
    images = np.array([len(batch) for batch in batches])
    rows = []
    for processes in arguments.processes:
        plain, dealt = (
            busiest_over_mean([int(work[share].sum()) for share in deal(by.tolist(), processes)])
            for by in (images, work)
        )
        rows.append([processes, plain, dealt, plain / dealt])
    show(
        f"balance over {n:,} images, {len(batches):,} batches of at most {arguments.batch_size}",
        ["processes", "busiest / mean, dealt by images", "metilr", "ratio"],
        [[row[0], *(f"{value:.4f}" for value in row[1:])] for row in rows],
        {
            "busiest_over_mean": {
                "plain": {str(row[0]): row[1] for row in rows}, "metilr": {str(row[0]): row[2] for row in rows},
            },
            "ratio": {str(row[0]): row[3] for row in rows},
        },
    )  # fmt: skip


def busiest_over_mean(loads: list[int]) -> float:
    """How long the busiest process takes, where 1 is perfectly even."""
    return max(loads) * len(loads) / sum(loads)


if __name__ == "__main__":
    main()
