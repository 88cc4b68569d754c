"""The published contrastive loss; all others come from pytorch-metric-learning, by class path, and are tried first."""

import copy
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metilr.errors import UserError, one_line
from metilr.models import RANDOM
from metilr.training import FineTuningOptions
from metilr.training.datamodule import PairDataModule


class ContrastiveLoss(nn.Module):
    """Contrastive loss of pairs: ½ d² for positives, ½ max(0, margin − d)² for negatives; the mean over pairs.

    d² is the squared Euclidean distance of embeddings ``(P, D)``, of unit length and so at most 2 apart; in the hinge
    d = √(d² + 1e-9), whose gradient is finite where the two are equal. ``positive`` says which pairs show one exhibit.

    Source: Hadsell et al., CVPR 2006, as used by Ypsilantis et al., NeurIPS 2021 (margin 1.8). Differs from
    pytorch-metric-learning's ``ContrastiveLoss`` in the square, the ½ and in taking given pairs.
    """

    def __init__(self, margin: float = 1.8) -> None:
        super().__init__()
        if not margin > 0:
            raise UserError(f"{margin}: choose a number above 0", "margin")
        self.margin = margin

    def forward(self, first: Tensor, second: Tensor, positive: Tensor) -> Tensor:
        """Return the loss of pairs, a scalar, computed in float32."""
        squared = (first.float() - second.float()).pow(2).sum(dim=1)
        hinge = (self.margin - torch.sqrt(squared + 1e-9)).clamp(min=0)
        return torch.where(positive, 0.5 * squared, 0.5 * hinge.pow(2)).mean()


def record_of(loss: nn.Module | None) -> dict[str, Any] | None:
    """Say in plain values which loss a training had; of those that are not the published one, the class alone."""
    if loss is None:
        return None
    arguments = {"init_args": {"margin": loss.margin}} if isinstance(loss, ContrastiveLoss) else {}
    return {"class_path": f"{type(loss).__module__}.{type(loss).__qualname__}", **arguments}


def recorded_options(content: Mapping[str, Any], path: Path, changes: Mapping[str, Any]) -> FineTuningOptions:
    """The options of a training that its checkpoint at ``path`` records, but for ``changes``; weights are in there."""
    known = {field.name for field in fields(FineTuningOptions)}
    try:
        recorded = content["metilr"]["config"]["model"]
        options = {name: value for name, value in recorded.items() if name in known}
        options |= {"weights": RANDOM, "scales": tuple(options["scales"])}
    except (TypeError, LookupError, AttributeError):
        raise UserError(f"{path}: was not written by a training of metilr; open it with metilr.load") from None
    if "loss" not in changes:
        options["loss"] = recorded_loss(options.get("loss"))
    return FineTuningOptions(**{**options, **changes})


def recorded_loss(recorded: Mapping[str, Any] | None) -> nn.Module | None:
    """Build a loss again as a checkpoint describes it; UserError if that takes more than a class known here.

    A checkpoint may be somebody else's: no class is imported because a file names it.
    """
    from pytorch_metric_learning import losses

    if recorded is None:
        return None
    path, arguments = str(recorded.get("class_path")), recorded.get("init_args")  # these of metilr train alone
    module, _, name = path.rpartition(".")
    known = {"pytorch_metric_learning.losses": getattr(losses, name, None), __name__: ContrastiveLoss}.get(module)
    is_plain = isinstance(arguments, dict) and not any(isinstance(each, dict) for each in arguments.values())
    if isinstance(known, type) and issubclass(known, nn.Module) and is_plain:
        return known(**dict(arguments or {}))
    raise UserError(f"was trained with {name}: give it, as load_from_checkpoint(PATH, loss={name}(...))", "loss")


def check_loss(loss: nn.Module, dim: int, data: PairDataModule) -> None:
    """Refuse a loss that some batch leaves no negative, or whose own weights do not fit, by trying a copy of it."""
    if lacks_negatives(loss, data.n_pairs // data.n_batches):
        what = f"{data.n_pairs} pairs in {data.n_batches} batches leave one with a single pair"
        why = f"in which {type(loss).__name__} has no negative; choose 2 or more, or one that leaves more"
        raise UserError(f"{data.options.batch_pairs}: {what}, {why}", "batch_pairs")
    if isinstance(loss, ContrastiveLoss):
        return
    n_classes = data.ground_truth.n_classes
    device = next(iter(loss.parameters()), torch.empty(0)).device
    labels = torch.tensor([0, 0, n_classes - 1, n_classes - 1], device=device)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            copy.deepcopy(loss)(torch.eye(4, dim, device=device), labels)
    except (RuntimeError, ValueError, IndexError, AssertionError, TypeError) as error:
        what = f"this model's embeddings of size {dim} and labels of {n_classes} classes ({one_line(error)})"
        remedy = "check its embedding_size and num_classes, if it has them"
        raise UserError(f"{type(loss).__name__}: does not take {what}; {remedy}", "loss") from None


def lacks_negatives(loss: nn.Module, n_pairs: int) -> bool:
    """Whether a batch of so many pairs gives a loss nothing to keep apart: its batch is all it has, or classes too."""
    has_classes = any(parameter.ndim > 1 for parameter in loss.parameters())  # ArcFace's, a proxy's
    return n_pairs < 2 and not has_classes and not isinstance(loss, ContrastiveLoss)


def loss_of_pairs(
    loss: nn.Module, first: Tensor, second: Tensor, positive: Tensor, labels: tuple[Tensor, Tensor]
) -> Tensor:
    """Loss of pairs ``(P, D)``: the published one takes them as they are, others all embeddings with their classes."""
    if isinstance(loss, ContrastiveLoss):
        return loss(first, second, positive)
    return loss(torch.cat([first, second]), torch.cat(labels))


def pair_figures(
    loss: nn.Module | None, first: Tensor, second: Tensor, positive: Tensor, labels: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    """Figures of a batch ``(P, D)`` beside its loss: mean similarities of one exhibit's views and of two exhibits'."""
    figures = {}
    if isinstance(loss, ContrastiveLoss):  # pairs count, else all combinations
        similarities, shared = (first * second).sum(dim=1), positive
        if not positive.all():  # the share of negatives that cost something
            distances = (first.float() - second.float()).norm(dim=1)[~positive]
            figures["active_hinges"] = (distances < loss.margin).float().mean()
    else:
        similarities, shared = first @ second.T, labels[0][:, None] == labels[1][None, :]
    for name, values in (("positive", similarities[shared]), ("negative", similarities[~shared])):
        if len(values):
            figures[f"{name}_similarity"] = values.mean()
    return figures


def gather_rows(module: pl.LightningModule, local: Tensor) -> Tensor:
    """Gather the rows of all processes in order, ``(n, ...)`` of each to ``(N, ...)``, with gradients.

    Each process then computes the same loss of the whole batch, of which it keeps the gradients of its own rows.
    DDP divides the sum over the processes by their number, so these are multiplied by it here: together the exact
    gradient of that one loss, for the weights of the loss itself as well.
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
