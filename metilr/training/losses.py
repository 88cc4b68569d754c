"""The published contrastive loss. All other losses come from pytorch-metric-learning, by class path."""

import torch
from torch import Tensor, nn

from metilr.errors import UserError


class ContrastiveLoss(nn.Module):
    """Contrastive loss of pairs: ½ d² for positives, ½ max(0, margin − d)² for negatives; the mean over pairs.

    d² is the squared Euclidean distance; in the hinge d = √(d² + 1e-9), whose gradient is finite where the two
    embeddings are equal. Computed in float32.

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
            raise UserError(f"ContrastiveLoss: margin {margin} must be above 0")
        self.margin = margin

    def forward(self, first: Tensor, second: Tensor, positive: Tensor) -> Tensor:
        """Return the loss of pairs.

        Args:
            first: Embeddings, ``(P, D)``.
            second: Embeddings, ``(P, D)``.
            positive: Whether a pair shows the same exhibit, bool ``(P,)``.

        Returns:
            Scalar, float32.
        """
        squared = (first.float() - second.float()).pow(2).sum(dim=1)
        hinge = (self.margin - torch.sqrt(squared + 1e-9)).clamp(min=0)
        return torch.where(positive, 0.5 * squared, 0.5 * hinge.pow(2)).mean()

    def active(self, first: Tensor, second: Tensor, positive: Tensor) -> Tensor:
        """Share of the negatives that cost something, a scalar in [0, 1]; NaN without negatives.

        Args:
            first: Embeddings, ``(P, D)``.
            second: Embeddings, ``(P, D)``.
            positive: Whether a pair shows the same exhibit, bool ``(P,)``.
        """
        distances = (first.float() - second.float()).norm(dim=1)[~positive]
        return (distances < self.margin).float().mean()
