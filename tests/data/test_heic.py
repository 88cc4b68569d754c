"""Photos of phones: HEIC with the extra, AVIF by Pillow."""

import io

import numpy as np
import pytest
from PIL import Image, features

from metilr.collection.collection import BadPhotoError, load_photo
from metilr.data import decode
from metilr.data.decode import FORMATS, BadImageError, begins_as_image, image_shape, load_image

LINE = r"\(a HEIC or AVIF photo: pip install 'metilr\[heic\]' or convert it\)"
BRANDS = ("heic", "heix", "heim", "heis", "hevc", "hevx", "hevm", "hevs", "mif1", "msf1", "avif", "avis")


@pytest.mark.parametrize("brand", BRANDS)
def test_without_what_reads_it_one_line_says_how(tmp_path, monkeypatch, brand):
    monkeypatch.setattr(decode, "formats", lambda: FORMATS)
    file = tmp_path / "photo.jpg"
    file.write_bytes(b"\0\0\0\x18ftyp" + brand.encode() + bytes(200))
    for function in (load_image, image_shape):
        with pytest.raises(BadImageError, match=LINE):
            function(file)
    with pytest.raises(BadPhotoError, match=LINE):
        load_photo(io.BytesIO(file.read_bytes()))
    assert not begins_as_image(file)


def test_a_film_is_no_image(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"\0\0\0\x18ftypisom" + bytes(200))
    with pytest.raises(BadImageError, match="not an image"):
        load_image(tmp_path / "a.jpg")


def saved(folder, kind):
    """A bright corner at the top left, under a name that says otherwise; EXIF turns it to the top right."""
    if kind == "HEIF":
        pytest.importorskip("pillow_heif", reason="needs metilr[heic]").register_heif_opener()
    elif not features.check("avif"):
        pytest.skip("Pillow was built without AVIF")
    pixels = np.zeros((60, 80, 3), np.uint8)
    pixels[:20, :20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(folder / "photo.jpg", kind, quality=90, exif=exif.tobytes())
    return folder / "photo.jpg"


@pytest.mark.parametrize("kind", ["AVIF", "HEIF"])
def test_it_is_read_upright_and_within_limits(tmp_path, kind):
    file = saved(tmp_path, kind)
    image = load_image(file).float().mean(dim=0)
    assert tuple(image.shape) == image_shape(file) == (80, 60) and begins_as_image(file)
    assert image[:18, 42:].mean() > 245 and image[22:].mean() < 5 and image[:, :38].mean() < 5
    assert load_photo(io.BytesIO(file.read_bytes())).image.shape == (3, 80, 60)
    for function in (load_image, image_shape):
        with pytest.raises(BadImageError, match="megapixels"):
            function(file, limit=4799)


@pytest.mark.parametrize("kind", ["AVIF", "HEIF"])
def test_what_is_damaged_is_a_bad_image(tmp_path, kind):
    file = saved(tmp_path, kind)
    content = file.read_bytes()
    for length in (20, 100, len(content) // 2, len(content) - 5):
        file.write_bytes(content[:length])
        with pytest.raises(BadImageError):
            load_image(file)
