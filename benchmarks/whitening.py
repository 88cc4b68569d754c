"""Whitening learned in one pass over a mapped file of 397,121 x 2,048, against float64 in memory in the same run.

    python benchmarks/whitening.py [--rows 397121] [--width 2048] [--folder runs]

Writes the made-up descriptors to a file first (3.3 GB at full size) and removes it. The plain way holds all rows in
float64: 6.5 GB. Prints seconds, memory beyond the mapped file, and the largest difference of whitened rows.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from measuring import Clock, PeakMemory, show
from met_sizes import ROWS

from metilr.extraction.store import row_chunks
from metilr.retrieval.whitening import fit_pca_whitening

DIM = 512


def write_rows(file: Path, n: int, width: int) -> None:
    """Unit rows whose directions differ in variance, as descriptors' do; a block at a time."""
    rng = np.random.default_rng(0)
    spread = (1 + np.arange(width, dtype=np.float32)) ** -0.5
    rows = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=(n, width))
    for start in range(0, n, 8192):
        block = np.abs(rng.standard_normal((min(8192, n - start), width), dtype=np.float32)) * spread
        rows[start : start + len(block)] = block / np.linalg.norm(block, axis=1, keepdims=True)
    rows.flush()


def plain_whitening(rows: np.ndarray, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and projection as the formula says, everything in float64 in memory."""
    centred = rows.astype(np.float64)
    mean = centred.mean(axis=0)
    centred -= mean
    eigenvalues, eigenvectors = np.linalg.eigh(centred.T @ centred / len(rows))
    return mean, eigenvectors[:, ::-1][:, :dim] / np.sqrt(eigenvalues[::-1][:dim])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where the file is made and removed")
    arguments = parser.parse_args()
    arguments.folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        file = Path(folder) / "rows.npy"
        write_rows(file, arguments.rows, arguments.width)
        rows = np.load(file, mmap_mode="r")
        with PeakMemory() as memory:
            clock = Clock()
            every = np.ones(len(rows), dtype=bool)
            whitening = fit_pca_whitening(row_chunks([rows], every), DIM)
            seconds = clock()
        with PeakMemory() as plain_memory:
            clock = Clock()
            mean, projection = plain_whitening(rows, DIM)
            plain_seconds = clock()
        sample = rows[:: max(1, len(rows) // 2000)].astype(np.float64)
        ours = (sample - whitening.mean) @ whitening.projection
        theirs = (sample - mean) @ projection
        theirs *= np.sign((ours * theirs).sum(axis=0))  # an eigenvector has no sign
        norms = np.linalg.norm(theirs, axis=1, keepdims=True)
        difference = float((np.abs(ours - theirs) / norms).max())
    show(
        f"whitening fit, {arguments.rows:,} x {arguments.width:,}",
        ["way", "seconds", "added GB"],
        [
            ["float64 in memory", plain_seconds, plain_memory.added / 1e9],
            ["metilr, one pass", seconds, memory.added / 1e9],
        ],
        {
            "ratio": plain_seconds / seconds,
            "largest_difference_of_unit_rows": difference,
            "peak_added_bytes": {"plain": plain_memory.added, "metilr": memory.added},
        },
    )


if __name__ == "__main__":
    main()
