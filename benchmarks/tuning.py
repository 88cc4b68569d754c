"""Choosing k and tau, and answering both splits, at the Met's full size, against the plain ways in the same run.

Synthetic descriptors of 512 dimensions: 397,121 database rows of 224,408 classes in clusters, 2,165 val and 19,319 test
queries, a tenth of which are noisy copies of a row (real descriptors cluster otherwise; what is measured is time, and
that the answers are equal). Two claims:

1. One search and a vectorised grid against an index, a search and a Python loop for each of the 108 grid points. Those
   take equally long for one k, and longer the larger it is: so whole --rounds over the 9 k, each with another tau, are
   run and counted for all.
2. `recognise`: unit rows, search, tuning, both splits' answers, figures and matches, against nothing but FAISS's exact
   search of both splits with as many neighbours.

    python benchmarks/tuning.py [--rounds 1] [--rows 397121]
"""

import argparse
import math
from types import SimpleNamespace
from typing import Any, cast

import faiss
import numpy as np
from measuring import Clock, PeakMemory, show
from met_sizes import CLASSES_PER_ROW, QUERIES, ROWS

from metilr.data.ground_truth import GroundTruth
from metilr.evaluation.options import MethodOptions
from metilr.evaluation.recognition import recognise
from metilr.extraction.descriptors import Descriptors
from metilr.retrieval.knn import K_GRID, TAU_GRID, tune
from metilr.retrieval.search import search

WIDTH = 512


def synthetic(n_rows: int, seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], int]:
    """Unit rows and labels by split, and the number of classes."""
    rng = np.random.default_rng(seed)
    n_classes = round(n_rows * CLASSES_PER_ROW)
    shown = np.concatenate([np.arange(n_classes), rng.integers(0, n_classes, n_rows - n_classes)])
    labels = {"database": shown}
    for split, n in QUERIES.items():
        labels[split] = np.where(rng.random(n) < 0.1, shown[rng.integers(0, n_rows, n)], -1)
    return made_up_rows(labels, n_classes, rng), labels, n_classes


def made_up_rows(
    labels: dict[str, np.ndarray], n_classes: int, rng: np.random.Generator, noise: tuple[float, float] = (2, 2)
) -> dict[str, np.ndarray]:
    """Unit rows by split; a class is a direction with noise about it, a query a row of its class with more ``noise``.

    That is drawn between two bounds: with 6 times a row's own, half of the queries are nearer to another row.
    """
    centres = rng.standard_normal((n_classes, WIDTH), dtype=np.float32)
    rows = {split: rng.standard_normal((len(of), WIDTH), dtype=np.float32) for split, of in labels.items()}
    rows["database"] += centres[labels["database"]]
    row_of = np.zeros(n_classes, dtype=np.int64)
    row_of[labels["database"]] = np.arange(len(rows["database"]))
    for split in QUERIES:
        is_met = labels[split] >= 0
        rows[split][is_met] *= rng.uniform(*noise, (is_met.sum(), 1)).astype(np.float32)
        rows[split][is_met] += rows["database"][row_of[labels[split][is_met]]]
    for split in rows:
        rows[split] /= np.linalg.norm(rows[split], axis=1, keepdims=True)
    return rows


def plain_grid_point(
    rows: dict[str, np.ndarray], labels: dict[str, np.ndarray], n_classes: int, k: int, tau: float
) -> float:
    """GAP on val by an index, a search and a loop, as the reference code does."""
    index = faiss.IndexFlatIP(WIDTH)
    index.add(rows["database"])
    similarities, found = index.search(rows["val"], k)
    answers = []
    for query in range(len(found)):
        best: dict[int, float] = {}
        for similarity, row in zip(similarities[query].tolist(), found[query].tolist(), strict=True):
            label = int(labels["database"][row])
            best[label] = max(similarity, best.get(label, -math.inf))
        label, similarity = max(best.items(), key=lambda item: (item[1], -item[0]))
        others = sum(math.exp(tau * (s - similarity)) for other, s in best.items() if other != label)
        others += (n_classes - len(best)) * math.exp(-tau * similarity)
        answers.append((-math.log1p(others), label == labels["val"][query]))  # a plain logarithm ties at large tau
    answers.sort(key=lambda answer: -answer[0])
    right, total = 0, 0.0
    for rank, (_, is_right) in enumerate(answers, start=1):
        right += is_right
        total += is_right * right / rank
    return total / int((labels["val"] >= 0).sum())


