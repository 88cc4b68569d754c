"""Paired differences of runs: the same queries, answered by two runs, on the same resamples."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from metilr.data.ground_truth import NOT_NAMED, QUERY_FILES, GroundTruth, load_ground_truth
from metilr.demo import DEMO
from metilr.errors import UserError
from metilr.evaluation.results import LEVEL, UNITS, Data
from metilr.evaluation.runs import Run
from metilr.metrics.bootstrap import Difference, paired_intervals, resampling_units


@dataclass(frozen=True)
class PairedDifferences:
    """How much better a run is than the baseline on one split.

    Attributes:
        split: val or test.
        differences: By unit of the resampling, from the most honest one, and by metric.
        left_out: Why there are none; None if there are.
    """

    split: str
    differences: Mapping[str, Mapping[str, Difference]]
    left_out: str | None = None


def paired_differences(
    baseline: Run, run: Run, photographers: Mapping[str, np.ndarray] | None
) -> list[PairedDifferences]:
    """Compare a run with the baseline on val and on test, wherever both answered the same queries.

    Args:
        baseline: The first run.
        run: The second; differences are second minus first.
        photographers: Who took each query, by split; None where that is not known.
    """
    compared = []
    for split in QUERY_FILES:
        first, second = baseline.answers[split], run.answers[split]
        same = first.paths == second.paths and np.array_equal(first.exhibit_ids, second.exhibit_ids)
        if not same:
            compared.append(PairedDifferences(split, {}, "measured on other queries"))
            continue
        target = first.exhibit_ids
        taken_by = np.full(len(target), NOT_NAMED) if photographers is None else photographers[split]
        units = resampling_units(target, taken_by)
        before, after = ((answers.log_confidence, answers.predicted_ids) for answers in (first, second))
        differences = {
            unit: paired_intervals(before, after, target, units[unit], level=LEVEL) for unit in UNITS if unit in units
        }
        left_out = None if differences else "too few met queries for an interval"
        compared.append(PairedDifferences(split, differences, left_out))
    return compared


def photographers_of(run: Run) -> Mapping[str, np.ndarray] | None:
    """Who took the queries, from the ground truth where the run found it; None if that is gone or has changed."""
    root = run.config.get("root")
    folder = Path(run.results.directory) / DEMO if root is None else Path(root)
    ground_truth = _ground_truth(folder, run.results.data)
    return None if ground_truth is None else ground_truth.photographers


def _ground_truth(root: Path, data: Data) -> GroundTruth | None:
    try:
        found = load_ground_truth(root, data.database)
    except UserError:
        return None
    return found if found.fingerprint() == data.fingerprint else None
