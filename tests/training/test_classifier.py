"""Classifiers' losses at angles known by hand, where they start, and what they refuse."""

import math

import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses

from metilr.errors import UserError
from metilr.training import FineTuningOptions
from metilr.training.classifier import Classifier, class_rows, start_at_prototypes

CLASSES = (0, 90, 200)  # degrees of three classes' vectors
MARGIN = 30


def at(*degrees: float) -> torch.Tensor:
    return torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])


def with_weights(kind: str, *degrees: float, scale: float = 4.0):
    margin = {} if kind == "cosine" else {"classifier_margin": float(MARGIN)}
    classifier = Classifier(FineTuningOptions(classifier=kind, classifier_scale=scale, **margin), 3, 2)
    lengths = torch.linspace(0.5, 2, len(degrees))  # only directions count
    classifier.weight.data = at(*degrees) * lengths[:, None]
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


KINDS = {
    "cosine": lambda **sizes: losses.NormalizedSoftmaxLoss(**sizes, temperature=1 / 8),
    "arcface": lambda **sizes: losses.ArcFaceLoss(**sizes, margin=40, scale=8),
    "subcenter": lambda **sizes: losses.SubCenterArcFaceLoss(**sizes, margin=40, scale=8, sub_centers=3),
}


def classifier_of(kind: str, n_classes: int, dim: int, **options):
    """With class weights at random, of unit length so that tolerances of gradients mean something."""
    margin = {} if kind == "cosine" else {"classifier_margin": 40.0}
    made = Classifier(FineTuningOptions(classifier=kind, classifier_scale=8.0, **margin, **options), n_classes, dim)
    made.weight.data = torch.nn.functional.normalize(made.weight.data, dim=1)
    return made


def gradients(loss, embeddings, labels, *seed):
    """Of embeddings and of class weights, after the loss itself."""
    embeddings = embeddings.clone().requires_grad_(True)
    weight = next(loss.parameters())
    value = loss(embeddings, labels, *seed)
    return value.item(), *torch.autograd.grad(value, (embeddings, weight))


