"""The cache of local features: the same values with and without it, within its limit."""

import os
from pathlib import Path

import numpy as np
import pytest

from metilr.errors import UserError
from metilr.geometry.features import FeatureCache
from metilr.geometry.verify import LocalFeatures


def features(seed: int, n: int = 40) -> LocalFeatures:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(n, 16)).astype(np.float32)
    return LocalFeatures(
        rng.uniform(0, 300, (n, 2)).astype(np.float32), rows / np.linalg.norm(rows, axis=1, keepdims=True)
    )


def refuse() -> LocalFeatures:
    raise AssertionError("computed again")


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    files = [tmp_path / f"{i}.jpg" for i in range(8)]
    for file in files:
        file.write_bytes(b"an image")
    return files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def n_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def equal(one: LocalFeatures, two: LocalFeatures) -> bool:
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(one, two, strict=True))


def test_new_and_kept_features_are_the_same(images: list[Path], folder: Path) -> None:
    computed = features(0)
    new = FeatureCache(folder, {}).features(images[0], lambda: computed)
    kept = FeatureCache(folder, {}).features(images[0], refuse)
    assert equal(new, kept)
    assert new.descriptors.dtype == np.float32
    np.testing.assert_array_equal(new.positions, computed.positions)
    np.testing.assert_allclose(new.descriptors, computed.descriptors, atol=5e-4)  # float16


def test_no_features_are_kept_as_such(images: list[Path], folder: Path) -> None:
    cache = FeatureCache(folder, {})
    cache.features(images[0], lambda: features(0, n=0))
    assert cache.features(images[0], refuse).descriptors.shape == (0, 16)


def test_other_settings_images_and_contents_are_other_entries(images: list[Path], folder: Path) -> None:
    FeatureCache(folder, {"stride": 8}).features(images[0], lambda: features(0))
    with pytest.raises(AssertionError, match="computed again"):
        FeatureCache(folder, {"stride": 16}).features(images[0], refuse)
    with pytest.raises(AssertionError, match="computed again"):
        FeatureCache(folder, {"stride": 8}).features(images[1], refuse)
    images[0].write_bytes(b"a longer image")
    with pytest.raises(AssertionError, match="computed again"):
        FeatureCache(folder, {"stride": 8}).features(images[0], refuse)


@pytest.mark.parametrize("damage", ["short", "bit", "empty", "text"])
def test_a_damaged_entry_is_computed_again(images: list[Path], folder: Path, damage: str) -> None:
    whole = FeatureCache(folder, {}).features(images[0], lambda: features(0))
    [entry] = folder.iterdir()
    content = entry.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    entry.write_bytes({"short": content[:-100], "bit": flipped, "empty": b"", "text": b"no features"}[damage])
    assert equal(FeatureCache(folder, {}).features(images[0], lambda: features(0)), whole)
    assert equal(FeatureCache(folder, {}).features(images[0], refuse), whole)


def test_the_limit_holds_and_the_least_recently_used_goes(images: list[Path], folder: Path) -> None:
    FeatureCache(folder, {}).features(images[0], lambda: features(0))
    one = n_bytes(folder)
    cache = FeatureCache(folder, {}, limit=4 * one)
    for i in range(1, 4):
        cache.features(images[i], lambda: features(0))
    for age, i in enumerate((0, 3, 2, 1)):  # files made within a tick of the clock have one time
        os.utime(cache._entry(images[i]), ns=(age, age))
    cache.features(images[0], refuse)  # used: now 3 is the oldest
    for i in range(4, 8):
        cache.features(images[i], lambda: features(0))
        assert n_bytes(folder) <= 4 * one
        if i == 4:
            cache.features(images[0], refuse)
            with pytest.raises(AssertionError, match="computed again"):
                cache.features(images[3], refuse)
    cache.features(images[7], refuse)


def test_a_folder_filled_by_another_process_is_counted(images: list[Path], folder: Path) -> None:
    caches = [FeatureCache(folder, {}, limit=4_000) for _ in range(2)]
    for i, image in enumerate(images):
        caches[i % 2].features(image, lambda: features(0))
        assert n_bytes(folder) <= 4_000


def test_other_files_in_the_folder_are_left_alone(images: list[Path], folder: Path) -> None:
    folder.mkdir()
    (folder / "whitening.npz").write_bytes(bytes(10_000))
    cache = FeatureCache(folder, {}, limit=1)
    for image in images:
        cache.features(image, lambda: features(0))
    assert [file.name for file in folder.iterdir()] == ["whitening.npz"]


def test_a_cache_that_cannot_be_made_is_a_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        FeatureCache(tmp_path / "file", {})
