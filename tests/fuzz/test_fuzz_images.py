"""Photographs and a museum's images, of every kind that is read."""

import io
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, features

from metilr.collection.collection import BadPhotoError, load_photo
from metilr.data.decode import BadImageError, image_shape, load_image
from tests.fuzz.guard import refusal
from tests.fuzz.mutations import cases, mutated

LIMIT = 100_000  # pixels
NOISE = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)


def encoded(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def seeds():
    rgb = Image.fromarray(NOISE)
    exif = Image.Exif()
    exif[0x0112] = 6
    palette = rgb.quantize(16)
    return {
        "jpeg": encoded(rgb, "JPEG"),
        "progressive": encoded(rgb, "JPEG", progressive=True, exif=exif),
        "cmyk": encoded(rgb.convert("CMYK"), "JPEG"),
        "png": encoded(rgb, "PNG"),
        "16-bit": encoded(Image.fromarray(NOISE[..., 0].astype(np.uint16) * 257), "PNG"),
        "palette": encoded(palette, "PNG", transparency=3),
        "grey-alpha": encoded(rgb.convert("LA"), "PNG"),
        "webp": encoded(rgb.convert("RGBA"), "WEBP"),
        "lossless webp": encoded(rgb, "WEBP", lossless=True, exif=exif),
        "tiff": encoded(rgb, "TIFF"),
        "lzw tiff": encoded(rgb, "TIFF", compression="tiff_lzw"),
        "jpeg tiff": encoded(rgb, "TIFF", compression="jpeg"),
        "float tiff": encoded(Image.fromarray(NOISE[..., 0].astype(np.float32)), "TIFF"),
        "bmp": encoded(rgb, "BMP"),
        **({"avif": encoded(rgb, "AVIF")} if features.check("avif") else {}),
        "gif": encoded(palette, "GIF", save_all=True, append_images=[palette.rotate(90)]),
    }


SEEDS = seeds()
TOKENS = (
    b"\xff\xda", b"\xff\xc2", b"\xff\xd8", b"\xff\xd9", b"\xff\xff", b"IHDR", b"IDAT", b"IEND", b"PLTE", b"tRNS",
    b"VP8X", b"ANMF", b"RIFF", b"II*\0", b"MM\0*", b"BM", b"GIF89a", b"\x00;", b"%!PS", b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\xff", b"\0\0\0\0", b"Exif\0\0", b"ispe", b"ftyp",
)  # fmt: skip


def read(file):
    with refusal(file) as said:
        height, width = image_shape(file, limit=LIMIT)
        assert height >= 1 and width >= 1 and height * width <= LIMIT
        image = load_image(file, limit=LIMIT)
        assert image.dtype == torch.uint8 and image.shape[0] == 3 and image.shape[1] * image.shape[2] <= LIMIT
        assert image.float().mean() >= 0
        small = load_image(file, 8, limit=LIMIT)
        assert max(small.shape[1:]) == 8 == max(image_shape(file, 8, limit=LIMIT))
    return said


@pytest.mark.parametrize("kind", SEEDS)
def test_changed_images(tmp_path, kind):
    file, n_read = tmp_path / "a.jpg", 0  # the ending says nothing
    content = SEEDS[kind]
    for length in (0, 1, 10, 50, len(content) // 2, len(content) - 3):
        file.write_bytes(content[:length])
        read(file)
    file.write_bytes(content)
    assert bool(read(file)) == (kind == "float tiff")
    for rng in cases(130, seed=len(kind)):
        end = 64 if rng.random() < 0.5 else len(content)  # where the headers are
        file.write_bytes(mutated(content[:end], rng, TOKENS) + content[end:])
        n_read += not read(file)
        with file.open("rb") as stream:
            try:
                photo = load_photo(stream, None, 16, LIMIT).image
                assert max(photo.shape[1:]) <= 24 or max(photo.shape[1:]) <= LIMIT
            except BadPhotoError as error:
                assert "\n" not in str(error)
    assert n_read or kind == "float tiff"


@pytest.mark.parametrize("kind", ["png", "bmp", "gif", "jpeg"])
def test_absurd_sizes_are_refused_before_anything_is_decoded(tmp_path, kind):
    file, content = tmp_path / "a.jpg", bytearray(SEEDS[kind])
    if kind == "jpeg":
        place = content.index(b"\xff\xc0") + 5
        content[place : place + 4] = b"\xff\xdc\xff\xdc"
    elif kind == "gif":
        content[6:10] = b"\xff\xff\xff\xff"
    else:
        place = {"png": 16, "bmp": 18}[kind]
        content[place : place + 8] = (b"\0\0\xea\x60" if kind == "png" else b"\x60\xea\0\0") * 2
        if kind == "png":
            content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    file.write_bytes(content)
    for function in (image_shape, load_image):
        with pytest.raises(BadImageError, match="megapixels"):
            function(file)
