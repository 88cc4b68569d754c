"""Peak memory of a whole evaluation from a 397,121 x 2,048 descriptor store.

    python benchmarks/evaluation_memory.py [--rows 397121] [--width 2048] [--folder runs]

Makes a data root and a finished store of the Met's counts (3.4 GB on disk, removed at the end) and runs
`evaluate.py --descriptors STORE` on it: whitening, search, tuning, both splits, intervals, report. The plain way reads
all rows into memory, whitens them in float64, searches once, and stops there; it gives back what it no longer needs.
Prints the peak RssAnon of both (mapped files do not count), and of how many queries the nearest database image is the
same.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import faiss
import numpy as np
from measuring import Clock, PeakMemory, show
from met_sizes import CLASSES_PER_ROW, MET, QUERIES, ROWS
from whitening import DIM, plain_whitening, write_rows

from metilr.data.ground_truth import load_ground_truth
from metilr.extraction.store import DescriptorStore, RowWriter

REPOSITORY = Path(__file__).resolve().parents[1]


def make_root(root: Path, n_rows: int) -> None:
    """Ground truth of the Met's counts; no images."""
    rng = np.random.default_rng(0)
    n_classes = round(n_rows * CLASSES_PER_ROW)
    ids = np.concatenate([np.arange(n_classes), rng.integers(0, n_classes, n_rows - n_classes)])
    (root / "ground_truth").mkdir(parents=True)
    (root / "images").mkdir()
    database = [{"id": int(exhibit), "path": f"MET/{exhibit}/{i}.jpg"} for i, exhibit in enumerate(ids.tolist())]
    (root / "ground_truth/MET_database.json").write_text(json.dumps(database))
    for split, n in QUERIES.items():
        shown = rng.integers(0, n_classes, MET[split]).tolist()
        queries = [{"path": f"test_met/{split}{i}.jpg", "MET_id": exhibit} for i, exhibit in enumerate(shown)]
        queries += [{"path": f"test_noart/{split}{i}.jpg"} for i in range(n - MET[split])]
        (root / f"ground_truth/{split}set.json").write_text(json.dumps(queries))


def make_store(path: Path, root: Path, width: int) -> None:
    """A finished store of made-up unit rows."""
    truth = load_ground_truth(root)
    counts = {split: len(paths) for split, paths in truth.paths.items()}
    store = DescriptorStore(path)
    made_up = {"backbone": "made up", "image_size": None, "pooling": {"kind": "gem", "p": 3.0}, "precision": "32"}
    store.prepare({"ground_truth": dict(truth.digests), **made_up}, counts, width)
    with closing(RowWriter(store)) as writer:
        for split, n in counts.items():
            write_rows(path / f"{split}.npy", n, width)
            for i, row in enumerate(np.load(path / f"{split}.npy", mmap_mode="r")):
                writer.write(split, i, row, file_size=1)
    store.finish()


def plain_nearest(store: Path) -> dict[str, np.ndarray]:
    """By split, the nearest database row of each query."""
    mean, projection = plain_whitening(np.load(store / "database.npy"), DIM)

    def whitened(split: str) -> np.ndarray:
        centred = np.load(store / f"{split}.npy").astype(np.float64)  # read again rather than held in float32 as well
        centred -= mean
        projected = centred @ projection
        del centred
        projected /= np.linalg.norm(projected, axis=1, keepdims=True)
        return projected.astype(np.float32)

    index = faiss.IndexFlatIP(DIM)
    index.add(whitened("database"))
    return {split: index.search(whitened(split), 1)[1][:, 0] for split in QUERIES}


def nearest_paths(run: Path, split: str) -> list[str]:
    """As the run's predictions tell them."""
    with (run / "predictions" / f"{split}.csv").open(newline="") as stream:
        return [line["nearest_path"] for line in csv.DictReader(stream)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where the files are made and removed")
    arguments = parser.parse_args()
    arguments.folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        root, store = Path(folder) / "met", Path(folder) / "store"
        make_root(root, arguments.rows)
        make_store(store, root, arguments.width)
        command = [
            sys.executable, str(REPOSITORY / "evaluate.py"), "--root", str(root), "--descriptors", str(store),
            "--output", str(Path(folder) / "run"), "--wandb", "off", "--quiet", "true",
        ]  # fmt: skip
        clock = Clock()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process, PeakMemory(process.pid) as memory:
            while process.poll() is None:
                time.sleep(0.1)
        if process.returncode:
            sys.exit(f"evaluate.py failed with {process.returncode}")
        seconds = clock()
        with PeakMemory() as plain_memory:
            plain = plain_nearest(store)
        paths = np.array(load_ground_truth(root).paths["database"])
        same = np.concatenate(
            [np.array(nearest_paths(Path(folder) / "run", split)) == paths[rows] for split, rows in plain.items()]
        )
    show(
        f"memory of an evaluation, {arguments.rows:,} x {arguments.width:,}",
        ["way", "peak GB"],
        [
            ["all rows in memory, float64: whitening and one search", plain_memory.bytes / 1e9],
            ["metilr: the whole evaluation", memory.bytes / 1e9],
        ],
        {
            "ratio": plain_memory.bytes / memory.bytes,
            "same_nearest": float(same.mean()),
            "peak_bytes": {"plain": plain_memory.bytes, "metilr": memory.bytes},
            "seconds": seconds,
        },
    )


if __name__ == "__main__":
    main()
