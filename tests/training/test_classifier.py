"""Classifiers' losses at angles known by hand, where they start, and what they refuse."""

import math

import numpy as np
import pytest
import torch

from metilr.errors import UserError
from metilr.training import FineTuningOptions
from metilr.training.classifier import build_classifier, class_rows, start_at_prototypes

CLASSES = (0, 90, 200)  # degrees of three classes' vectors
MARGIN = 30


def at(*degrees: float) -> torch.Tensor:
    return torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])


def with_weights(kind: str, *degrees: float, scale: float = 4.0):
    margin = {} if kind == "cosine" else {"classifier_margin": float(MARGIN)}
    classifier = build_classifier(FineTuningOptions(classifier=kind, classifier_scale=scale, **margin), 3, 2)
    lengths = torch.linspace(0.5, 2, len(degrees))  # only directions count
    classifier.W.data = (at(*degrees) * lengths[:, None]).T
    return classifier


def loss_by_hand(angles, label, margin, scale=4.0):
    """Cross-entropy of scaled cosines of the angles to the classes; the right one's angle grows by the margin."""
    logits = [scale * math.cos(math.radians(angle + (margin if c == label else 0))) for c, angle in enumerate(angles)]
    return -(logits[label] - math.log(sum(map(math.exp, logits))))


@pytest.mark.parametrize(("kind", "margin"), [("cosine", 0), ("arcface", MARGIN)])
def test_losses_by_angle(kind, margin):
    classifier, photos = with_weights(kind, *CLASSES), ((10, 0), (60, 1), (170, 1), (215, 2))
    by_hand = [
        loss_by_hand([min(abs(at_ - c), 360 - abs(at_ - c)) for c in CLASSES], label, margin) for at_, label in photos
    ]
    for (angle, label), expected in zip(photos, by_hand, strict=True):
        assert classifier(at(angle), torch.tensor([label])).item() == pytest.approx(expected, abs=1e-4)
    together = classifier(at(*(angle for angle, _ in photos)), torch.tensor([label for _, label in photos]))
    assert together.item() == pytest.approx(np.mean(by_hand), abs=1e-4)


def test_the_nearest_of_a_class_s_three_vectors_counts():
    classifier = with_weights("subcenter", 0, 20, 40, 90, 90, 90, 200, 220, 240)
    # 35 degrees is 5 from the third of class 0, 55 from class 1, 155 from the last of class 2 (125 and more apart)
    expected = loss_by_hand([5, 55, 155], 0, MARGIN)
    assert classifier(at(35), torch.tensor([0])).item() == pytest.approx(expected, abs=1e-4)
    rows, labels = class_rows(classifier)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    np.testing.assert_allclose(rows, at(0, 20, 40, 90, 90, 90, 200, 220, 240), atol=1e-6)


@pytest.mark.parametrize("kind", ["cosine", "subcenter"])
def test_the_start_is_at_prototypes_and_a_class_without_an_image_keeps_its_own(kind):
    classifier = build_classifier(FineTuningOptions(classifier=kind), 3, 2)
    before, labels = class_rows(classifier)
    np.testing.assert_allclose(classifier.W.detach().norm(dim=0), 1, atol=1e-6)  # a learning rate fits either start
    start_at_prototypes(classifier, at(10, 50, 200).numpy(), np.array([0, 0, 2]))
    rows, _ = class_rows(classifier)
    np.testing.assert_allclose(rows[labels == 0], at(*[30] * (labels == 0).sum()), atol=1e-6)
    np.testing.assert_allclose(rows[labels == 2], at(*[200] * (labels == 2).sum()), atol=1e-6)
    np.testing.assert_array_equal(rows[labels == 1], before[labels == 1])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"classifier": "softmax"}, "classifier softmax: choose one of none, cosine, arcface, subcenter"),
        ({"classifier": "cosine", "classifier_margin": 20.0}, "classifier_margin has no effect without a classifier"),
        ({"classifier": "arcface", "classifier_margin": 0.0}, "classifier_margin 0.0: choose degrees above 0"),
        ({"classifier": "arcface", "classifier_scale": math.inf}, "classifier_scale inf: choose a finite number"),
        ({"classifier_scale": 3.0}, "classifier_scale has no effect without a classifier such as cosine"),
        ({"lr_classifier": 0.1}, "lr_classifier has no effect without"),
        ({"classifier_start": "random"}, "classifier_start has no effect without"),
        ({"classifier": "cosine", "loss": torch.nn.Identity()}, "loss has no effect with a classifier"),
        ({"freeze_backbone": True}, "nothing is left to train; give projector_dim, or a classifier"),
    ],
)
def test_options_that_do_not_go_together(options, said):
    with pytest.raises(UserError) as caught:
        FineTuningOptions(**options)
    assert said in str(caught.value)
