"""Several processes of one training: failing together, and putting their tensors side by side."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed
from torch import Tensor
from torch.nn import functional as F

from metilr.errors import UserError
from metilr.process_faults import faults_in_one_line


@contextlib.contextmanager
def agree(trainer: pl.Trainer) -> Iterator[None]:
    """Let a user's mistake or a disk's fault that one process meets in the block end all of them.

    Without it the others would wait in their next collective for a process that is gone.

    Raises:
        UserError: In every process, the first one's message.
    """
    message = None
    try:
        with faults_in_one_line():
            yield
    except UserError as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename or 'disk'}: {error.strerror}"
    messages: list[str | None] = [message]
    if trainer.world_size > 1:
        messages = [None] * trainer.world_size
        torch.distributed.all_gather_object(messages, message)
    failed = [found for found in messages if found is not None]
    if failed:
        raise UserError(failed[0])


def gather_rows(module: pl.LightningModule, local: Tensor) -> Tensor:
    """Put the rows of all processes under each other, in the processes' order, with gradients.

    Each process then computes the same loss of the whole batch, of which it keeps the gradients of its own rows.
    DDP divides the sum over the processes by their number, so these are multiplied by it here: together the exact
    gradient of that one loss, for the weights of the loss itself as well.

    Args:
        module: Knows the processes.
        local: ``(n, ...)``; n may differ from process to process.

    Returns:
        ``(N, ...)``, N the sum of all n.
    """
    world_size, rank = module.trainer.world_size, module.trainer.global_rank
    if world_size == 1:
        return local
    counts: Any = module.all_gather(torch.tensor(len(local), device=local.device))
    counts = counts.tolist()
    # Collectives take equal shapes: fill up with rows that are cut off again.
    padding = [0, 0] * (local.ndim - 1) + [0, max(counts) - len(local)]
    gathered: Any = module.all_gather(F.pad(local.detach(), padding))
    if local.requires_grad:
        local.register_hook(lambda gradient: gradient * world_size)
    return torch.cat([local if i == rank else gathered[i, :count] for i, count in enumerate(counts)])


def hidden(trainer: pl.Trainer) -> bool | None:
    """What tqdm's ``disable`` takes: a bar in the first process, and there on a terminal alone."""
    return None if trainer.is_global_zero else True