@pytest.mark.parametrize(("kind", "starts_at_prototypes"), [*((kind, False) for kind in KINDS), ("subcenter", True)])
def test_losses_and_gradients_are_pytorch_metric_learning_s(kind, starts_at_prototypes):
    """Of embeddings anywhere, some further from their class than 180 degrees less the margin."""
    embeddings, labels = torch.randn((60, 2), generator=torch.Generator().manual_seed(0)), torch.arange(60) % 5
    classifier, other = classifier_of(kind, 5, 2), KINDS[kind](num_classes=5, embedding_size=2)
    if kind == "subcenter" and starts_at_prototypes:  # where a class's three are equal, one alone is to move
        start_at_prototypes(classifier, at(*range(0, 360, 72)).numpy(), np.arange(5))
    other.W.data = classifier.weight.detach().T.clone()
    value, of_embeddings, of_weights = gradients(classifier, embeddings, labels)
    expected, of_their_embeddings, of_their_weights = gradients(other, embeddings, labels)
    assert value == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(of_embeddings, of_their_embeddings, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(of_weights, of_their_weights.T, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_some_classes_a_step_have_the_loss_and_on_average_the_gradient_of_all(kind, monkeypatch):
    monkeypatch.setattr("metilr.training.classifier.BLOCK", 5)
    generator, labels = torch.Generator().manual_seed(1), torch.tensor([3, 3, 0, 12])
    embeddings = torch.randn((4, 6), generator=generator)
    value, *whole = gradients(classifier_of(kind, 16, 6), embeddings, labels)
    some = classifier_of(kind, 16, 6, classes_per_step=8)  # 3 of the batch, 2 that are near, 3 of 11 at random
    drawn = [gradients(some, embeddings, labels, (0, step)) for step in range(800)]
    assert [each[0] for each in drawn] == pytest.approx([value] * len(drawn), rel=1e-5)
    for full, several in zip(whole, map(torch.stack, zip(*(each[1:] for each in drawn), strict=True)), strict=True):
        error = several.std(dim=0) / math.sqrt(len(drawn))
        assert ((several.mean(dim=0) - full).abs() < 4.5 * error + 1e-5).all()
        assert error.max() > 0 and error.norm() < 0.1 * full.norm()  # they differ, but little enough to tell
    moved = torch.stack([each[2].norm(dim=1).unflatten(0, (16, -1)).amax(dim=1) > 0 for each in drawn])
    assert (moved.sum(dim=1) == 8).all() and moved.any(dim=0).all()
    rows, of_rows = class_rows(some)
    highest = (rows @ torch.nn.functional.normalize(embeddings).numpy().T).max(axis=1)
    highest[np.isin(of_rows, labels)] = -1
    nearest = list(dict.fromkeys(of_rows[np.argsort(-highest)].tolist()))[:2]
    assert moved.all(dim=0).nonzero().flatten().tolist() == sorted([0, 3, 12, *nearest])
    again = gradients(some, embeddings, labels, (0, 7))
    assert all(torch.equal(*pair) for pair in zip(again[1:], drawn[7][1:], strict=True))


@pytest.mark.parametrize(("n_classes", "labels"), [(3, [0, 1, 2]), (40, list(range(10)))])
def test_more_exhibits_in_a_batch_than_classes_a_step(n_classes, labels):
    embeddings, labels = torch.randn((len(labels), 4), generator=torch.Generator().manual_seed(0)), torch.tensor(labels)
    value, _, of_weights = gradients(classifier_of("cosine", n_classes, 4, classes_per_step=2), embeddings, labels)
    assert value == pytest.approx(gradients(classifier_of("cosine", n_classes, 4), embeddings, labels)[0], rel=1e-5)
    assert (of_weights[labels].norm(dim=1) > 0).all() and torch.isfinite(of_weights).all()


@pytest.mark.parametrize("kind", ["arcface", "subcenter"])
def test_a_photo_at_its_class_has_a_gradient(kind):
    classifier = classifier_of(kind, 3, 4)
    rows = torch.from_numpy(class_rows(classifier)[0])
    _, of_embeddings, of_weights = gradients(classifier, rows, torch.from_numpy(class_rows(classifier)[1]))
    assert torch.isfinite(of_embeddings).all() and torch.isfinite(of_weights).all()


@pytest.mark.parametrize("kind", ["cosine", "subcenter"])
def test_the_start_is_at_prototypes_and_a_class_without_an_image_keeps_its_own(kind):
    classifier = Classifier(FineTuningOptions(classifier=kind), 3, 2)
    before, labels = class_rows(classifier)
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
        ({"classifier": "cosine", "loss": torch.nn.Identity()}, "loss has no effect beside a classifier without contr"),
        ({"contrastive_weight": 0.5}, "contrastive_weight has no effect without a classifier"),
        ({"classifier": "cosine", "contrastive_weight": -1.0}, "contrastive_weight -1.0: must be a finite number"),
        (
            {"classifier": "cosine", "contrastive_weight": 0.5, "freeze_backbone": True},
            "loss has nothing to train; give",
        ),
        ({"classes_per_step": 100}, "classes_per_step has no effect without a classifier"),
        ({"classifier": "cosine", "classes_per_step": 1}, "classes_per_step 1: must be a finite number, at least 2"),
        ({"freeze_backbone": True}, "nothing is left to train; give projector_dim, or a classifier"),
    ],
)
def test_options_that_do_not_go_together(options, said):
    with pytest.raises(UserError) as caught:
        FineTuningOptions(**options)
    assert said in str(caught.value)


def test_from_a_random_start_class_weights_follow_the_network_within_a_few_steps():
    """As short vectors do; of unit length they take dozens of steps to turn, and a network turns to them instead."""
    n_classes, dim = 50, 64
    classifier = Classifier(FineTuningOptions(classifier="cosine"), n_classes, dim, seed=3)
    embeddings = torch.nn.functional.normalize(torch.randn(n_classes, dim, generator=torch.manual_seed(1)), dim=1)
    labels = torch.arange(n_classes)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        classifier(embeddings, labels).backward()
        optimizer.step()
    rows, _ = class_rows(classifier)
    assert (torch.from_numpy(np.asarray(rows)) @ embeddings.T).argmax(dim=0).tolist() == labels.tolist()
