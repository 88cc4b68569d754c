"""What an image file may be before it is decoded: of a usual kind, of a believable size, with few scans."""

import contextlib
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from PIL import Image

from metilr.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")  # Pillow knows more, and some of them start programs
MAX_MEGAPIXELS = 180.0  # the largest cameras take 150 at once; decoded, that is half a gigabyte a process
MAX_IMAGE_SIZE = 16_384  # px that an image is resized to: the longest side of one of 180 megapixels is not much longer
MAX_SCANS = 100  # of a progressive JPEG, which decodes all of it with each; encoders write about 10
_START_OF_SCAN = b"\xff\xda"  # in compressed data 0xFF is followed by 0, so it stands nowhere else

_max_pixels = int(MAX_MEGAPIXELS * 10**6)


class TooManyPixels(ValueError):
    """An image beyond the limit, which its header tells before anything is decoded."""

    def __init__(self, max_pixels: int) -> None:
        super().__init__(f"more than {max_pixels / 10**6:g} megapixels")


def pixels_of(max_megapixels: float) -> int:
    """Turn the option ``--max_megapixels`` into pixels.

    Raises:
        UserError: If it is not a positive number.
    """
    if not 0 < max_megapixels < float("inf"):
        raise UserError(f"--max_megapixels {max_megapixels}: choose a number above 0")
    return max(1, int(max_megapixels * 10**6))


def limit_images(max_megapixels: float) -> None:
    """Set the limit of a museum's images for this process; what is handed to other processes takes it along."""
    global _max_pixels
    _max_pixels = pixels_of(max_megapixels)


def max_pixels() -> int:
    """The limit that ``limit_images`` has set."""
    return _max_pixels


@contextlib.contextmanager
def open_image(file: Path | IO[bytes], max_pixels: int) -> Iterator[Image.Image]:
    """Open an image without decoding it.

    Args:
        file: Its path, or the opened file.
        max_pixels: More are refused.

    Raises:
        TooManyPixels: If it claims more.
        Exception: Of many types, if it is no image of a usual kind, or a progressive JPEG of too many scans.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(file, Path) and not stat.S_ISREG(file.stat().st_mode):
            raise ValueError("not a regular file")  # a pipe would be waited for
        stream = stack.enter_context(file.open("rb")) if isinstance(file, Path) else file
        with _opened(_Bounded(stream), max_pixels) as image:
            yield image


@contextlib.contextmanager
def _opened(stream: Any, max_pixels: int) -> Iterator[Image.Image]:
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow's own limit, which would refuse what is allowed here
    try:
        opened = Image.open(stream, formats=FORMATS)
    except Image.DecompressionBombError:
        raise TooManyPixels(max_pixels) from None
    with opened as image:
        if image.width * image.height > max_pixels:
            raise TooManyPixels(max_pixels)
        if "progressive" in image.info:
            _refuse_many_scans(image)
        yield image


class _Bounded:
    """A stream that takes no memory for bytes that the file does not have, whatever a header claims."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._size = stream, stream.seek(0, 2)
        self.seek, self.tell, self.fileno = stream.seek, stream.tell, stream.fileno
        stream.seek(0)

    def read(self, n: int = -1) -> bytes:
        return self._stream.read(n if n is None or n < 0 else min(n, self._size))


def _refuse_many_scans(image: Image.Image) -> None:
    stream: IO[bytes] = image.fp  # type: ignore[attr-defined]
    place = stream.tell()
    n_scans = stream.read().count(_START_OF_SCAN)
    stream.seek(place)
    if n_scans > MAX_SCANS:
        raise ValueError(f"a progressive JPEG of more than {MAX_SCANS} scans")
