"""GAP, GAP⁻ and ACC: pure functions and torchmetrics classes side by side; recall and mAP as functions.

The functions are those of `metilr.metrics.functional`, the classes those of `metilr.metrics.torchmetrics`. What else
the confidence is good for: `metilr.metrics.open_set`.
"""

from typing import TYPE_CHECKING, Any

from metilr.metrics.functional import DISTRACTOR, acc, gap, gap_bounds, gap_minus, mean_average_precision, recall_at

if TYPE_CHECKING:
    from metilr.metrics.torchmetrics import ACC, GAP, GAPMinus

__all__ = [
    "ACC",
    "DISTRACTOR",
    "GAP",
    "GAPMinus",
    "acc",
    "gap",
    "gap_bounds",
    "gap_minus",
    "mean_average_precision",
    "recall_at",
]


def __getattr__(name: str) -> Any:
    # torchmetrics takes seconds to import (it brings torchvision), and scoring arrays does not need it.
    if name in ("ACC", "GAP", "GAPMinus"):
        from metilr.metrics import torchmetrics

        return getattr(torchmetrics, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
