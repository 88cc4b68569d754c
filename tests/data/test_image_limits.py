"""Limits of what is decoded: kinds, pixels, scans."""

import io
import os

import pytest
from PIL import EpsImagePlugin, Image

from metilr.collection.collection import BadPhotoError, load_photo
from metilr.commands.verify import find_fault
from metilr.data.decode import (
    MAX_MEGAPIXELS,
    BadImageError,
    image_shape,
    limit_images,
    load_image,
    max_pixels,
    pixels_of,
)
from metilr.data.views import Images
from metilr.errors import UserError
from tests.hostile import write_hostile_files


@pytest.fixture(autouse=True)
def usual_limit():
    yield
    limit_images(MAX_MEGAPIXELS)


@pytest.mark.parametrize(("kind", "function"), [("bomb", load_image), ("large", image_shape)])
def test_a_bomb_is_refused_by_its_header_with_file_limit_and_option(tmp_path, kind, function):
    file = write_hostile_files(tmp_path)[kind]
    with pytest.raises(BadImageError) as caught:
        function(file)
    assert str(caught.value) == (
        f"{file}: cannot be decoded (more than 180 megapixels); make it smaller, raise max_megapixels, or leave it "
        "out with bad_images skip"
    )


def test_the_limit_is_an_option_and_the_last_allowed_size_is_read(tmp_path):
    Image.new("RGB", (50, 20)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", limit=1000).shape == (3, 20, 50)
    with pytest.raises(BadImageError, match=r"more than 0\.000999 megapixels"):
        load_image(tmp_path / "a.png", limit=999)
    limit_images(0.000999)
    assert "megapixels" in str(find_fault(tmp_path / "a.png"))
    limit_images(0.001)
    assert find_fault(tmp_path / "a.png") is None


def test_more_than_pillow_allows_can_be_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    Image.new("RGB", (50, 20)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").shape == (3, 20, 50)


def test_workers_have_the_limit_of_the_process_that_made_their_images(tmp_path):
    limit_images(0.5)
    images = Images([tmp_path / "a.png"], ["a.png"], None)
    limit_images(2)
    assert images.max_pixels == 500_000 and max_pixels() == 2_000_000


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_a_limit_is_a_positive_number(value):
    with pytest.raises(UserError, match="max_megapixels"):
        pixels_of(value)


def test_no_program_is_started_for_an_image(tmp_path, monkeypatch):
    """Pillow has Ghostscript run what a file with any ending says, if it is PostScript."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("Ghostscript was started"))
    file = write_hostile_files(tmp_path)["program"].rename(tmp_path / "photo.jpg")
    for function in (load_image, image_shape):
        with pytest.raises(BadImageError, match="not an image"):
            function(file)


def test_a_progressive_jpeg_of_thousands_of_scans_is_refused(tmp_path):
    stream = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(stream, "JPEG", progressive=True)
    content = stream.getvalue()
    last = content[content.rindex(b"\xff\xda") : -2]
    (tmp_path / "many.jpg").write_bytes(content[:-2] + 1000 * last + content[-2:])
    with pytest.raises(BadImageError, match="more than 100 scans"):
        load_image(tmp_path / "many.jpg")
    (tmp_path / "few.jpg").write_bytes(content)
    assert load_image(tmp_path / "few.jpg").shape == (3, 64, 64)


def test_a_pipe_is_no_image_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(BadImageError, match=r"a\.jpg: cannot be decoded \(not a regular file\)"):
        load_image(tmp_path / "a.jpg")
    with pytest.raises(BadPhotoError, match="not a regular file"):
        load_photo(tmp_path / "a.jpg")
