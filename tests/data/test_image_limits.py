"""Limits of what is decoded: kinds, pixels, scans."""

import io
import os
import struct
import subprocess
import sys

import pytest
from PIL import EpsImagePlugin, Image, TiffImagePlugin

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
    to_tensor,
)
from metilr.data.views import Images
from metilr.errors import UserError
from tests.hostile import write_hostile_files
from tests.tiffs import OFFSETS, PLANAR, ROWS, SAMPLES, tiff


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


def jpeg(progressive):
    stream = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(stream, "JPEG", progressive=progressive)
    return stream.getvalue()


COMMENT_OF_AN_END = b"\xff\xfe\0\x04\xff\xd9"
NO_LENGTH = b"\xff\x01"  # a marker that no length follows
EMPTY_SCAN = b"\xff\xda\0\x08\x01\x01\0\0\x3f\0"


@pytest.mark.parametrize("between", [b"", COMMENT_OF_AN_END, NO_LENGTH])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_of_thousands_of_scans_is_refused(tmp_path, progressive, between):
    content = jpeg(progressive)
    scan = content[content.rindex(b"\xff\xda") : -2] if progressive else EMPTY_SCAN
    (tmp_path / "many.jpg").write_bytes(content[:-2] + 3000 * (between + scan) + content[-2:])
    with pytest.raises(BadImageError, match="a JPEG of more than 100 scans"):
        load_image(tmp_path / "many.jpg")
    with pytest.raises(BadPhotoError, match="a JPEG of more than 100 scans"):
        load_photo(io.BytesIO((tmp_path / "many.jpg").read_bytes()))
    with Image.open(tmp_path / "many.jpg") as image, pytest.raises(ValueError, match="more than 100 scans"):
        to_tensor(image)


@pytest.mark.parametrize("progressive", [False, True])
def test_scans_are_counted_in_the_picture_alone(tmp_path, progressive):
    """Not in a thumbnail that a segment holds, nor in the film or the second picture behind the end."""
    content = jpeg(progressive)
    segment = b"\xff\xe4" + (2 + 2 * 200).to_bytes(2, "big") + 200 * b"\xff\xda"
    (tmp_path / "a.jpg").write_bytes(content[:2] + segment + content[2:] + content + 200 * EMPTY_SCAN)
    (tmp_path / "plain.jpg").write_bytes(content)
    assert load_image(tmp_path / "a.jpg").equal(load_image(tmp_path / "plain.jpg"))


@pytest.mark.parametrize(
    ("height", "rows", "planes", "tile", "needed"),
    [(7, 1, 1, None, 7), (7, 2, 1, None, 4), (7, 2**32 - 1, 1, None, 1), (7, 1, 3, None, 21), (40, None, 1, 16, 6)],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_a_tiff_has_no_more_strips_or_tiles_than_its_size_needs(
    tmp_path, height, rows, planes, tile, needed, compressed
):
    def write(n):
        strips, bits = [bytes(32 * 16)] * n, (8,) * planes
        more = [(PLANAR, 3, [1 if planes == 1 else 2])] + ([] if rows is None else [(ROWS, 4, [rows])])
        content = tiff(strips, 32, height, bits, "<", 1 if planes == 1 else 2, compressed, more, tile)
        (tmp_path / "a.tif").write_bytes(content)

    write(needed)
    assert load_image(tmp_path / "a.tif").shape == (3, height, 32)
    write(needed + 1)
    for function in (load_image, image_shape):
        with pytest.raises(
            BadImageError, match=rf"a TIFF of {needed + 1} strips or tiles, of which it needs {needed}\)"
        ):
            function(tmp_path / "a.tif")


@pytest.mark.parametrize("n", [1, 2])
def test_a_tiff_of_a_hundred_thousand_strips_is_refused_before_pillow_walks_them(tmp_path, monkeypatch, n):
    n *= 100_001
    more = [(ROWS, 4, [1]), (OFFSETS, 4, [8] * n)]
    (tmp_path / "a.tif").write_bytes(tiff([bytes(1)], 1, n, more=more))
    monkeypatch.setattr(TiffImagePlugin.TiffImageFile, "_setup", lambda _: pytest.fail("was walked"))
    with pytest.raises(BadImageError, match="a TIFF of more than 100,000 strips or tiles"):
        load_image(tmp_path / "a.tif")


def test_a_bigtiff_of_very_many_tags_is_refused(tmp_path):
    Image.new("L", (5, 4), 9).save(tmp_path / "a.tif", big_tiff=True)
    assert load_image(tmp_path / "a.tif").float().mean() == 9
    tags = b"".join(struct.pack("<HHQQ", 40_000 + i % 20_000, 4, 1, 7) for i in range(70_000))
    (tmp_path / "a.tif").write_bytes(b"II" + struct.pack("<HHHQQ", 43, 8, 0, 16, 70_000) + tags + bytes(8))
    with pytest.raises(BadImageError, match="a TIFF of more than 65,535 tags"):
        load_image(tmp_path / "a.tif")


def test_a_pipe_is_no_image_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(BadImageError, match=r"a\.jpg: cannot be decoded \(not a regular file\)"):
        load_image(tmp_path / "a.jpg")
    with pytest.raises(BadPhotoError, match="not a regular file"):
        load_photo(tmp_path / "a.jpg")


def damaged_exif(entry):
    exif = b"Exif\0\0MM" + struct.pack(">HIH", 42, 8, 1) + entry + bytes(4)
    content = jpeg(False)
    return content[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + content[2:]


@pytest.mark.parametrize("option", ["always", "error"])
def test_pillow_tells_a_terminal_nothing_of_damaged_metadata(tmp_path, option):
    """In this process and in others, of what is decoded for all that and of what is refused."""
    two_values, outside = struct.pack(">HHIHH", 0x112, 3, 2, 1, 1), struct.pack(">HHII", 0x112, 5, 1, 99_999)
    (tmp_path / "0.jpg").write_bytes(damaged_exif(two_values))
    (tmp_path / "1.jpg").write_bytes(damaged_exif(outside))
    (tmp_path / "2.tif").write_bytes(tiff([bytes(6)], 1, 1, (8,) * 6, photometric=2, more=[(SAMPLES, 3, [9999])]))
    (tmp_path / "run.py").write_text(PROGRAM)
    told = subprocess.run([sys.executable, "-W", option, "run.py"], cwd=tmp_path, capture_output=True, text=True)
    assert told.stderr == "" and told.stdout.split() == 2 * ["64", "64", "bad"]


PROGRAM = """
from multiprocessing import get_context
from pathlib import Path
from metilr.data.decode import BadImageError, image_shape

def read(name):
    try:
        return image_shape(Path(name))[0]
    except BadImageError:
        return "bad"

if __name__ == "__main__":
    names = sorted(path.name for path in Path().glob("?.*"))
    print(*map(read, names))
    with get_context("spawn").Pool(1) as pool:
        print(*pool.map(read, names))
"""
