"""The process that decodes a stranger's photo: its limits, its end, and what it keeps in memory."""

import contextlib
import io
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metilr.collection.photos import BadPhotoError, Decoder, TooManyPixelsError
from metilr.data.decode import BadImageError

PIXELS = 50_000_000
LINUX = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux about processes")


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with contextlib.closing(Decoder(seconds=5)) as decoder:
        yield decoder


def jpeg(width: int, height: int, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, height), (200, 100, 50)).save(stream, "JPEG", quality=95, **options)
    return stream.getvalue()


def assert_decodes(decoder: Decoder) -> None:
    image, is_reduced = decoder.photo(jpeg(60, 40), None, 30, PIXELS)
    assert image.shape == (3, 20, 30) and is_reduced
    np.testing.assert_allclose(image.float().mean((1, 2)), (200, 100, 50), atol=3)


def test_a_photo_or_an_image_is_decoded_or_said_to_be_bad_as_in_this_process(decoder, tmp_path):
    assert_decodes(decoder)
    image, is_reduced = decoder.photo(jpeg(60, 40), (50, 50), None, PIXELS)
    assert image.shape == (3, 50, 50) and not is_reduced
    with pytest.raises(BadPhotoError, match="not an image"):
        decoder.photo(b"text", None, None, PIXELS)
    with pytest.raises(TooManyPixelsError, match=r"more than 0\.002 megapixels"):
        decoder.photo(jpeg(60, 40), None, None, 2000)
    (tmp_path / "a.jpg").write_bytes(jpeg(600, 400))
    assert Image.open(io.BytesIO(decoder.thumbnail(tmp_path / "a.jpg"))).size == (200, 133)
    with pytest.raises(BadImageError, match="no such file"):
        decoder.thumbnail(tmp_path / "b.jpg")


def test_what_takes_too_long_is_ended_and_does_not_hold_what_is_behind_it():
    with contextlib.closing(Decoder(seconds=0.5)) as decoder:
        decoder.wait()
        before, started = decoder._process, time.monotonic()
        with pytest.raises(BadPhotoError, match=r"takes more than 0\.5 s to decode"):
            decoder.make(PIXELS, time.sleep, 600)
        assert time.monotonic() - started < 5 and not before.is_alive()
        decoder.wait()
        assert_decodes(decoder)


def end(status):
    os._exit(status)


def test_what_ends_the_process_is_said_and_the_next_one_is_decoded(decoder):
    with pytest.raises(BadPhotoError, match="ends the process that decodes it"):
        decoder.make(PIXELS, end, 1)
    assert_decodes(decoder)


@LINUX
def test_what_takes_too_much_memory_is_refused(decoder):
    with pytest.raises(BadPhotoError, match=r"takes more than 0\.5 GB of memory"):
        decoder.make(1, bytearray, 2**30)
    assert len(decoder.make(2**26, bytes, 2**30 // 2)) == 2**29  # of so many pixels it may
    assert_decodes(decoder)


@LINUX
def test_large_photos_fit_and_leave_nothing_in_this_process(decoder):
    """50 of them from several threads left gigabytes in the server."""
    photo = jpeg(8000, 6000, progressive=True)
    decoder.wait()
    before = resident(os.getpid())
    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(lambda _: decoder.photo(photo, None, 1000, PIXELS).image.shape, range(8)))
    assert images == [(3, 750, 1000)] * 8
    assert resident(os.getpid()) - before < 100e6
    assert resident(decoder._process.pid) < 1.5e9


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


PARENT = """
import threading, time
from metilr.collection.photos import Decoder
if __name__ == "__main__":
    decoder = Decoder(600)
    decoder.wait()
    print(decoder._process.pid, flush=True)
    decoder.make(1, time.sleep, 600)
"""


@LINUX
def test_the_process_ends_with_a_server_that_is_killed(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    with subprocess.Popen([sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, text=True) as parent:
        child = Path(f"/proc/{parent.stdout.readline().strip()}")
        time.sleep(0.5)
        assert child.exists()
        parent.kill()
    for _ in range(100):
        if not child.exists() or "\nState:\tZ" in (child / "status").read_text():
            return
        time.sleep(0.1)
    raise AssertionError("it goes on")
