"""The optimizer of a training: a learning rate for each part of the model, and the schedule."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from metilr.models.embedder import Embedder
from metilr.training import FineTuningOptions

Steps = Callable[[], tuple[int, int]]  # of the optimizer, in an epoch and in the whole training


def optimizers_of(
    options: FineTuningOptions, embedder: Embedder, loss: nn.Module | None, classifier: nn.Module | None,
    steps: Steps | None,
) -> dict[str, Any]:  # fmt: skip
    """Give backbone, p, projector with the loss, and a classifier a learning rate each, as Lightning takes it.

    ``steps`` tells how many there are; None for a constant schedule.
    """
    lr_projector, lr_p = (options.lr if lr is None else lr for lr in (options.lr_projector, options.lr_p))
    lr_classifier = lr_projector if options.lr_classifier is None else options.lr_classifier
    groups: list[dict[str, Any]] = [
        {"name": "backbone", "params": [embedder.backbone], "lr": options.lr},
        {"name": "p", "params": [embedder.pooling], "lr": lr_p, "weight_decay": 0.0},
        {"name": "projector", "params": [embedder.projector, loss], "lr": lr_projector},
        {"name": "classifier", "params": [classifier], "lr": lr_classifier},
    ]
    for group in groups:
        parameters = [each for part in group["params"] if part is not None for each in part.parameters()]
        group["params"] = [each for each in parameters if each.requires_grad]
    kind = torch.optim.AdamW if options.optimizer == "adamw" else torch.optim.Adam
    optimizer = kind([each for each in groups if each["params"]], lr=options.lr, weight_decay=options.weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(learning_rate_factor, options, steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def learning_rate_factor(options: FineTuningOptions, steps: Steps | None, step: int) -> float:
    """What the learning rates are multiplied by at an optimizer step."""
    if step < options.warmup_steps:
        return (step + 1) / options.warmup_steps
    if steps is None:
        return 1.0
    steps_per_epoch, total = steps()
    if options.schedule == "step":
        return float(0.1 ** (step // steps_per_epoch // options.step_epochs))
    done = (step - options.warmup_steps) / max(1, total - options.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
