from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from metilr.errors import UserError
from metilr.geometry.features import FeatureCache, LocalFeatureExtractor, cell_centres
from metilr.geometry.verify import LocalFeatures
from metilr.models.backbone import build_backbone
from metilr.models.embedder import Embedder
from metilr.models.pooling import build_pooling


def embedder_of(name: str, stage: int | None = None) -> Embedder:
    backbone = build_backbone(name, "random", stage)
    return Embedder(backbone, build_pooling("gem")).eval()


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return embedder_of("r18_in")


def noise(height: int = 96, width: int = 160) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_features_are_those_of_a_plain_composition(embedder: Embedder) -> None:
    image = noise()
    found = LocalFeatureExtractor(embedder, scales=(1.0, 0.5), n_features=10_000).extract(image)

    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    normalised = ((image / 255 - mean) / std)[None]
    half = F.interpolate(normalised, size=(48, 80), mode="bilinear")
    network = embedder.backbone.model
    columns, positions = [], []
    with torch.no_grad():
        for scaled, cell in ((normalised, 8), (half, 16)):
            stem = network.maxpool(network.act1(network.bn1(network.conv1(scaled))))
            features = network.layer2(network.layer1(stem))[0]  # stride 8
            for row in range(features.shape[1]):
                for column in range(features.shape[2]):
                    columns.append(features[:, row, column])
                    positions.append(((column + 0.5) * cell, (row + 0.5) * cell))
    rows = torch.stack(columns)
    standard = torch.nan_to_num((rows - rows.mean(dim=0)) / rows.std(dim=0, correction=0))
    np.testing.assert_allclose(found.positions, positions, atol=1e-4)
    np.testing.assert_allclose(found.descriptors, F.normalize(standard, dim=1), atol=5e-4)  # float16
    assert found.positions.dtype == found.descriptors.dtype == np.float32


def test_the_strongest_are_kept_in_order(embedder: Embedder) -> None:
    every = LocalFeatureExtractor(embedder, scales=(1.0,), n_features=10_000).extract(noise())
    few = LocalFeatureExtractor(embedder, scales=(1.0,), n_features=30).extract(noise())
    places = [int(np.flatnonzero((every.positions == position).all(axis=1))[0]) for position in few.positions]
    assert len(places) == 30 and places == sorted(places)
    np.testing.assert_array_equal(few.descriptors, every.descriptors[places])
    np.testing.assert_array_equal(few.descriptors, few.descriptors.astype(np.float16))  # a cache keeps them exactly


def test_a_bright_square_is_where_the_features_are() -> None:
    extractor = LocalFeatureExtractor(embedder_of("r18_in"), scales=(1.0, 0.5), n_features=8)
    image = torch.full((3, 256, 384), 20, dtype=torch.uint8)
    image[:, 96:128, 240:272] = 230
    found = extractor.extract(image)
    centre = np.array([256, 112])
    assert len(found.positions) == 8
    assert (np.abs(found.positions - centre) <= 16 + 16).all()  # the square's half side, and a cell at scale 1/2


def test_an_image_of_one_colour_gives_finite_features(embedder: Embedder) -> None:
    for value in (0, 128, 255):
        found = LocalFeatureExtractor(embedder).extract(torch.full((3, 64, 64), value, dtype=torch.uint8))
        assert np.isfinite(found.descriptors).all()
        np.testing.assert_allclose(np.linalg.norm(found.descriptors, axis=1), 1, atol=1e-3)


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (9, 200)])
def test_tiny_images_give_few_or_no_features(embedder: Embedder, size: tuple[int, int]) -> None:
    found = LocalFeatureExtractor(embedder).extract(noise(*size))
    assert found.positions.shape == (len(found.descriptors), 2)
    assert np.isfinite(found.descriptors).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0])
