import numpy as np
import pytest
import torch

from metilr.data.visits import PRESETS, simulate_visit
from metilr.errors import UserError
from metilr.training.augmentations import PublishedAugmentation, RandomCrop, SimulatedVisit

ALL = [RandomCrop(40), PublishedAugmentation(40), SimulatedVisit(40)]


@pytest.fixture
def image() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 60, 90), dtype=np.uint8))


@pytest.mark.parametrize("augmentation", ALL, ids=lambda a: type(a).__name__)
def test_a_seed_gives_one_view_and_the_global_state_stays(image, augmentation):
    before = torch.get_rng_state()
    first = augmentation(image, 5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert torch.equal(first, augmentation(image, 5)) and not torch.equal(first, augmentation(image, 6))
    assert first.shape == (3, 40, 40) and first.dtype == torch.uint8


def test_a_crop_of_the_whole_image_is_a_resize(image):
    square = image[:, :, :60]
    assert torch.equal(RandomCrop(60, scale=(1.0, 1.0), ratio=(1.0, 1.0))(square, 0), square)


def test_published_views_lose_colour_in_about_a_fifth(image):
    views = [PublishedAugmentation(8)(image, seed) for seed in range(400)]
    assert 0.13 < np.mean([bool((view == view[:1]).all()) for view in views]) < 0.27


def test_a_visit_at_one_strength_is_the_preset(image):
    small = image[:, :40, :40]
    view = SimulatedVisit(40, "severe", "severe")(small, 9)
    photograph = simulate_visit(small, PRESETS["severe"], 9, longest_side=40)
    resized = torch.nn.functional.interpolate(
        photograph[None].double(), (40, 40), mode="bilinear", antialias=True, align_corners=False
    )[0]
    assert (view.double() - resized).abs().max() <= 1 + 1e-9  # one level, which rounding may exceed


def test_bad_options():
    with pytest.raises(UserError, match="size 0"):
        SimulatedVisit(0)
    with pytest.raises(UserError, match="scale"):
        RandomCrop(40, scale=(0.5, 2.0))
