"""What else the answers say besides GAP, GAP⁻ and ACC: intervals, open-set figures, and a threshold from val."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from metilr.data.ground_truth import NOT_NAMED, QUERY_FILES, GroundTruth
from metilr.intervals import N_RESAMPLES, intervals, resampling_units
from metilr.metrics import DISTRACTOR
from metilr.metrics.open_set import OperatingPoint, open_set_figures, threshold_for_precision
from metilr.recognition import Recognition

LEVEL = 0.95  # of the intervals
MIN_PRECISION = 0.9  # of the accepted answers on val, where nothing else is asked for
FEW_ACCEPTED = 20  # answers: one more or less that is wrong moves their precision by 5 points
UNITS = ("photographers", "classes", "queries")  # not every museum has all


def further_figures(ground_truth: GroundTruth, recognition: Recognition, seed: int = 0) -> dict[str, Any]:
    """Compute what ``results.json`` says beyond the headline figures.

    Args:
        ground_truth: Knows what each query shows, who took it, and how many images an exhibit has.
        recognition: Knows what was answered.
        seed: Of the bootstrap.

    Returns:
        ``bootstrap`` (how the intervals were made), ``threshold`` (chosen on val for MIN_PRECISION, and what it
        gives on both splits), and for val and test ``intervals`` (by unit and metric) and ``open_set``.
    """
    arguments = {
        split: (answers.log_confidence, answers.labels, ground_truth.labels[split])
        for split, answers in recognition.answers.items()
    }
    point = threshold_for_precision(*arguments["val"], MIN_PRECISION)
    figures: dict[str, Any] = {
        "bootstrap": {"resamples": N_RESAMPLES, "level": LEVEL, "seed": seed},
        "threshold": {
            "min_precision": MIN_PRECISION,
            "chosen_on": "val",
            "log_confidence": None if point is None else point.threshold,
            "splits": {split: _at_threshold(*arguments[split], point) for split in QUERY_FILES},
        },
    }
    for split in QUERY_FILES:
        labels = ground_truth.labels[split]
        photographers = ground_truth.photographers.get(split, np.full(len(labels), NOT_NAMED))
        figures[split] = {
            "intervals": {
                unit: {
                    metric: list(interval)
                    for metric, interval in intervals(*arguments[split], units, seed=seed, level=LEVEL).items()
                }
                for unit, units in resampling_units(labels, photographers).items()
            },
            "open_set": open_set_figures(*arguments[split], ground_truth.kinds(split), ground_truth.class_sizes()),
        }
    return figures


def headline_unit(results: Mapping[str, Any]) -> str | None:
    """The unit of the intervals to show beside the figures: the one with the widest for GAP on test.

    Of those that both splits have; None without any. A few photographers, or two who took most photos, give
    intervals that are too narrow.
    """
    units = [unit for unit in UNITS if all(unit in results[split]["intervals"] for split in QUERY_FILES)]

    def width(unit: str) -> float:
        low, high = results["test"]["intervals"][unit]["gap"]
        return float(high - low)

    return max(units, key=width, default=None)


def _at_threshold(
    log_confidence: np.ndarray, predicted: np.ndarray, target: np.ndarray, point: OperatingPoint | None
) -> dict[str, float | int | None] | None:
    if point is None:
        return None
    accepted, is_met = log_confidence >= point.threshold, target != DISTRACTOR
    right = accepted & is_met & (predicted == target)
    return {
        "n_accepted": int(accepted.sum()),
        "precision": float(right.sum() / accepted.sum()) if accepted.any() else None,
        "recall": float(right.sum() / is_met.sum()),
        "false_alarms": float((accepted & ~is_met).sum() / (~is_met).sum()) if (~is_met).any() else None,
    }
