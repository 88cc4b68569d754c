"""GAP, GAP⁻ and ACC as torchmetrics: the same figures whatever the batches, their order and the processes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from metilr.errors import UserError
from metilr.metrics import functional

DTYPES = {"log_confidence": torch.float64, **dict.fromkeys(("predicted", "target", "index"), torch.int64)}  # of states
UNNUMBERED = -(2**62)  # from here on answers without positions are counted, in every batch


class AnswerMetric(Metric):
    """Answers gathered from all batches and processes, scored at the end by one function.

    Every query carries its position in the split. Answers are put in that order before they are scored, and a
    position that occurs twice counts once (a DistributedSampler pads with repeats), so that the value is that
    of the pure function on the whole split; NaN if no query shows an exhibit, as in a sanity check. Without
    positions a single update has all answers, in their order; what else comes is refused when it is scored. The
    metrics keep the same states: in a ``MetricCollection`` they form one compute group and store them once.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    log_confidence: list[Tensor] | Tensor
    predicted: list[Tensor] | Tensor
    target: list[Tensor] | Tensor
    index: list[Tensor] | Tensor
    _score: Callable[[Any, Any, Any], float]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in DTYPES:
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, log_confidence: Tensor, predicted: Tensor, target: Tensor, index: Tensor | None = None) -> None:
        """Add a batch of answers as `metilr.metrics.functional` takes, and their positions in the split; ``(B,)``."""
        if index is None:
            index = UNNUMBERED + torch.arange(len(log_confidence))
        batch = {"log_confidence": log_confidence, "predicted": predicted, "target": target, "index": index}
        if log_confidence.ndim != 1 or any(values.shape != log_confidence.shape for values in batch.values()):
            shapes = ", ".join(f"{name} {tuple(values.shape)}" for name, values in batch.items())
            raise ValueError(f"answers of a batch must be 1-D and of one length, not {shapes}")
        for name, values in batch.items():
            getattr(self, name).append(values.detach().to(self.device, DTYPES[name]))

    def compute(self) -> Tensor:
        """Return the metric over all distinct queries, a float64 scalar in [0, 1]."""
        self._fill_empty_states()
        states = [dim_zero_cat(getattr(self, name)).cpu().numpy() for name in DTYPES]
        log_confidence, predicted, target, index = states
        distinct, first = np.unique(index, return_index=True)
        is_numbered = index >= 0
        if not is_numbered.all() and (is_numbered.any() or len(distinct) < len(index)):
            what = "the order of the queries is not known, since there were several batches or processes"
            raise UserError(f"None: {what}; give each batch its queries' positions in the split", "index")
        target = target[first]
        if (target == functional.DISTRACTOR).all():
            return torch.tensor(torch.nan, dtype=torch.float64, device=self.device)
        score = type(self)._score(log_confidence[first], predicted[first], target)
        return torch.tensor(score, dtype=torch.float64, device=self.device)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the states of all processes."""
        # From a process without a query torchmetrics gathers an empty float32 tensor, where the others send
        # float64 and int64: the collective would fail or hang.
        self._fill_empty_states()
        super().sync(*args, **kwargs)

    def _fill_empty_states(self) -> None:
        for name, dtype in DTYPES.items():
            state = getattr(self, name)
            if isinstance(state, list) and not state:
                state.append(torch.empty(0, dtype=dtype, device=self.device))


class GAP(AnswerMetric):
    """Global average precision over all queries; see `metilr.metrics.functional.gap`."""

    _score = staticmethod(functional.gap)


class GAPMinus(AnswerMetric):
    """GAP over the queries that show an exhibit; see `metilr.metrics.functional.gap_minus`."""

    _score = staticmethod(functional.gap_minus)


class ACC(AnswerMetric):
    """Share of right labels among the queries that show an exhibit; see `metilr.metrics.functional.acc`."""

    _score = staticmethod(functional.acc)
