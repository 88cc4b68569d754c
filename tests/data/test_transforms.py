import numpy as np
import pytest
import torch
from PIL import Image

from metilr.data.decode import BadImageError, image_shape, load_image

# What EXIF orientation says about the stored array: how to turn it upright.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


def save(image, file, **options):
    image.save(file, **options)
    return file


def pixels(file, **options):
    return load_image(file, **options).permute(1, 2, 0).numpy()  # CxHxW to HxWxC


def gradient(height, width):
    rng = np.random.default_rng(height * 1000 + width)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def palette_image(**_):
    image = Image.new("P", (2, 1))
    image.putpalette([200, 10, 20, 0, 0, 255] + [0] * 756)
    image.putdata([0, 1])
    return image


@pytest.mark.parametrize(
    ("image", "options", "expected"),
    [
        (Image.fromarray(np.array([[False, True]])), {}, [[0] * 3, [255] * 3]),
        (Image.fromarray(np.array([[7, 200]], np.uint8)), {}, [[7] * 3, [200] * 3]),
        (Image.fromarray(np.array([[[9, 8, 7], [0, 255, 1]]], np.uint8)), {}, [[9, 8, 7], [0, 255, 1]]),
        # value * alpha + 255 * (1 - alpha): 100 at 0, 100 at 255
        (Image.fromarray(np.array([[[100, 0], [100, 255]]], np.uint8), "LA"), {}, [[255] * 3, [100] * 3]),
        # alpha 51/255 = 0.2: 0.2 * (100, 50, 0) + 0.8 * 255 = (224, 214, 204)
        (Image.fromarray(np.array([[[100, 50, 0, 51], [1, 2, 3, 255]]], np.uint8)), {}, [[224, 214, 204], [1, 2, 3]]),
        (palette_image(), {}, [[200, 10, 20], [0, 0, 255]]),
        (palette_image(), {"transparency": 1}, [[200, 10, 20], [255, 255, 255]]),
        (palette_image(), {"transparency": bytes([0, 255])}, [[255, 255, 255], [0, 0, 255]]),
        # 16 bits: 257 * v is v
        (Image.fromarray(np.array([[257 * 100, 65535]], np.uint16)), {}, [[100] * 3, [255] * 3]),
        (Image.fromarray(np.array([[128, 129]], np.uint16)), {}, [[0] * 3, [1] * 3]),
    ],
    ids=["1", "L", "RGB", "LA", "RGBA", "P", "P one transparent", "P alpha table", "I;16", "I;16 rounding"],
)  # fmt: skip
def test_png_modes(tmp_path, image, options, expected):
    assert pixels(save(image, tmp_path / "a.png", **options)).tolist() == [expected]


def test_cmyk(tmp_path):
    ink = np.array([[[0, 0, 0, 0], [0, 0, 0, 255], [255, 0, 0, 0], [0, 255, 255, 0]]], np.uint8)
    read = pixels(save(Image.fromarray(ink, "CMYK"), tmp_path / "a.tif"))
    assert read.tolist() == [[[255] * 3, [0] * 3, [0, 255, 255], [255, 0, 0]]]


