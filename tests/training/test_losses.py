"""The contrastive loss at angles whose distances are known by hand."""

import math

import pytest
import torch
from pytorch_metric_learning import losses

from metilr.errors import UserError
from metilr.training.losses import ContrastiveLoss, pair_figures


def at(*degrees: float) -> torch.Tensor:
    return torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])


@pytest.mark.parametrize(
    ("angle", "positive", "expected"),
    [
        (0, True, 0.0),
        (60, True, 0.5),  # chord 1
        (180, True, 2.0),
        (60, False, 0.5 * 0.8**2),
        (90, False, 0.5 * (1.8 - math.sqrt(2)) ** 2),
        (180, False, 0.0),  # chord 2 > 1.8
        (0, False, 0.5 * (1.8 - math.sqrt(1e-9)) ** 2),
    ],
)
def test_known_angles_and_finite_gradients(angle, positive, expected):
    first = at(20).requires_grad_()
    loss = ContrastiveLoss()(first, at(20 + angle), torch.tensor([positive]))
    loss.backward()
    assert loss.item() == pytest.approx(expected, abs=1e-6) and torch.isfinite(first.grad).all()


def test_the_mean_over_pairs_and_active_hinges():
    pairs = at(0, 0, 0), at(60, 60, 180), torch.tensor([True, False, False])
    loss = ContrastiveLoss()
    assert loss(*pairs).item() == pytest.approx((0.5 + 0.5 * 0.8**2 + 0) / 3, abs=1e-6)
    assert pair_figures(loss, *pairs, (pairs[2], pairs[2]))["active_hinges"].item() == 0.5


def test_half_precision_input_is_computed_in_float32():
    first, second = at(10).half(), at(11).half()
    loss = ContrastiveLoss()(first, second, torch.tensor([False]))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(0.5 * (1.8 - (first.float() - second.float()).norm().item()) ** 2, abs=1e-5)


def test_a_margin_that_makes_no_sense():
    with pytest.raises(UserError, match="margin"):
        ContrastiveLoss(0.0)


@pytest.mark.parametrize("loss", [losses.NTXentLoss(0.05), losses.SupConLoss(0.1)])
def test_the_library_s_in_batch_losses_mean_what_the_recipe_means(loss):
    """Two views of each exhibit: minus the log-softmax of the fellow among all others, over the mean of all."""
    embeddings, labels = at(0, 80, 200, 5, 100, 170), torch.tensor([0, 1, 2, 0, 1, 2])
    exact = embeddings.double()
    logits = (exact @ exact.T / loss.temperature).fill_diagonal_(-math.inf)
    expected = sum(torch.logsumexp(logits[i], 0) - logits[i, (i + 3) % 6] for i in range(6)) / 6
    assert loss(embeddings, labels).item() == pytest.approx(expected.item(), rel=1e-3)
