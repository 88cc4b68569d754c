"""GAP, GAP⁻ and ACC: pure functions and torchmetrics classes side by side."""

from metilr.metrics.distributed import ACC, GAP, GAPMinus
from metilr.metrics.functional import DISTRACTOR, acc, gap, gap_bounds, gap_minus

__all__ = ["ACC", "DISTRACTOR", "GAP", "GAPMinus", "acc", "gap", "gap_bounds", "gap_minus"]
