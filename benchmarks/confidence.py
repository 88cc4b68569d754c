"""The calibrated confidence at the Met's full size, against the exact searches of val and test in the same run.

    python benchmarks/confidence.py --root DIR [--rows 397121]

Takes queries and photographers from the mini ground truth of DIR (images are not needed): val's 2,036 distractors are
the background. Descriptors of 512 dimensions are made up, and so are exhibits beyond the mini database's until there
are --rows. Some queries are too noisy to be found, so that there is something to fit. Prints the searches' part of
`recognise`, and `calibrate_recognition`, which is all that the confidence takes beside; processor time too, for busy
machines.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from measuring import Clock, PeakMemory, show
from met_sizes import CLASSES_PER_ROW, ROWS
from tuning import WIDTH, made_up_rows

from metilr.data.ground_truth import QUERY_FILES, GroundTruth, load_ground_truth
from metilr.evaluation.calibration import calibrate_recognition
from metilr.evaluation.options import MethodOptions
from metilr.evaluation.recognition import recognise
from metilr.extraction.descriptors import Descriptors
from metilr.retrieval.search import search

NOISE = (2, 8)  # a third of the queries that show an exhibit are nearer to another one


def enlarged(truth: GroundTruth, n_rows: int, rng: np.random.Generator) -> GroundTruth:
    """Put made-up exhibits after those of the database until it has so many rows."""
    given = truth.labels["database"]
    n_classes = max(truth.n_classes, round(n_rows * CLASSES_PER_ROW))
    every = np.arange(truth.n_classes, n_classes)
    drawn = rng.integers(0, n_classes, max(0, n_rows - len(given) - len(every)))
    labels = {**truth.labels, "database": np.concatenate([given, every, drawn])}
    return replace(truth, labels=labels, exhibit_ids=np.arange(n_classes))


class Timed:
    """A function, and how long its calls have taken together."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.seconds = self.processor_seconds = 0.0

    def __call__(self, *args: Any) -> Any:
        """Call and time it."""
        clock, start = Clock(), time.process_time()
        result = self.function(*args)
        self.seconds += clock()
        self.processor_seconds += time.process_time() - start
        return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=ROWS)
    arguments = parser.parse_args()
    rng, method = np.random.default_rng(0), MethodOptions("none")
    truth = enlarged(load_ground_truth(arguments.root, "mini"), arguments.rows, rng)
    rows = made_up_rows(dict(truth.labels), truth.n_classes, rng, NOISE)
    is_valid = {split: np.ones(len(part), dtype=bool) for split, part in rows.items()}
    descriptors = Descriptors({split: [part] for split, part in rows.items()}, is_valid, [])

    searches, calibrate = Timed(search), Timed(calibrate_recognition)
    with patch("metilr.evaluation.database.search", searches), PeakMemory() as search_memory:
        recognition = recognise(descriptors, truth, method)
    with PeakMemory() as memory:
        calibrated, fit = calibrate(recognition, descriptors, truth, method)
    same = [(calibrated.answers[split].labels == recognition.answers[split].labels).mean() for split in QUERY_FILES]
    show(
        f"calibrated confidence, {len(rows['database']):,} x {WIDTH}",
        ["what", "seconds", "processor seconds", "added GB"],
        [["exact searches of val and test", searches.seconds, searches.processor_seconds, search_memory.added / 1e9],
         ["calibrated confidence", calibrate.seconds, calibrate.processor_seconds, memory.added / 1e9]],
        {"share_of_searches": calibrate.seconds / searches.seconds,
         "share_of_processor_time": calibrate.processor_seconds / searches.processor_seconds,
         "queries": sum(len(rows[split]) for split in QUERY_FILES), "background": fit.n_background if fit else None,
         "val_gap": {"plain": fit.plain_gap, "calibrated": fit.calibrated_gap} if fit else None,
         "same_labels": float(min(same)),
         "peak_added_bytes": {"recognise": search_memory.added, "calibration": memory.added}},
    )  # fmt: skip


if __name__ == "__main__":
    main()