def spread_points(rounds: int) -> list[tuple[int, float]]:
    """Grid points spread over the grid, with each k equally often."""
    grid = [(k, tau) for k in K_GRID for tau in TAU_GRID]
    return [grid[round(i)] for i in np.linspace(0, len(grid) - 1, rounds * len(K_GRID))]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument(
        "--rounds", type=int, default=1, choices=range(1, len(TAU_GRID) + 1), help="over all k, of the plain way"
    )
    arguments = parser.parse_args()
    rows, labels, n_classes = synthetic(arguments.rows)

    points, n_grid = spread_points(arguments.rounds), len(K_GRID) * len(TAU_GRID)
    with PeakMemory() as plain_memory:
        clock = Clock()
        plain = {point: plain_grid_point(rows, labels, n_classes, *point) for point in points}
        plain_seconds = clock() * n_grid / len(points)
    with PeakMemory() as memory:
        clock = Clock()
        found = search(rows["database"], rows["val"], K_GRID[-1])
        tuning = tune(found, labels["database"], n_classes, labels["val"])
        seconds = clock()
    surface = {(k, tau): tuning.surface[i, j] for i, k in enumerate(K_GRID) for j, tau in enumerate(TAU_GRID)}
    difference = max(abs(plain[point] - surface[point]) for point in points)
    show(
        f"tuning on val, {arguments.rows:,} x {WIDTH}",
        ["way", "seconds for the grid", "added GB"],
        [
            [f"{len(points)} of {n_grid} points, counted for all", plain_seconds, plain_memory.added / 1e9],
            ["metilr", seconds, memory.added / 1e9],
        ],
        {"ratio": plain_seconds / seconds, "points": len(points), "largest_gap_difference": difference,
         "peak_added_bytes": {"plain": plain_memory.added, "metilr": memory.added}},
    )  # fmt: skip

    truth = cast(Any, SimpleNamespace(labels=labels, n_classes=n_classes))
    made = {split: np.ones(len(part), dtype=bool) for split, part in rows.items()}
    parts = {split: [part] for split, part in rows.items()}
    with PeakMemory() as memory:
        clock = Clock()
        recognition = recognise(Descriptors(parts, made, []), cast(GroundTruth, truth), MethodOptions("none"))
        seconds = clock()
    widths = {"val": K_GRID[-1], "test": max(20, recognition.k)}
    with PeakMemory() as plain_memory:
        clock = Clock()
        faiss_found = {
            split: faiss.knn(rows[split], rows["database"], widths[split], metric=faiss.METRIC_INNER_PRODUCT)
            for split in QUERIES
        }
        plain_seconds = clock()
    nearest = faiss_found["test"][1][:, 0]
    answered = recognition.answers["test"].nearest
    equal = (nearest == answered)[recognition.answers["test"].similarity > 0]
    show(
        f"tuning and both splits, {arguments.rows:,} x {WIDTH}",
        ["way", "seconds", "added GB"],
        [["FAISS's two searches alone", plain_seconds, plain_memory.added / 1e9],
         ["metilr, all of it", seconds, memory.added / 1e9]],
        {"seconds": seconds, "share_of_raw_searches": seconds / plain_seconds,
         "same_nearest": float(equal.mean()),
         "peak_added_bytes": {"plain": plain_memory.added, "metilr": memory.added}},
    )  # fmt: skip


if __name__ == "__main__":
    main()
