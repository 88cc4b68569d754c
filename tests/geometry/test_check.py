"""Local features against a plain composition, and inliers of a drawn museum against a plain loop."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from metilr.data.decode import load_image
from metilr.data.ground_truth import GroundTruth, load_ground_truth
from metilr.data.pixels import ImageSize
from metilr.demo import MuseumSize, make_demo
from metilr.distributed import pool_of
from metilr.errors import UserError
from metilr.geometry.check import (
    GeometricCheck,
    LocalFeatureExtractor,
    cell_centres,
    count_inliers,
    geometric_check_of,
)
from metilr.geometry.verify import LocalFeatures, verify
from metilr.models.embedder import Embedder, build_embedder
from metilr.retrieval.knn import NO_ROW
from tests.small_models import with_statistics

SIZE = MuseumSize(exhibits=6, mini_exhibits=5, val=(6, 2, 1), test=(2, 1, 1), longest_side=200)


def embedder_of(name: str, stage: int | None = None) -> Embedder:
    return build_embedder(name, "random", stage=stage)


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return embedder_of("r18_in")


def noise(height: int = 96, width: int = 160) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_features_are_those_of_a_plain_composition() -> None:
    embedder, image = embedder_of("r18_in"), noise()
    with_statistics(embedder.backbone)
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


def test_a_map_that_its_own_norm_would_change_stays_as_it_is() -> None:
    """Behind it comes a norm that works in place: joined to it, the last map is right and this one is not."""
    extractor = LocalFeatureExtractor(embedder_of("timm/xception41p"))
    network, images = (
        extractor.embedder.backbone,
        torch.randn(1, 3, 96, 160, generator=torch.Generator().manual_seed(0)),
    )
    assert extractor.stride == 8
    with torch.inference_mode():
        expected = extractor._map_of(network, images)
        assert torch.equal(extractor._map(images), expected) and expected.min() < 0


def test_the_strongest_are_kept_in_order(embedder: Embedder) -> None:
    every = LocalFeatureExtractor(embedder, scales=(1.0,), n_features=10_000).extract(noise())
    few = LocalFeatureExtractor(embedder, scales=(1.0,), n_features=30).extract(noise())
    places = [int(np.flatnonzero((every.positions == position).all(axis=1))[0]) for position in few.positions]
    assert len(places) == 30 and places == sorted(places)
    np.testing.assert_array_equal(few.descriptors, every.descriptors[places])
    np.testing.assert_array_equal(few.descriptors, few.descriptors.astype(np.float16))  # they are kept exactly


def test_a_bright_square_is_where_the_features_are(embedder: Embedder) -> None:
    image = torch.full((3, 256, 384), 20, dtype=torch.uint8)
    image[:, 96:128, 240:272] = 230
    found = LocalFeatureExtractor(embedder, scales=(1.0, 0.5), n_features=8).extract(image)
    assert len(found.positions) == 8
    assert (np.abs(found.positions - [256, 112]) <= 16 + 16).all()  # half the square's side, a cell at scale 1/2


@pytest.mark.parametrize(
    "image",
    [*(torch.full((3, 64, 64), v, dtype=torch.uint8) for v in (0, 255)), noise(1, 1), noise(8, 8), noise(9, 200)],
)
def test_images_of_one_colour_and_tiny_ones_give_finite_features(embedder: Embedder, image: torch.Tensor) -> None:
    found = LocalFeatureExtractor(embedder).extract(image)
    assert found.positions.shape == (len(found.descriptors), 2)
    np.testing.assert_allclose(np.linalg.norm(found.descriptors, axis=1), 1, atol=1e-3)


def test_a_scale_that_is_too_small_for_the_network_gives_none() -> None:
    particular = embedder_of("timm/convnext_atto")  # its map of stride 8 begins at 8 px
    found = LocalFeatureExtractor(particular, scales=(1.0, 0.5)).extract(noise(24, 15))
    alone = LocalFeatureExtractor(particular, scales=(1.0,)).extract(noise(24, 15))
    assert len(found.positions) == 3
    np.testing.assert_array_equal(found.positions, alone.positions)
    np.testing.assert_array_equal(found.descriptors, alone.descriptors)
    nothing = LocalFeatureExtractor(particular).extract(noise(24, 7))
    assert nothing.positions.shape == (0, 2) and verify(found, nothing, 12.0).n_inliers == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0])
def test_maps_that_are_not_finite_or_all_alike_give_none(embedder: Embedder, monkeypatch, value: float) -> None:
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
    assert (extractor.stride, extractor.tolerance) == (stride, 1.5 * stride)
    assert len(found.descriptors) <= (64 // stride) * (96 // stride)
    assert found.descriptors.shape[1] == width


def test_a_vits_map_is_the_one_that_is_pooled() -> None:
    embedder, image = embedder_of("timm/test_vit"), noise(64, 96)
    found = LocalFeatureExtractor(embedder, scales=(1.0,)).extract(image)
    with torch.no_grad():
        rows = embedder.backbone(embedder.normalise(image[None])).map[0].flatten(1).T
    expected = F.normalize((rows - rows.mean(dim=0)) / rows.std(dim=0, correction=0), dim=1)
    np.testing.assert_allclose(found.descriptors, expected, atol=5e-4)  # float16
    np.testing.assert_allclose(found.positions[:7], [[8 + 16 * i, 8] for i in range(6)] + [[8, 24]])


def square_at(x: int, y: int, height: int = 256, width: int = 384) -> torch.Tensor:
    image = torch.full((3, height, width), 20, dtype=torch.uint8)
    image[:, y - 16 : y + 16, x - 16 : x + 16] = 230
    return image


@pytest.mark.parametrize("degrees", [0, 45, 90, 135, 180, 200, 270, 315])
def test_features_of_a_turned_image_lie_where_they_do_in_the_image_as_it_is(embedder: Embedder, degrees: int) -> None:
    extractor = LocalFeatureExtractor(embedder, scales=(1.0, 0.5), n_features=8)
    found = extractor.extract_turned(square_at(256, 112), degrees)
    assert len(found.positions) == 8
    assert (np.linalg.norm(found.positions - [256, 112], axis=1) <= 16 * 2**0.5 + 16).all()  # half a diagonal, a cell


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_a_quarter_turn_gives_the_features_of_the_turned_pixels(embedder: Embedder, quarters: int) -> None:
    image, extractor = noise(96, 160), LocalFeatureExtractor(embedder)
    found = extractor.extract_turned(image, 90 * quarters)
    turned = extractor.extract(torch.rot90(image, quarters, (1, 2)).contiguous())  # counter-clockwise
    np.testing.assert_array_equal(found.descriptors, turned.descriptors)
    x, y = turned.positions.T  # of the turned image: a pixel of its upper right corner was in the lower right one
    height, width = image.shape[1:]
    expected = {1: (width - y, x), 2: (width - x, height - y), 3: (y, height - x)}[quarters]
    np.testing.assert_allclose(found.positions, np.stack(expected, axis=1), atol=1e-3)


def test_what_lies_beyond_a_turned_image_gives_no_features(embedder: Embedder) -> None:
    found = LocalFeatureExtractor(embedder, n_features=10_000).extract_turned(noise(160, 160), 45)
    n_cells = 29**2 + 20**2 + 15**2  # of the turned image, 227 px wide, at three scales; half of it is beyond
    assert 0.4 < len(found.positions) / n_cells < 0.6
    assert ((found.positions >= 0) & (found.positions <= 160)).all()


def test_settings_tell_what_changes_features(embedder: Embedder) -> None:
    settings = LocalFeatureExtractor(embedder).settings()
    assert settings == LocalFeatureExtractor(embedder).settings()
    others = [
        LocalFeatureExtractor(embedder, stride=16),
        LocalFeatureExtractor(embedder, scales=(1.0,)),
        LocalFeatureExtractor(embedder, n_features=5),
        LocalFeatureExtractor(build_embedder("r18_in", "random", seed=1)),
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
    assert 0 < np.abs(rounded.descriptors - exact.descriptors).max() < 0.2


def test_cells_tile_the_image() -> None:
    np.testing.assert_allclose(cell_centres(2, 3, 20, 60), [[10, 5], [30, 5], [50, 5], [10, 15], [30, 15], [50, 15]])


@pytest.fixture(scope="module")
def museum(tmp_path_factory) -> GroundTruth:
    return load_ground_truth(make_demo(tmp_path_factory.mktemp("check") / "museum", size=SIZE, progress=False))


@pytest.fixture(scope="module")
def extractor() -> LocalFeatureExtractor:
    try:
        return LocalFeatureExtractor(build_embedder("lite0_in"))
    except UserError:  # its package is not installed
        return LocalFeatureExtractor(embedder_of("r18_in"))


def files(museum: GroundTruth, split: str) -> list[Path]:
    return [museum.image(path) for path in museum.paths[split]]


def everything(museum: GroundTruth, split: str) -> np.ndarray:
    """All database rows as candidates of each query."""
    return np.tile(np.arange(len(museum.paths["database"])), (len(museum.paths[split]), 1))


def check_at(
    folder: Path, extractor: LocalFeatureExtractor, image_size: ImageSize | None = None, turns: int = 1
) -> GeometricCheck:
    return geometric_check_of(extractor.embedder, image_size, 5, False, turns, folder=folder)


def test_counts_are_those_of_a_plain_loop(museum, extractor, tmp_path) -> None:
    queries, database = files(museum, "val"), files(museum, "database")
    inliers = count_inliers(check_at(tmp_path, extractor), queries, everything(museum, "val"), database)
    seen = [extractor.extract(load_image(file)) for file in database]
    for i in (0, 3, len(queries) - 1):
        asked = extractor.extract(load_image(queries[i]))
        assert inliers[i, :, 0].tolist() == [verify(asked, other, extractor.tolerance).n_inliers for other in seen]
    if extractor.embedder.backbone.name == "lite0_in":  # random weights recognise nothing
        geometric, expected = museum.labels["database"][inliers[:, :, 0].argmax(axis=1)], museum.labels["val"]
        assert (geometric == expected)[expected >= 0].mean() >= 0.6


def test_turned_queries_count_by_turn(museum, extractor, tmp_path) -> None:
    """A plain loop over turned copies of the photos."""
    queries, database = files(museum, "val")[:3], files(museum, "database")[:4]
    candidates = np.tile(np.arange(4), (3, 1))
    counts = count_inliers(check_at(tmp_path / "a", extractor, turns=4), queries, candidates, database)
    assert counts.shape == (3, 4, 4)
    others = [extractor.extract(load_image(file)) for file in database]
    for i, query in enumerate(queries):
        for turn in range(4):
            turned = extractor.extract(torch.rot90(load_image(query), turn, (1, 2)).contiguous())
            expected = [verify(turned, other, extractor.tolerance).n_inliers for other in others]
            # Positions are those in the photo as it is, with which RANSAC's numbers round differently.
            np.testing.assert_allclose(counts[i, :, turn], expected, atol=2, rtol=0.1)


def test_an_image_that_lies_on_its_side_is_found_by_turns_alone(museum, tmp_path) -> None:
    extractor = LocalFeatureExtractor(build_embedder("lite0_in"))
    image = files(museum, "database")[0]
    Image.open(image).rotate(90, expand=True).save(tmp_path / "side.png")
    as_it_is, turned = (check_at(tmp_path / "kept", extractor, turns=turns) for turns in (1, 4))
    one = np.array([[0]])
    assert count_inliers(as_it_is, [tmp_path / "side.png"], one, [image])[0, 0, 0] < 30
    counts = count_inliers(turned, [tmp_path / "side.png"], one, [image])[0, 0]
    assert counts.argmax() == 3 and counts[3] > 300  # three quarters more make a whole turn
    side = load_image(tmp_path / "side.png")
    features, others = turned.query_features(side), turned.features(image)
    verified = verify(features[3], others, extractor.tolerance)
    x, y = features[3].positions[verified.matches[:, 0]].T  # in the photo as it lies; a point of it was at (h - y, x)
    found = others.positions[verified.matches[:, 1]]
    assert np.abs(found - np.stack([side.shape[1] - y, x], axis=1)).max() < 2 * extractor.tolerance
    drawn = turned.draw(side, features, image)
    assert drawn.startswith(b"\xff\xd8") and drawn == turned.draw(side, features[3:], image)


def test_once_an_image_agrees_those_behind_it_are_seen_in_its_turn_and_upright(museum, tmp_path) -> None:
    check = check_at(tmp_path / "kept", LocalFeatureExtractor(build_embedder("lite0_in")), turns=4)
    image, other = files(museum, "database")[:2]
    quarters = [tmp_path / "0.png", tmp_path / "1.png", tmp_path / "2.png"]
    for i, file in enumerate(quarters):
        Image.open(image).rotate(90 * i, expand=True).save(file)
    database, each = [other, image, *quarters], np.arange(5)
    alone = np.concatenate([count_inliers(check, [quarters[1]], np.array([[i]]), database)[0] for i in each])
    assert alone[0].max() < 40 < 300 < alone[1:].max(axis=1).min() and alone[:, 0].argmax() == 3
    counts = count_inliers(check, [quarters[1]], each[None], database)[0]
    assert counts[:2].tolist() == alone[:2].tolist() and alone[1].argmax() == alone[2].argmax() == 3
    assert counts[2:, [0, 3]].tolist() == alone[2:, [0, 3]].tolist()
    assert alone[4].argmax() == 1 and not counts[2:, [1, 2]].any()


@pytest.mark.parametrize(
    ("n_turns", "expected"),
    [
        (1, [[3], [0], [50], [2]]), (2, [[3, 60], [0, 0], [50, 4], [2, 70]]),  # all that there is, whoever is sure
        (3, [[3, 60, 1], [0, 0, 0], [50, 4, 0], [2, 70, 0]]),
    ],
)  # fmt: skip
def test_the_first_image_that_agrees_tells_the_turn_and_no_later_one(n_turns, expected, monkeypatch) -> None:
    of_turns = {"first": (3, 60, 1), "upright": (50, 4, 2), "third": (2, 70, 90)}
    count = lambda turn, image, _: SimpleNamespace(n_inliers=of_turns[image][turn])  # noqa: E731
    monkeypatch.setattr("metilr.geometry.check.verify", count)
    check = GeometricCheck(OfKept(), Path(), None, 4, False, n_turns)
    images = ["first", None, "upright", "third"]
    with ThreadPoolExecutor(2) as pool:
        assert check.count(range(n_turns), images, pool.map).tolist() == expected
    assert check.count(range(n_turns), images).tolist() == expected


def test_features_of_squares_are_kept_apart(museum, extractor, tmp_path) -> None:
    file = next(file for file in files(museum, "val") if len({*load_image(file, 64).shape[1:]}) == 2)
    kept, square = check_at(tmp_path, extractor, 64), check_at(tmp_path, extractor, (64, 64))
    assert kept.folder != square.folder
    features = square.features(file)
    expected = extractor.extract(load_image(file, (64, 64)))
    np.testing.assert_array_equal(features.positions, expected.positions)
    assert not np.array_equal(features.positions, kept.features(file).positions)


def test_counts_do_not_depend_on_order_company_or_what_is_kept(museum, extractor, tmp_path) -> None:
    queries, database = files(museum, "val")[:4], files(museum, "database")
    candidates = everything(museum, "val")[:4, :5]
    counts = count_inliers(check_at(tmp_path / "a", extractor), queries, candidates, database)
    kept = dataclasses.replace(check_at(tmp_path / "a", extractor), extractor=OfKept(extractor.tolerance))
    np.testing.assert_array_equal(count_inliers(kept, queries, candidates, database), counts)
    backwards = count_inliers(check_at(tmp_path / "b", extractor), queries[::-1], candidates[::-1, ::-1], database)
    np.testing.assert_array_equal(backwards[::-1, ::-1], counts)
    alone = count_inliers(check_at(tmp_path / "c", extractor), queries[2:3], candidates[2:3, 1:2], database)
    assert alone[0, 0].tolist() == counts[2, 1].tolist()


@dataclasses.dataclass
class OfKept:
    """Stands for an extractor where all features are kept."""

    tolerance: float = 1.0

    def extract_turned(self, image: torch.Tensor, degrees: float) -> LocalFeatures:
        raise AssertionError("computed again")


def test_no_candidate_and_bad_images_have_no_inliers(museum, extractor, tmp_path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no image")
    database = [files(museum, "database")[0], bad, tmp_path / "missing.jpg"]
    inliers = count_inliers(
        check_at(tmp_path / "kept", extractor), database, np.array([[0, 1, 2, NO_ROW]] * 3), database
    )
    assert inliers[0, 0, 0] > 50  # an image and itself
    assert inliers.sum() == inliers[0, 0, 0]


@pytest.fixture
def image(museum, tmp_path) -> Path:
    file = tmp_path / "a.jpg"
    file.write_bytes(files(museum, "database")[0].read_bytes())
    return file


def refuses_to_compute(check: GeometricCheck, image: Path) -> LocalFeatures:
    return dataclasses.replace(check, extractor=OfKept()).features(image)


def test_new_and_kept_features_are_the_same(image, extractor, tmp_path) -> None:
    check = check_at(tmp_path / "kept", extractor)
    for one, two in zip(check.features(image), refuses_to_compute(check, image), strict=True):
        assert one.dtype == two.dtype == np.float32 and len(one) > 100
        np.testing.assert_array_equal(one, two)


def test_other_settings_images_and_contents_are_computed(image, extractor, tmp_path) -> None:
    check, other = check_at(tmp_path / "kept", extractor), tmp_path / "b.jpg"
    check.features(image)
    other.write_bytes(image.read_bytes())
    others = (
        check_at(tmp_path / "kept", extractor, 100),
        check_at(tmp_path / "kept", LocalFeatureExtractor(embedder_of("r18_in", 3))),
    )
    for another, file in ((others[0], image), (others[1], image), (check, other)):
        with pytest.raises(AssertionError, match="computed again"):
            refuses_to_compute(another, file)
    image.write_bytes(image.read_bytes() + b"longer")
    with pytest.raises(AssertionError, match="computed again"):
        refuses_to_compute(check, image)


@pytest.mark.parametrize("damage", ["short", "bit", "empty", "text"])
def test_damaged_features_are_computed_again(image, extractor, tmp_path, damage: str) -> None:
    check = check_at(tmp_path / "kept", extractor)
    whole = check.features(image)
    [entry] = check.folder.iterdir()
    content = entry.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    entry.write_bytes({"short": content[:-100], "bit": flipped, "empty": b"", "text": b"no features"}[damage])
    with pytest.raises(AssertionError, match="computed again"):
        refuses_to_compute(check, image)
    check.features(image)
    np.testing.assert_array_equal(refuses_to_compute(check, image).descriptors, whole.descriptors)


def test_what_two_images_share_is_drawn_where_something_is(image, extractor, tmp_path) -> None:
    check = check_at(tmp_path / "kept", extractor)
    photo, features = load_image(image), check.query_features(image)
    assert check.draw(photo, features, image).startswith(b"\xff\xd8")
    assert check.draw(photo, features, tmp_path / "missing.jpg") is None
    nothing = LocalFeatures(features[0].positions[:0], features[0].descriptors[:0])
    assert check.draw(photo, [nothing], image) is None


def test_several_callers_leave_the_number_of_threads_as_it_was():
    before = torch.get_num_threads()
    torch.set_num_threads(2)

    def call(_):
        with pool_of(2) as pool:
            return [*pool.map(lambda _: torch.get_num_threads(), range(2))]

    try:
        with ThreadPoolExecutor(4) as callers:
            assert {n for each in callers.map(call, range(12)) for n in each} == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
