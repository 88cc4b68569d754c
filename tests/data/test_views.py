import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from metilr.data.decode import load_image
from metilr.data.views import CentreCrops, ImageRows, Images, SimulatedVisits
from metilr.data.visits import PRESETS, derive_seed, simulate_visit


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    coarse = F.resize(torch.rand(3, 6, 9, generator=generator), [120, 170], antialias=True)
    return (coarse * 255).to(torch.uint8)


@pytest.mark.parametrize("view", [SimulatedVisits(7, seed=4), CentreCrops((0.8, 0.5, 0.01))])
def test_the_shape_is_known_and_each_view_differs(image, view):
    made = [view(image, "MET/1/0.jpg", number) for number in range(view.n)]
    for number, photograph in enumerate(made):
        assert photograph.dtype == torch.uint8
        assert tuple(photograph.shape[1:]) == view.shape(120, 170, "MET/1/0.jpg", number)
        assert torch.equal(photograph, view(image, "MET/1/0.jpg", number))
    for i, first in enumerate(made):
        assert all(first.shape != other.shape or not torch.equal(first, other) for other in made[i + 1 :])


def test_visits_are_those_of_the_one_implementation(image):
    view = SimulatedVisits(6, seed=9)
    for number, (scene, preset) in enumerate([(s, p) for s in (0, 1) for p in ("mild", "medium", "severe")]):
        plain = simulate_visit(image, PRESETS[preset], derive_seed(9, "a.jpg", scene))
        photograph = view(image, "a.jpg", number)
        cut = [(before - after) / 2 for before, after in zip(plain.shape[1:], photograph.shape[1:], strict=True)]
        assert all(side % 16 == 0 for side in photograph.shape[1:]) and all(0 <= edge < 8 for edge in cut)
        top, left = (round(edge) for edge in cut)
        height, width = photograph.shape[1:]
        assert torch.equal(photograph, plain[:, top : top + height, left : left + width])


def test_visits_depend_on_seed_and_name(image):
    first = SimulatedVisits(1, seed=0)(image, "a.jpg", 0)
    for other in (SimulatedVisits(1, seed=1)(image, "a.jpg", 0), SimulatedVisits(1, seed=0)(image, "b.jpg", 0)):
        assert first.shape != other.shape or not torch.equal(first, other)
    assert torch.equal(first, SimulatedVisits(5, seed=0)(image, "a.jpg", 0))  # more visits leave the first ones


def test_a_crop_is_the_middle():
    image = torch.zeros(3, 10, 20, dtype=torch.uint8)
    image[:, 2:8, 4:16] = 255
    crops = CentreCrops((0.6, 0.2))
    assert crops(image, "", 0).shape == (3, 6, 12) and (crops(image, "", 0) == 255).all()
    assert crops(image, "", 1).shape == (3, 2, 4)


def test_rows_of_images_and_of_views(tmp_path):
    files = []
    for i, (height, width) in enumerate([(40, 60), (50, 50)]):
        files.append(tmp_path / f"{i}.png")
        noise = np.random.default_rng(i).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(noise).save(files[-1])
    names = ["x/0.png", "x/1.png"]
    view = CentreCrops((0.5, 0.9, 0.7))
    rows = ImageRows({"val": Images(files, names, None), "val_crops": Images(files, names, None, view)})
    assert rows.locate(1) == ("val", 1) and rows.locate(2) == ("val_crops", 0) and rows.locate(7) == ("val_crops", 5)
    assert [rows.file(i).name for i in range(8)] == ["0.png", "1.png"] + 3 * ["0.png"] + 3 * ["1.png"]
    for row in range(8):
        assert tuple(rows.load(row).shape[1:]) == rows.shape(row)
    assert torch.equal(rows.load(6), view(load_image(files[1]), names[1], 1))