def test_maps_that_are_not_finite_or_all_alike_give_none(
    embedder: Embedder, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    monkeypatch.setattr(LocalFeatureExtractor, "_map", lambda self, images: torch.full((1, 8, 4, 4), value))
    found = LocalFeatureExtractor(embedder).extract(noise())
    assert found.positions.shape == (0, 2) and found.descriptors.shape == (0, 8)


@pytest.mark.parametrize(
    ("name", "stage", "stride", "width"),
    [
        ("lite0_in", None, 8, 40),
        ("lite0_in", 5, 8, 40),  # the stage that is pooled does not matter
        ("r18_in", None, 8, 128),
        ("timm/test_vit", None, 16, 64),
    ],
)
def test_the_map_is_named_by_its_stride(name: str, stage: int | None, stride: int, width: int) -> None:
    extractor = LocalFeatureExtractor(embedder_of(name, stage), scales=(1.0,))
    found = extractor.extract(noise(64, 96))
    assert extractor.stride == stride
    assert extractor.tolerance == 1.5 * stride
    assert len(found.descriptors) <= (64 // stride) * (96 // stride)
    assert found.descriptors.shape[1] == width


def test_a_vits_map_is_the_one_that_is_pooled() -> None:
    embedder = embedder_of("timm/test_vit")
    image = noise(64, 96)
    found = LocalFeatureExtractor(embedder, scales=(1.0,)).extract(image)
    with torch.no_grad():
        rows = embedder.backbone(embedder.normalise(image[None])).map[0].flatten(1).T
    expected = F.normalize((rows - rows.mean(dim=0)) / rows.std(dim=0, correction=0), dim=1)
    np.testing.assert_allclose(found.descriptors, expected, atol=5e-4)  # float16
    np.testing.assert_allclose(found.positions[:7], [[8 + 16 * i, 8] for i in range(6)] + [[8, 24]])


def test_settings_tell_what_changes_features(embedder: Embedder) -> None:
    settings = LocalFeatureExtractor(embedder).settings()
    assert settings == LocalFeatureExtractor(embedder).settings()
    others = [
        LocalFeatureExtractor(embedder, stride=16),
        LocalFeatureExtractor(embedder, scales=(1.0,)),
        LocalFeatureExtractor(embedder, n_features=5),
        LocalFeatureExtractor(Embedder(build_backbone("r18_in", "random", seed=1), build_pooling("gem"))),
    ]
    assert all(other.settings() != settings for other in others)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert LocalFeatureExtractor(embedder).settings() != settings


def test_autocast_is_the_callers(embedder: Embedder) -> None:
    image = noise(160, 160)
    exact = LocalFeatureExtractor(embedder, scales=(1.0,)).extract(image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = LocalFeatureExtractor(embedder, scales=(1.0,)).extract(image)
    assert rounded.descriptors.dtype == np.float32
    difference = np.abs(rounded.descriptors - exact.descriptors).max()
    assert 0 < difference < 0.2


def test_cells_tile_the_image() -> None:
    np.testing.assert_allclose(cell_centres(2, 3, 20, 60), [[10, 5], [30, 5], [50, 5], [10, 15], [30, 15], [50, 15]])


def random_features(n: int = 40) -> LocalFeatures:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(n, 16)).astype(np.float32)
    positions = rng.uniform(0, 300, (n, 2)).astype(np.float32)
    return LocalFeatures(positions, rows / np.linalg.norm(rows, axis=1, keepdims=True))


def refuse() -> LocalFeatures:
    raise AssertionError("computed again")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    (tmp_path / "a.jpg").write_bytes(b"an image")
    return tmp_path / "a.jpg"


@pytest.mark.parametrize("n", [40, 0])
def test_new_and_kept_features_are_the_same(image: Path, tmp_path: Path, n: int) -> None:
    computed = random_features(n)
    new = FeatureCache(tmp_path / "cache", {}).features(image, lambda: computed)
    kept = FeatureCache(tmp_path / "cache", {}).features(image, refuse)
    for one, two in zip(new, kept, strict=True):
        assert one.dtype == two.dtype == np.float32
        np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(new.positions, computed.positions)
    np.testing.assert_allclose(new.descriptors, computed.descriptors, atol=5e-4)  # float16


def test_other_settings_images_and_contents_are_computed(image: Path, tmp_path: Path) -> None:
    folder, other = tmp_path / "cache", tmp_path / "b.jpg"
    other.write_bytes(b"an image")
    FeatureCache(folder, {"stride": 8}).features(image, random_features)
    for settings, file in (({"stride": 16}, image), ({"stride": 8}, other)):
        with pytest.raises(AssertionError, match="computed again"):
            FeatureCache(folder, settings).features(file, refuse)
    image.write_bytes(b"a longer image")
    with pytest.raises(AssertionError, match="computed again"):
        FeatureCache(folder, {"stride": 8}).features(image, refuse)


@pytest.mark.parametrize("damage", ["short", "bit", "empty", "text"])
def test_a_damaged_entry_is_computed_again(image: Path, tmp_path: Path, damage: str) -> None:
    cache = FeatureCache(tmp_path / "cache", {})
    whole = cache.features(image, random_features)
    [entry] = cache.folder.iterdir()
    content = entry.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    entry.write_bytes({"short": content[:-100], "bit": flipped, "empty": b"", "text": b"no features"}[damage])
    with pytest.raises(AssertionError, match="computed again"):
        cache.features(image, refuse)
    cache.features(image, random_features)
    np.testing.assert_array_equal(cache.features(image, refuse).descriptors, whole.descriptors)


def test_a_folder_that_cannot_be_made_is_a_users_error(image: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.*: cannot be written"):
        FeatureCache(tmp_path / "file", {}).features(image, random_features)
