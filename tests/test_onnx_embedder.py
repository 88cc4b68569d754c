"""The embedder that is copied reads photos as metilr does, and refuses what it does not read."""

import io
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image, ImageCms

from metilr.data.decode import to_tensor
from tests.profiles import ADOBE_RGB, DISPLAY_P3, rgb_profile

pytest.importorskip("onnxruntime", reason="needs metilr[onnx]")
from metilr.onnx_embedder import to_rgb

ORIENTATION = 0x0112


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 14, 3), dtype=np.uint8))


def files() -> Iterator[tuple[str, bytes, int]]:
    """Of each usual kind one: its name, what is in it, and by how much a level may differ."""

    def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
        stream = io.BytesIO()
        image.save(stream, kind, **options)
        return stream.getvalue()

    rgb = picture()
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        yield f"turned {orientation}", saved(rgb, "JPEG", exif=exif), 0
    for mode in ("L", "1", "P", "CMYK"):
        yield mode, saved(rgb.convert(mode), "TIFF"), 0
    for name, profile in (("P3", rgb_profile(DISPLAY_P3, 2.2)), ("Adobe RGB", rgb_profile(ADOBE_RGB, 2.2))):
        yield name, saved(rgb, icc_profile=profile), 0
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    yield "sRGB", saved(rgb, icc_profile=srgb), 0
    yield "damaged profile", saved(rgb, icc_profile=b"no profile"), 0
    translucent = rgb.copy()
    translucent.putalpha(rgb.getchannel("R"))
    yield "RGBA", saved(translucent), 1
    yield "RGBA, P3", saved(translucent, icc_profile=rgb_profile(DISPLAY_P3, 2.2)), 1
    yield "LA", saved(translucent.convert("LA")), 1
    yield "a transparent colour", saved(rgb, transparency=rgb.getpixel((3, 4))), 0
    yield "a transparent entry", saved(rgb.quantize(8), transparency=2), 0


FILES = list(files())


@pytest.mark.parametrize(("content", "most"), [each[1:] for each in FILES], ids=[each[0] for each in FILES])
def test_a_photo_is_decoded_as_metilr_does(content, most):
    found = np.asarray(to_rgb(Image.open(io.BytesIO(content)))).astype(int)
    expected = to_tensor(Image.open(io.BytesIO(content))).permute(1, 2, 0).numpy()
    assert found.shape == expected.shape and np.abs(found - expected).max() <= most


@pytest.mark.parametrize("name", ["P3", "turned 6", "RGBA", "a transparent entry"])
def test_what_is_decoded_is_not_what_the_file_holds(name):
    """Or the test before would pass for an embedder that leaves pixels as they are."""
    [content] = [content for kind, content, _ in FILES if kind == name]
    stored = Image.open(io.BytesIO(content))
    assert not np.array_equal(np.asarray(to_rgb(stored)), np.asarray(stored.convert("RGB")))


@pytest.mark.parametrize("image", [Image.new("I;16", (4, 4)), Image.new("I", (4, 4)), Image.new("F", (4, 4))])
def test_grey_of_more_than_8_bits_is_refused(image):
    with pytest.raises(ValueError, match=f"pixels of mode {image.mode}: convert the image to 8 bits"):
        to_rgb(image)


def test_an_image_of_which_nothing_shows_is_refused():
    with pytest.raises(ValueError, match="wholly transparent"):
        to_rgb(Image.new("RGBA", (4, 4)))
