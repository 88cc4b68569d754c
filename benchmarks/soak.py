"""An evaluation of the mini Met's size from made-up images, killed on the way: is its memory flat, is all there?

    python benchmarks/soak.py [--share 1.0] [--folder runs/soak] [--plot FILE] [options of evaluate.py]

Makes 38,307 database images and 2,165 and 19,319 queries of some 650 shapes (once; the museum stays in the folder) and
runs `evaluate.py` on them as a user would. It is killed (kill -9) at two seeded numbers of images in the first third,
and when all are described and the figures are being computed; the same command continues. Memory, open files and
threads of the command and of the processes that it starts are read from /proc every second. They are flat if neither
the least-squares slope over the images after the warm-up, extrapolated to all images, nor the difference between the
last and the first tenth exceeds the limit in the table. Exit status 1 if not, or if a row or a figure is missing.
"""

import argparse
import csv
import itertools
import json
import os
import random
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from soaking import Attempt, attempt, report

from metilr.data.ground_truth import GroundTruth, load_ground_truth
from metilr.extraction.store import SPLITS, DescriptorStore, has_unit_length
from metilr.report.published import MET_COUNTS, MET_QUERIES

REPOSITORY = Path(__file__).resolve().parents[1]
# All images have nearly the same area. Batches come the largest first: if later ones needed less memory, this would
# hide what is not given back.
HEIGHTS, AREA = (96, 171), 128**2
PATTERN = 8  # squares a side, in the exhibit's colours, smoothly enlarged


def make_museum(root: Path, share: float) -> Path:
    """Make a data root of a share of the mini Met's counts, ground truth last; one that has it is left as it is."""
    if (root / "ground_truth").exists():
        return root
    rng = np.random.default_rng(0)
    counts = {name: max(1, round(n * share)) for name, n in (MET_COUNTS["mini"] | MET_QUERIES).items()}
    n_exhibits = counts["exhibits"]
    shown = [*range(n_exhibits), *rng.integers(0, n_exhibits, counts["database_images"] - n_exhibits).tolist()]
    truth = {"mini_MET_database": [{"id": id_, "path": f"MET/{id_}/{i}.jpg"} for i, id_ in enumerate(shown)]}
    for split in ("val", "test"):
        ids = rng.integers(0, n_exhibits, counts[f"{split}_met"]).tolist()
        met = [{"path": f"test_met/{split}{i}.jpg", "MET_id": id_} for i, id_ in enumerate(ids)]
        others = range(len(met), counts[f"{split}_queries"])
        truth[f"{split}set"] = [*met, *({"path": f"test_noart/{split}{i}.jpg"} for i in others)]
    for i, entry in enumerate(entry for entries in truth.values() for entry in entries):
        exhibit = entry.get("id", entry.get("MET_id"))
        colours = np.random.default_rng([1, i] if exhibit is None else [0, exhibit])
        pattern = colours.uniform(0, 255, (PATTERN, PATTERN, 3)) + rng.normal(0, 12, (PATTERN, PATTERN, 3))
        height = int(rng.integers(*HEIGHTS))
        size = round(AREA * rng.uniform(0.97, 1.03) / height), height
        file = root / "images" / entry["path"]
        file.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(np.clip(pattern, 0, 255).astype(np.uint8))
        image.resize(size, Image.Resampling.BICUBIC).save(file, quality=85)
    unfinished = root / "ground_truth_unfinished"
    unfinished.mkdir(exist_ok=True)
    for name, entries in truth.items():
        (unfinished / f"{name}.json").write_text(json.dumps(entries))
    unfinished.rename(root / "ground_truth")
    return root


def n_described(store: Path) -> int:
    """Rows that a store holds so far."""
    n = 0
    for split in SPLITS:
        try:
            n += int(np.count_nonzero(np.load(store / f"{split}.files.npy", mmap_mode="r")))
        except (OSError, ValueError):  # not there yet
            continue
    return n


def faults(attempts: list[Attempt], truth: GroundTruth, store: Path, output: Path) -> list[str]:
    """What is wrong with the outcome."""
    n_images = sum(map(len, truth.paths.values()))
    found = [f"a run ended with status {lived.status}" for lived in attempts if lived.status not in (0, -9)]
    done = [sample.done for lived in attempts for sample in lived.samples]
    if any(after < before for before, after in itertools.pairwise(done)):
        found.append("described rows were lost")
    if not (output / "results.json").exists():
        return [*found, f"no results: the last run ended with status {attempts[-1].status}"]
    rows = DescriptorStore(store)
    n_rows = sum(int(has_unit_length(rows.descriptors(split)).sum()) for split in SPLITS)
    if n_rows != n_images or not rows.is_complete:
        found.append(f"the store holds {n_rows:,} of {n_images:,} rows")
    results = json.loads((output / "results.json").read_text())
    for split in truth.query_splits:
        with (output / "predictions" / f"{split}.csv").open(newline="") as stream:
            counts = len(list(csv.DictReader(stream))), results[split]["n_queries"], results[split]["n_met"]
        if counts != (len(truth.paths[split]), len(truth.paths[split]), truth.n_met(split)):
            found.append(f"{split}: lines of predictions, n_queries and n_met are {counts}")
    return found


def run_to_the_end(root: Path, run: Path, truth: GroundTruth, n_kills: int, options: Sequence[str]) -> list[Attempt]:
    """Evaluate; killed at n numbers of images in the first third, and when all are described.

    ``run`` is a folder, which gets ``log``, ``store`` and ``out``; options are those of evaluate.py.
    """
    command = [
        sys.executable, str(REPOSITORY / "evaluate.py"), "--root", str(root), "--database", "mini",
        "--store", str(run / "store"), "--output", str(run / "out"), "--wandb", "off", "--quiet", "true", *options,
    ]  # fmt: skip
    n_images = sum(map(len, truth.paths.values()))
    drawn = random.Random(0)
    kills = sorted(drawn.randrange(1, n_images // 3) for _ in range(n_kills))
    os.environ["PYTHONPATH"] = str(REPOSITORY)
    attempts = []
    for kill_at in (*kills, n_images, None):
        attempts.append(attempt(command, run / "log", lambda: n_described(run / "store"), kill_at))
        if (run / "out/results.json").exists():  # a small run can finish before it is seen to be all described
            break
    return attempts


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of all images and queries, for a quick run")
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"), help="where the museum and the run are made")
    parser.add_argument("--plot", type=Path, help="draw the memory over the images into this file")
    arguments, options = parser.parse_known_args()
    root = make_museum(arguments.folder / f"museum-{arguments.share:g}", arguments.share)
    run = arguments.folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    truth = load_ground_truth(root, "mini")
    attempts = run_to_the_end(root, run, truth, 2, options)
    found = faults(attempts, truth, run / "store", run / "out")
    print((run / "log").read_text())
    n_images = sum(map(len, truth.paths.values()))
    sys.exit(report("an evaluation of the mini Met's size", n_images, attempts, found, arguments.plot))


if __name__ == "__main__":
    main()
