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
        (90, True, 1.0),  # chord √2
        (180, True, 2.0),
        (60, False, 0.5 * 0.8**2),
        (90, False, 0.5 * (1.8 - math.sqrt(2)) ** 2),
        (180, False, 0.0),  # chord 2 > 1.8
        (0, False, 0.5 * (1.8 - math.sqrt(1e-9)) ** 2),
    ],
)
def test_known_angles(angle, positive, expected):
    loss = ContrastiveLoss()(at(20), at(20 + angle), torch.tensor([positive]))
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_the_mean_over_pairs():
    loss = ContrastiveLoss()(at(0, 0, 0), at(60, 60, 180), torch.tensor([True, False, False]))
    assert loss.item() == pytest.approx((0.5 + 0.5 * 0.8**2 + 0) / 3, abs=1e-6)


@pytest.mark.parametrize("positive", [True, False])
def test_equal_embeddings_have_finite_gradients(positive):
    first, second = at(30).requires_grad_(), at(30)
    ContrastiveLoss()(first, second, torch.tensor([positive])).backward()
    assert torch.isfinite(first.grad).all()


def test_half_precision_input_is_computed_in_float32():
    first, second = at(10).half(), at(11).half()
    loss = ContrastiveLoss()(first, second, torch.tensor([False]))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(0.5 * (1.8 - (first.float() - second.float()).norm().item()) ** 2, abs=1e-5)


def test_active_hinges():
    pairs = at(0, 0, 0), at(60, 180, 0), torch.tensor([False, False, True])
    assert pair_figures(ContrastiveLoss(), *pairs, (pairs[2], pairs[2]))["active_hinges"].item() == 0.5


def test_a_margin_that_makes_no_sense():
    with pytest.raises(UserError, match="margin"):
        ContrastiveLoss(0.0)


@pytest.mark.parametrize("loss", [losses.NTXentLoss(0.05), losses.SupConLoss(0.1)])
def test_the_library_s_in_batch_losses_mean_what_the_recipe_means(loss):
    """Two views of each exhibit: minus the log-softmax of the fellow among all others, over the mean of all."""
    embeddings, labels = at(0, 80, 200, 5, 100, 170), torch.tensor([0, 1, 2, 0, 1, 2])
    expected = []
    for i in range(6):
        logits = [(embeddings[i] @ embeddings[j]).item() / loss.temperature for j in range(6) if j != i]
        fellow = (embeddings[i] @ embeddings[(i + 3) % 6]).item() / loss.temperature
        expected.append(math.log(sum(math.exp(x) for x in logits)) - fellow)
    assert loss(embeddings, labels).item() == pytest.approx(sum(expected) / 6, rel=1e-3)
