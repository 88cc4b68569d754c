"""The published contrastive loss; all others come from pytorch-metric-learning, by class path, and are tried first."""

import copy

import torch
from torch import Tensor, nn

from metilr.errors import UserError, one_line


class ContrastiveLoss(nn.Module):
    """Contrastive loss of pairs: ½ d² for positives, ½ max(0, margin − d)² for negatives; the mean over pairs.

    d² is the squared Euclidean distance; in the hinge d = √(d² + 1e-9), whose gradient is finite where the two
    embeddings are equal. Computed in float32. ``first`` and ``second`` are embeddings ``(P, D)``, ``positive`` says
    whether a pair shows the same exhibit, bool ``(P,)``.

    Args:
        margin: Negatives farther apart than this cost nothing; unit vectors are at most 2 apart.

    Raises:
        UserError: If the margin is not above 0.

    Source: Hadsell et al., CVPR 2006, as used by Ypsilantis et al., NeurIPS 2021 (margin 1.8). Differs from
    pytorch-metric-learning's ``ContrastiveLoss`` in the square, the ½ and in taking given pairs.
    """

    def __init__(self, margin: float = 1.8) -> None:
        super().__init__()
        if not margin > 0:
            raise UserError(f"{margin}: choose a number above 0", "margin")
        self.margin = margin

    def forward(self, first: Tensor, second: Tensor, positive: Tensor) -> Tensor:
        """Return the loss of pairs, a float32 scalar."""
        squared = (first.float() - second.float()).pow(2).sum(dim=1)
        hinge = (self.margin - torch.sqrt(squared + 1e-9)).clamp(min=0)
        return torch.where(positive, 0.5 * squared, 0.5 * hinge.pow(2)).mean()

    def active(self, first: Tensor, second: Tensor, positive: Tensor) -> Tensor:
        """Share of the negatives that cost something, a scalar in [0, 1]; NaN without negatives."""
        distances = (first.float() - second.float()).norm(dim=1)[~positive]
        return (distances < self.margin).float().mean()


def check_loss(loss: nn.Module, dim: int, n_classes: int) -> None:
    """Refuse a loss whose own weights fit neither the embeddings nor the data, by trying a copy of it."""
    if isinstance(loss, ContrastiveLoss):
        return
    device = next(iter(loss.parameters()), torch.empty(0)).device
    labels = torch.tensor([0, 0, n_classes - 1, n_classes - 1], device=device)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            copy.deepcopy(loss)(torch.eye(4, dim, device=device), labels)
    except (RuntimeError, ValueError, IndexError, AssertionError, TypeError) as error:
        raise UserError(
            f"{type(loss).__name__}: does not take this model's embeddings of size {dim} and labels of {n_classes} "
            f"classes ({one_line(error)}); check its embedding_size and num_classes, if it has them", "loss"
        ) from None  # fmt: skip


def pair_figures(
    loss: nn.Module, first: Tensor, second: Tensor, positive: Tensor, labels: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    """Figures of a batch ``(P, D)`` beside its loss: mean similarities of one exhibit's views and of two exhibits'."""
    figures = {}
    if isinstance(loss, ContrastiveLoss):  # pairs count, else all combinations
        similarities, shared = (first * second).sum(dim=1), positive
        if not positive.all():
            figures["active_hinges"] = loss.active(first, second, positive)
    else:
        similarities, shared = first @ second.T, labels[0][:, None] == labels[1][None, :]
    for name, values in (("positive", similarities[shared]), ("negative", similarities[~shared])):
        if len(values):
            figures[f"{name}_similarity"] = values.mean()
    return figures