@pytest.mark.parametrize("kind", ["<u2", ">u2"])
def test_deep_grey_tiff_is_scaled_not_clipped(tmp_path, kind):
    deep = np.array([[0, 257 * 3, 257 * 254, 65535]]).astype(kind)
    mode = {"<u2": "I;16", ">u2": "I;16B"}[kind]
    image = Image.frombytes(mode, (4, 1), deep.tobytes())
    assert pixels(save(image, tmp_path / "a.tif"))[0, :, 0].tolist() == [0, 3, 254, 255]


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (3, 2), colour) for colour in ("red", "blue", "green")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (pixels(tmp_path / "a.gif") == [255, 0, 0]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "tif", "webp"])
def test_exif_orientation(tmp_path, orientation, kind):
    stored = gradient(3, 5)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "webp" else {}
    file = save(Image.fromarray(stored), tmp_path / f"a.{kind}", exif=exif, **options)
    upright = UPRIGHT[orientation](stored)
    np.testing.assert_array_equal(pixels(file), upright)
    assert image_shape(file) == upright.shape[:2]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_of_jpeg_with_resizing(tmp_path, orientation):
    stored = np.zeros((16, 48, 3), np.uint8)
    stored[:8, :8] = 255  # one bright corner
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = save(Image.fromarray(stored), tmp_path / "a.jpg", exif=exif, quality=95)
    read, upright = pixels(file, image_size=24), UPRIGHT[orientation](stored)
    assert read.shape[:2] == image_shape(file, 24) == (upright.shape[0] // 2, upright.shape[1] // 2)
    assert (np.abs(read.astype(int) - upright[::2, ::2]) < 60).mean() > 0.9
    corners = [read[0, 0, 0], read[0, -1, 0], read[-1, 0, 0], read[-1, -1, 0]]
    assert int(np.argmax(corners)) == int(np.argmax([upright[y, x, 0] for y in (0, -1) for x in (0, -1)]))


def test_broken_exif_does_not_hide_the_picture(tmp_path):
    file = save(Image.new("RGB", (6, 4), "white"), tmp_path / "a.jpg", exif=b"Exif\0\0garbage that is no TIFF")
    assert image_shape(file) == (4, 6) and pixels(file).shape == (4, 6, 3)


@pytest.mark.parametrize(
    ("shape", "image_size", "expected"),
    [
        ((40, 80), 20, (10, 20)),
        ((80, 40), 160, (160, 80)),
        ((3, 1000), 100, (1, 100)),  # 0.3 px would be nothing
        ((1, 1), 7, (7, 7)),
        ((1, 1), None, (1, 1)),
        ((33, 33), 1, (1, 1)),
        ((40, 80), (20, 20), (20, 20)),
        ((80, 40), (160, 160), (160, 160)),
        ((3, 1000), (7, 7), (7, 7)),
    ],
)
def test_image_size_is_the_longest_side_or_both(tmp_path, shape, image_size, expected):
    file = save(Image.fromarray(gradient(*shape)), tmp_path / "a.png")
    image = load_image(file, image_size)
    assert image.dtype == torch.uint8 and image.is_contiguous()
    assert tuple(image.shape) == (3, *expected) and image_shape(file, image_size) == expected


def test_shape_from_the_header_is_the_shape_of_the_pixels(tmp_path):
    rng = np.random.default_rng(5)
    for _ in range(120):
        height, width, size = rng.integers(1, 120, 3).tolist()
        exif = Image.Exif()
        exif[0x0112] = int(rng.integers(1, 9))
        kind = str(rng.choice(["jpg", "png", "tif", "webp", "bmp"]))
        file = save(Image.new("RGB", (width, height)), tmp_path / f"a.{kind}", exif=exif)
        for image_size in (None, size, (size, size)):
            assert image_shape(file, image_size) == tuple(load_image(file, image_size).shape[1:])


def bad(file, *functions):
    for function in functions or (load_image, image_shape):
        with pytest.raises(BadImageError) as caught:
            function(file)
        message = str(caught.value)
        assert message.startswith(f"{file}: cannot be decoded (") and "bad_images skip" in message
        assert "\n" not in message
    return message


def test_truncated_jpeg(tmp_path):
    file = save(Image.fromarray(gradient(64, 64)), tmp_path / "a.jpg")
    file.write_bytes(file.read_bytes()[:1500])
    assert "truncated" in bad(file, load_image)
    assert image_shape(file) == (64, 64)  # the header is whole


def test_what_is_no_image(tmp_path):
    (tmp_path / "zero.jpg").write_bytes(b"")
    assert "not an image" in bad(tmp_path / "zero.jpg")
    (tmp_path / "text.jpg").write_text("hello, I am a text")
    assert "not an image" in bad(tmp_path / "text.jpg")
    assert "no such file" in bad(tmp_path / "none.jpg")
    (tmp_path / "folder.jpg").mkdir()
    assert "not a regular file" in bad(tmp_path / "folder.jpg")


def test_float_pixels_have_no_range(tmp_path):
    file = save(Image.fromarray(np.array([[0.0, 1.0]], np.float32)), tmp_path / "a.tif")
    assert "32 bits, floating point" in bad(file)
