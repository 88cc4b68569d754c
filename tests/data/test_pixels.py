"""What the pixels of a file mean: depth, sign, polarity, transparency and colour profile."""

import itertools
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms, TiffImagePlugin

from metilr.data.decode import BadImageError, load_image, to_tensor
from tests.profiles import (
    ADOBE_RGB,
    D50,
    DISPLAY_P3,
    SRGB,
    cmyk_profile,
    grey_profile,
    rgb_profile,
    srgb_levels,
    xyz_of_lab,
)
from tests.tiffs import COMPRESSION, EXTRA, HEIGHT, PALETTE, PLANAR, PROFILE, SAMPLE_FORMAT, WIDTH, packed, tiff

DEPTHS, ORDERS = (1, 2, 4, 8, 12, 16), ("<", ">")
UNSIGNED, SIGNED, FLOAT = 1, 2, 3
SHORT = 3


def pixels(file, content=None):
    if content is not None:
        file.write_bytes(content)
    return load_image(file).permute(1, 2, 0).numpy()  # CxHxW to HxWxC


def every_level(bits):
    """A picture of nine columns (bytes are not full), from the darkest sample to the brightest."""
    return [[(2**bits - 1) * (9 * y + x) // 62 for x in range(9)] for y in range(7)]


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(("bits", "order", "polarity"), [*itertools.product(DEPTHS, ORDERS, (0, 1))])
def test_a_grey_tiff_of_any_depth_and_polarity_is_the_picture_or_refused_by_name(
    tmp_path, bits, order, polarity, compressed
):
    """A sample v of b bits is 255 v / (2^b - 1), or 255 less that where 0 is white."""
    samples = every_level(bits)
    content = tiff([packed(samples, bits, order)], 9, 7, (bits,), order, polarity, compressed)
    right = np.rint(np.array(samples) * 255 / (2**bits - 1))
    right = right if polarity else 255 - right
    if (bits, order, polarity) in {(12, "<", 0), (12, ">", 0), (12, ">", 1), (16, ">", 0)}:
        white = ", 0 is white" if polarity == 0 else ""
        with pytest.raises(BadImageError, match=rf"\(a TIFF of {bits} bits{white}; convert it to 8-bit RGB\)"):
            pixels(tmp_path / "a.tif", content)
    else:
        np.testing.assert_array_equal(pixels(tmp_path / "a.tif", content)[..., 1], right)


@pytest.mark.parametrize(
    ("bits", "kind", "named"),
    [(8, SIGNED, "8 bits, signed"), (16, SIGNED, "16 bits, signed"), (32, SIGNED, "32 bits, signed"),
     (32, UNSIGNED, "32 bits"), (32, FLOAT, "32 bits, floating point"), (16, FLOAT, "16 bits, floating point")],
)  # fmt: skip
@pytest.mark.parametrize(("order", "polarity", "compressed"), [*itertools.product(ORDERS, (0, 1), (False, True))])
def test_pixels_without_a_stated_range_are_refused(tmp_path, bits, kind, named, order, polarity, compressed):
    content = tiff(
        [packed(every_level(8), bits, order)],
        9,
        7,
        (bits,),
        order,
        polarity,
        compressed,
        [(SAMPLE_FORMAT, SHORT, [kind])],
    )
    with pytest.raises(BadImageError, match=rf"\(a TIFF of {named}[a-z0-9, ]*; convert it to 8-bit RGB\)"):
        pixels(tmp_path / "a.tif", content)


def colours(bits=16):
    return np.random.default_rng(3).integers(0, 2**bits, (7, 9, 3))


@pytest.mark.parametrize(("order", "compressed"), [*itertools.product(ORDERS, (False, True))])
def test_colour_tiffs_of_16_bits(tmp_path, order, compressed):
    """Against OpenCV, which reads all 16; one level is the rounding."""
    deep = colours()
    content = tiff([packed(deep.reshape(7, 27).tolist(), 16, order)], 9, 7, (16,) * 3, order, 2, compressed)
    read = pixels(tmp_path / "a.tif", content)
    reference = cv2.imread(str(tmp_path / "a.tif"), cv2.IMREAD_UNCHANGED)[..., ::-1]
    np.testing.assert_array_equal(reference, deep)
    assert np.abs(read - reference / 257).max() <= 1


@pytest.mark.parametrize(("bits", "order", "compressed"), [*itertools.product((8, 16), ORDERS, (False, True))])
def test_colour_tiffs_of_separate_planes(tmp_path, bits, order, compressed):
    deep = colours(bits)
    planes = [packed(deep[..., channel].tolist(), bits, order) for channel in range(3)]
    content = tiff(planes, 9, 7, (bits,) * 3, order, 2, compressed, [(PLANAR, SHORT, [2])])
    if bits == 16 and not compressed:
        with pytest.raises(BadImageError, match="a TIFF of 3 x 16 bits, in separate planes; convert"):
            pixels(tmp_path / "a.tif", content)
    else:
        assert np.abs(pixels(tmp_path / "a.tif", content) - deep / (257 if bits == 16 else 1)).max() <= (bits == 16)


@pytest.mark.parametrize(("bits", "polarity", "compressed"), [*itertools.product((1, 4, 8, 16), (0, 1), (False, True))])
def test_grey_tiffs_that_call_their_one_plane_separate(tmp_path, bits, polarity, compressed):
    samples = every_level(bits)
    content = tiff([packed(samples, bits)], 9, 7, (bits,), "<", polarity, compressed, [(PLANAR, SHORT, [2])])
    right = np.rint(np.array(samples) * 255 / (2**bits - 1))
    if compressed or (bits, polarity) == (8, 1):
        read = pixels(tmp_path / "a.tif", content)
        np.testing.assert_array_equal(read[..., 0], right if polarity else 255 - right)
    else:
        with pytest.raises(BadImageError, match="in separate planes; convert"):
            pixels(tmp_path / "a.tif", content)


@pytest.mark.parametrize("most", [255, 65535])
def test_the_values_of_a_tiffs_palette_have_16_bits(tmp_path, most):
    palette = [most * level // 3 for channel in (0, 3, 1) for level in (channel, 3, 0, 1)]
    content = tiff([packed([[0, 1, 2, 3]], 2)], 4, 1, (2,), "<", 3, more=[(PALETTE, SHORT, palette)])
    if most == 65535:
        assert pixels(tmp_path / "a.tif", content)[0].tolist() == [[0, 255, 85], [255] * 3, [0] * 3, [85] * 3]
    else:
        with pytest.raises(BadImageError, match="palette has 8-bit values"):
            pixels(tmp_path / "a.tif", content)


def test_what_no_photometric_interpretation_is_known_of_is_refused_by_name(tmp_path):
    with pytest.raises(BadImageError, match=r"\(a TIFF of 8 bits, photometric interpretation 32803; convert it"):
        pixels(tmp_path / "a.tif", tiff([bytes(63)], 9, 7, (8,), "<", 32803))


@pytest.mark.parametrize("tag", [WIDTH, HEIGHT])
def test_a_tiff_without_a_size_is_no_image(tmp_path, tag):
    with pytest.raises(BadImageError, match=r"\(not an image\)"):
        pixels(tmp_path / "a.tif", tiff([bytes(63)], 9, 7, more=[(tag, SHORT, [])]))


def test_a_tiff_of_unknown_compression_is_refused_by_name(tmp_path):
    with pytest.raises(BadImageError, match=r"\(a TIFF of compression 34712, which is not read; convert"):
        pixels(tmp_path / "a.tif", tiff([bytes(63)], 9, 7, more=[(COMPRESSION, SHORT, [34712])]))


def test_a_jpeg_of_12_bits_is_refused_by_name(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.jpg")
    content = bytearray((tmp_path / "a.jpg").read_bytes())
    content[content.index(b"\xff\xc0") + 4] = 12
    with pytest.raises(BadImageError, match=r"\(a JPEG that is damaged, lossless or of 12 bits; convert"):
        pixels(tmp_path / "a.jpg", content)


GREY, RGB, INDEXED, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6


def png(rows, width, depth, colour, *chunks):
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    content = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = [(b"IHDR", header), *chunks, (b"IDAT", content), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


@pytest.mark.parametrize("transparent", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_grey_pngs_of_any_depth_with_and_without_a_transparent_value(tmp_path, depth, transparent):
    samples = every_level(depth)
    right = np.rint(np.array(samples) * 255 / (2**depth - 1))
    value = samples[4][4]
    if transparent:
        right[np.array(samples) == value] = 255
    chunks = [(b"tRNS", struct.pack(">H", value))] if transparent else []
    content = png([packed([row], depth, ">") for row in samples], 9, depth, GREY, *chunks)
    np.testing.assert_array_equal(pixels(tmp_path / "a.png", content)[..., 2], right)


@pytest.mark.parametrize("depth", [8, 16])
def test_colour_pngs_with_a_transparent_colour(tmp_path, depth):
    deep = colours(depth)
    right = deep // (257 if depth == 16 else 1)
    right[2, 3] = 255
    chunk = b"tRNS", struct.pack(">3H", *deep[2, 3])
    content = png([packed([row.ravel()], depth, ">") for row in deep], 9, depth, RGB, chunk)
    assert np.abs(pixels(tmp_path / "a.png", content) - right).max() <= (depth == 16)


@pytest.mark.parametrize(("depth", "kind"), [*itertools.product((8, 16), (GREY_ALPHA, RGB_ALPHA))])
def test_pngs_with_alpha(tmp_path, depth, kind):
    """v a + (1 - a) on white."""
    n = 1 if kind == GREY_ALPHA else 3
    samples = np.random.default_rng(4).integers(0, 2**depth, (7, 9, n + 1))
    unit = samples / (2**depth - 1)
    right = 255 * (unit[..., :n] * unit[..., n:] + 1 - unit[..., n:])
    content = png([packed([row.ravel()], depth, ">") for row in samples], 9, depth, kind)
    assert np.abs(pixels(tmp_path / "a.png", content) - right).max() < 2


@pytest.mark.parametrize("associated", [1, 2])
@pytest.mark.parametrize("n", [1, 3])
def test_tiffs_with_alpha(tmp_path, n, associated):
    """Colours that are multiplied by their alpha already (1) and those that are not (2)."""
    samples = np.random.default_rng(5).integers(0, 256, (7, 9, n + 1))
    colour, alpha = samples[..., :n], samples[..., n:]
    stored = np.rint(colour * (alpha / 255)).astype(int) if associated == 1 else colour
    rows = np.concatenate([stored, alpha], axis=-1).reshape(7, -1).tolist()
    more = [(EXTRA, SHORT, [associated])]
    content = tiff([packed(rows, 8)], 9, 7, (8,) * (n + 1), "<", 1 if n == 1 else 2, more=more)
    right = colour * (alpha / 255) + 255 - alpha
    if (n, associated) == (1, 1) and ("La", "La") not in TiffImagePlugin.OPEN_INFO.values():  # before Pillow 13
        with pytest.raises(BadImageError, match="a TIFF of 2 x 8 bits; convert"):
            pixels(tmp_path / "a.tif", content)
        return
    assert np.abs(pixels(tmp_path / "a.tif", content) - right).max() < 2


@pytest.mark.parametrize(("photometric", "compressed"), [*itertools.product((1, 3), (False, True))])
@pytest.mark.parametrize("meaning", [0, 2])
def test_a_second_plane_is_alpha_or_counts_for_nothing(tmp_path, photometric, compressed, meaning):
    """Pillow takes alpha in a plane of its own, beside grey or indices, from the first plane."""
    samples = np.random.default_rng(6).integers(0, 256, (2, 7, 9))
    more = [(PLANAR, SHORT, [2]), (EXTRA, SHORT, [meaning]), (PALETTE, SHORT, [257 * i for i in range(256)] * 3)]
    more = more if photometric == 3 else more[:2]
    content = tiff([packed(plane.tolist(), 8) for plane in samples], 9, 7, (8, 8), "<", photometric, compressed, more)
    if meaning == 0 and compressed:
        np.testing.assert_array_equal(pixels(tmp_path / "a.tif", content)[..., 1], samples[0])
    else:
        with pytest.raises(BadImageError, match="a TIFF of 2 x 8 bits, in separate planes; convert"):
            pixels(tmp_path / "a.tif", content)


def test_an_image_of_which_nothing_shows_is_refused(tmp_path):
    """A BMP's fourth channel is often left at 0; white would be no picture."""
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = struct.pack("<IiiHHIIiiII", 108, 2, 1, 1, 32, 3, 8, 0, 0, 0, 0) + masks.ljust(68, b"\0")
    head = b"BM" + struct.pack("<IHHI", 14 + len(header) + 8, 0, 0, 14 + len(header))
    assert pixels(tmp_path / "a.bmp", head + header + bytes([1, 2, 3, 0, 1, 2, 3, 255]))[0, 1].tolist() == [3, 2, 1]
    with pytest.raises(BadImageError, match=r"\(wholly transparent; save it without transparency\)"):
        pixels(tmp_path / "a.bmp", head + header + bytes([1, 2, 3, 0] * 2))


def in_mode(mode):
    """Two pixels of grey 100, the first wholly transparent."""
    la = Image.fromarray(np.array([[[100, 0], [100, 255]]], np.uint8), "LA")
    if mode == "PA":
        palette = Image.new("PA", (2, 1))
        palette.putpalette([100, 100, 100] * 256)
        palette.putalpha(la.getchannel("A"))
        return palette
    return la.convert("RGBA").convert(mode) if mode.startswith("RGB") else la.convert(mode)


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBA", "RGBa"])
def test_every_mode_with_alpha_is_laid_on_white(mode):
    image = in_mode(mode)
    assert image.mode == mode and to_tensor(image)[:, 0].T.tolist() == [[255] * 3, [100] * 3]


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_transparent_gif_and_webp(tmp_path, kind):
    image = in_mode("RGBA")
    image.save(tmp_path / f"a.{kind}", **({"lossless": True} if kind == "webp" else {}))
    assert pixels(tmp_path / f"a.{kind}")[0].tolist() == [[255] * 3, [100] * 3]


@pytest.mark.parametrize("values", [[0, 65535], [-1, 65535], [0, 65536]])
def test_integers_without_a_file_have_16_bits_or_are_refused(values):
    image = Image.fromarray(np.array([values], np.int32))
    if values == [0, 65535]:
        assert to_tensor(image)[0].tolist() == [[0, 255]]
    else:
        with pytest.raises(ValueError, match="grey values outside 0 to 65535; convert"):
            to_tensor(image)


def with_profile(folder, image, kind, profile):
    image.save(folder / f"a.{kind}", icc_profile=profile, **({"lossless": True} if kind == "webp" else {}))
    return pixels(folder / f"a.{kind}")


@pytest.mark.parametrize("kind", ["png", "tif", "webp"])
@pytest.mark.parametrize(("colorants", "gamma"), [(ADOBE_RGB, 563 / 256), (DISPLAY_P3, 1.8), (SRGB, 2.2)])
def test_a_colour_profile_is_converted_to_srgb(tmp_path, kind, colorants, gamma):
    stored = colours(8).astype(np.uint8)
    read = with_profile(tmp_path, Image.fromarray(stored), kind, rgb_profile(colorants, gamma))
    right = srgb_levels((stored / 255) ** (round(256 * gamma) / 256) @ colorants.T)
    assert np.abs(read - right).max() <= 1 and np.abs(right - stored).max() > 5


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("alpha", [False, True])
def test_a_profile_of_grey(tmp_path, deep, alpha):
    stored = np.arange(256, dtype=np.uint8)[None]
    image = Image.fromarray(stored.astype(np.uint16) * 257 if deep else stored)
    options = {"transparency": 257 * 9 if deep else 9} if alpha else {}
    image.save(tmp_path / "a.png", icc_profile=grey_profile(1.8), **options)
    right = srgb_levels((stored / 255)[..., None] ** (round(256 * 1.8) / 256) * D50)
    if alpha:
        right[0, 9] = 255
    assert np.abs(pixels(tmp_path / "a.png") - right).max() <= 2


def test_a_grey_picture_of_a_colour_profile(tmp_path):
    stored = np.arange(256, dtype=np.uint8)[None]
    read = with_profile(tmp_path, Image.fromarray(stored), "png", rgb_profile(SRGB, 1.8))
    assert np.abs(read - srgb_levels((stored / 255)[..., None] ** (461 / 256) * D50)).max() <= 1


def test_a_profile_of_inks(tmp_path):
    rng = np.random.default_rng(0)
    lab = np.concatenate([rng.uniform(30, 80, (16, 1)), rng.uniform(-25, 25, (16, 2))], axis=1)
    lab[0], lab[1::2] = (100, 0, 0), (0, 0, 0)  # paper, and black over whatever else
    inks = np.array([[[255 * (i >> bit & 1) for bit in (3, 2, 1, 0)] for i in range(16)]], np.uint8)
    read = with_profile(tmp_path, Image.fromarray(inks, "CMYK"), "tif", cmyk_profile(lab))
    assert np.abs(read - srgb_levels(xyz_of_lab(lab))).max() <= 2


def test_colours_are_converted_before_they_are_laid_on_white(tmp_path):
    stored = np.array([[[200, 40, 90, 51]]], np.uint8)
    read = with_profile(tmp_path, Image.fromarray(stored), "png", rgb_profile(ADOBE_RGB, 563 / 256))
    right = 0.2 * srgb_levels((stored[..., :3] / 255) ** (563 / 256) @ ADOBE_RGB.T) + 0.8 * 255
    assert np.abs(read - right).max() <= 1


@pytest.mark.parametrize(
    "profile",
    [
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        b"no profile",
        rgb_profile(ADOBE_RGB, 2)[:200],
        rgb_profile(ADOBE_RGB, 2).replace(b"RGB ", b"RG\x80 "),
        cmyk_profile(np.full((16, 3), 50)),
        grey_profile(1.8),
    ],
    ids=["sRGB", "no profile", "cut short", "of no space", "of inks", "of grey"],
)
def test_srgb_keeps_its_pixels_and_a_profile_that_does_not_fit_counts_for_nothing(tmp_path, capfd, profile):
    stored = colours(8).astype(np.uint8)
    np.testing.assert_array_equal(with_profile(tmp_path, Image.fromarray(stored), "png", profile), stored)
    assert capfd.readouterr() == ("", "")


def test_a_tiffs_profile_of_another_type_counts_for_nothing(tmp_path):
    content = tiff([bytes([70])], 1, 1, more=[(PROFILE, SHORT, [1, 2, 3])])
    assert pixels(tmp_path / "a.tif", content).tolist() == [[[70] * 3]]


def test_a_jpeg_with_a_profile_and_an_image_that_is_handed_over(tmp_path):
    profile = rgb_profile(DISPLAY_P3, 2.2)
    Image.new("RGB", (16, 16), (200, 90, 60)).save(tmp_path / "a.jpg", icc_profile=profile, quality=100, subsampling=0)
    with Image.open(tmp_path / "a.jpg") as image:
        stored = np.asarray(image.convert("RGB"))
        right = srgb_levels((stored / 255) ** (563 / 256) @ DISPLAY_P3.T)
        assert np.abs(to_tensor(image).permute(1, 2, 0).numpy() - right).max() <= 1
    assert np.abs(pixels(tmp_path / "a.jpg") - right).max() <= 1
