"""From an image file to a uint8 RGB tensor, within limits, whatever its mode, orientation or depth."""

import contextlib
import errno
import logging
import os
import re
import warnings
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from PIL import Image, JpegImagePlugin, UnidentifiedImageError, features

from metilr.data.pixels import ImageSize, Tags, check_tiff, resized_shape, tiff_kind, tiff_tags, to_rgb
from metilr.errors import UserError
from metilr.files import named, regular

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")  # always; Pillow knows more, and some of them start programs
# How files of these begin; a BMP's "BM" alone could begin a text, so the size of its header is looked at too.
BEGINNINGS = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF.{4}WEBP|II[*+]\0|MM\0[*+]|BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0{3}|GIF8[79]a",
    re.DOTALL,
)
AVIF, HEIF = "AVIF", "HEIF"
ISO_MEDIA = re.compile(rb".{4}ftyp(?:(avi[fs])|hei[cmsx]|hev[cmsx]|mif1|msf1)", re.DOTALL)  # AVIF, or HEIC or either
# Formats whose header tells the size of what is decoded. Pillow turns TIFF itself.
HEADER_TELLS_SIZE = ("JPEG", "MPO", "PNG", "WEBP", AVIF, HEIF)
MAX_MEGAPIXELS = 180.0  # the largest cameras take 150 at once; decoded, that is half a gigabyte a process
MAX_PHOTO_MEGAPIXELS = 50.0  # phones take 12 to 50; decoded, that is 150 MB
MAX_SCANS = 100  # of a JPEG, which decodes all of it with each; encoders write about 10
MARKER = re.compile(rb"\xff[\x02-\xcf\xd8-\xfe]")  # of a JPEG; in compressed data 0 or a restart follows each 0xFF
END_OF_IMAGE, START_OF_SCAN = 0xD9, 0xDA
EXIF_ORIENTATION = 0x0112
TURNS = dict(enumerate(  # of a picture that EXIF says lies otherwise, from orientation 2 on
    (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
     Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90), 2
))  # fmt: skip
QUARTER_TURNS = (5, 6, 7, 8)  # EXIF orientations that exchange height and width

# What a system says of a name under which no file can be had: of the image, not of the disk.
NO_FILE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG})
# What says nothing about the image: leaving it out would make a passing fault permanent. Not each system has all.
FAILING_MACHINE = tuple(
    getattr(errno, name)
    for name in (
        "EIO", "ESTALE", "EMFILE", "ENFILE", "ENOMEM", "ENODEV", "ENXIO",
        "ENOTCONN", "ETIMEDOUT", "EHOSTDOWN", "EHOSTUNREACH", "EREMOTEIO",  # of network disks
    )
    if hasattr(errno, name)
)  # fmt: skip

# What Pillow has to say of damaged metadata: an error says what is wrong with an image, by its name.
warnings.filterwarnings("ignore", category=UserWarning, module=r"(PIL|pillow_heif)\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())

_max_pixels = int(MAX_MEGAPIXELS * 10**6)


class BadImageError(UserError):
    """An image file that cannot be decoded; the message names it, and ``reason`` says why in a few words."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class TooManyPixels(ValueError):
    """An image beyond the limit, which its header tells before anything is decoded."""


def pixels_of(max_megapixels: float) -> int:
    """Megapixels as pixels; UserError if they are no positive number."""
    if not 0 < max_megapixels < float("inf"):
        raise UserError(f"{max_megapixels}: choose a number above 0", "max_megapixels")
    return max(1, int(max_megapixels * 10**6))


def limit_images(max_megapixels: float) -> None:
    """Set the limit of a museum's images for this process; what is handed to other processes takes it along."""
    global _max_pixels
    _max_pixels = pixels_of(max_megapixels)


def max_pixels() -> int:
    """The limit that ``limit_images`` has set."""
    return _max_pixels


def file_size(path: Path) -> int | None:
    """Bytes of a file; None if none can be had under that name. OSError if the disk is at fault."""
    try:
        return path.stat().st_size
    except OSError as error:
        if error.errno in NO_FILE:
            return None
        raise


def begins_as_image(file: Path) -> bool:
    """Whether a file's first bytes are those of an image of a usual kind, which it may still fail to be.

    Raises:
        ValueError: If it is a folder, a pipe or a device.
        OSError: If it cannot be read.
    """
    with regular(file).open("rb", buffering=0) as stream:
        head = stream.read(18)
        return BEGINNINGS.match(head) is not None or _iso_media(head) in formats()


@lru_cache(maxsize=1)
def formats() -> tuple[str, ...]:
    """The formats that are read here: AVIF where Pillow was built with it, HEIC with the extra ``heic``."""
    found: tuple[str, ...] = FORMATS
    if features.check("avif"):
        found += (AVIF,)
    if find_spec("pillow_heif"):
        import pillow_heif

        pillow_heif.register_heif_opener()
        found += (HEIF,)
    return found


def _iso_media(head: bytes) -> str | None:
    found = ISO_MEDIA.match(head)
    return None if found is None else AVIF if found[1] else HEIF


@contextlib.contextmanager
def open_image(file: Path | IO[bytes], max_pixels: int) -> Iterator[Image.Image]:
    """Open an image, by its path or as an opened file, without decoding it.

    Raises:
        TooManyPixels: If it claims more.
        Exception: Of many types, if it is no image of a usual kind, or of a kind without a clear reading.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(file, Path):
            file = stack.enter_context(regular(file).open("rb"))
        if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
            Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow's own limit, which would refuse what is allowed here
        too_many = TooManyPixels(f"more than {max_pixels / 10**6:g} megapixels")
        bounded: Any = _Bounded(file)
        tags = tiff_tags(bounded)
        if tags is not None:
            check_tiff(tags)
        try:
            image = stack.enter_context(Image.open(bounded, formats=formats()))
        except UnidentifiedImageError:
            raise ValueError(_unread_kind(bounded, tags)) from None
        except Image.DecompressionBombError:
            raise too_many from None
        if image.width * image.height > max_pixels:
            raise too_many
        yield image


def _unread_kind(stream: IO[bytes], tags: Tags | None) -> str:
    """Name what is none of the formats, and say what to do."""
    stream.seek(0)
    head = stream.read(18)
    if tags is not None:
        return tiff_kind(tags)
    if head.startswith(b"\xff\xd8\xff"):
        return "a JPEG that is damaged, lossless or of 12 bits; convert it to 8-bit RGB"
    if _iso_media(head) in {AVIF, HEIF}.difference(formats()):
        return "a HEIC or AVIF photo: pip install 'metilr[heic]' or convert it"
    return "not an image"


class _Bounded:
    """A stream that takes no memory for bytes that the file does not have, whatever a header claims."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._size = stream, stream.seek(0, 2)
        self.seek, self.tell, self.fileno = stream.seek, stream.tell, stream.fileno
        stream.seek(0)

    def read(self, n: int = -1) -> bytes:
        return self._stream.read(n if n is None or n < 0 else min(n, self._size))


def load_image(path: Path, image_size: ImageSize | None = None, limit: int | None = None) -> "Tensor":
    """Decode a file to RGB, uint8 ``(3, H, W)``.

    EXIF orientation is applied; what is transparent, in whichever way, is laid on white; grey, palette and CMYK become
    RGB; grey of 12 and 16 bits and colours of 16 are scaled to 8, and grey whose 0 is white is turned. Of an animation
    the first frame counts.

    Colours become sRGB by the file's ICC profile (relative colorimetric, with black point compensation). A profile that
    moves no colour by more than two levels is sRGB: pixels stay as they are. So they do without a profile, and with one
    that is damaged or made for another kind of pixels.

    It is resized to ``image_size``, if given (bilinear, antialiased, up or down). A file of more pixels than ``limit``,
    or ``limit_images`` has said, is bad.

    Raises:
        BadImageError: If the file is missing, truncated, not an image of a usual kind, too large, or of a kind
            without a clear 8-bit reading (signed, 32-bit or floating-point pixels).
        OSError: If the disk, not the file, is at fault.
    """
    with _named_if_bad(path), open_image(path, max_pixels() if limit is None else limit) as image:
        return to_tensor(image, image_size)


def image_shape(path: Path, image_size: ImageSize | None = None, limit: int | None = None) -> tuple[int, int]:
    """Height and width of ``load_image``'s result, from the file's header alone where that is enough."""
    with _named_if_bad(path), open_image(path, max_pixels() if limit is None else limit) as image:
        if image.format not in HEADER_TELLS_SIZE:
            image.load()
        width, height = image.size
        if _orientation(image) in QUARTER_TURNS:
            height, width = width, height
        return resized_shape(height, width, image_size)


def to_tensor(image: Image.Image, image_size: ImageSize | None = None) -> "Tensor":
    """Decode an opened image as ``load_image`` does; raises whatever Pillow's decoders raise."""
    import torch  # takes a second, and most of this module does without

    if isinstance(image, JpegImagePlugin.JpegImageFile) and image.tile and image.fp:  # not decoded yet
        check_scans(image.fp)
    rgb = to_rgb(image)
    turn = TURNS.get(_orientation(image))
    rgb = rgb if turn is None else rgb.transpose(turn)
    height, width = resized_shape(rgb.height, rgb.width, image_size)
    if (height, width) != (rgb.height, rgb.width):
        rgb = rgb.resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(rgb).transpose(2, 0, 1).copy())  # HxWxC to CxHxW; PyTorch's copy is slower


def check_scans(stream: IO[bytes]) -> None:
    """ValueError if a JPEG has very many scans; what stands in its segments and behind its end is not counted."""
    stream.seek(0)
    jpeg, place, n_scans = stream.read(), 2, 0
    while (found := MARKER.search(jpeg, place)) and found[0][1] != END_OF_IMAGE:
        n_scans += found[0][1] == START_OF_SCAN
        if n_scans > MAX_SCANS:
            raise ValueError(f"a JPEG of more than {MAX_SCANS} scans")
        place = found.end() + max(2, int.from_bytes(jpeg[found.end() : found.end() + 2], "big"))


def _orientation(image: Image.Image) -> Any:
    """How EXIF says that the stored picture lies; damaged EXIF says nothing."""
    with contextlib.suppress(Exception):  # of many types
        return image.getexif().get(EXIF_ORIENTATION)


@contextlib.contextmanager
def _named_if_bad(path: Path) -> Iterator[None]:
    """Pillow's decoders raise many types on broken files; each means the same here."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        with named(path):
            reason = why_undecodable(error)
        remedy = "make it smaller, raise max_megapixels" if isinstance(error, TooManyPixels) else "replace it"
        message = f"{path}: cannot be decoded ({reason}); {remedy}, or leave it out with bad_images skip"
        raise BadImageError(message, reason) from None


def why_undecodable(error: Exception) -> str:
    """Say in a few words what an error of Pillow's decoders means; raises it if the disk, not the file, is at fault."""
    if isinstance(error, OSError) and error.errno in FAILING_MACHINE:
        raise error
    if isinstance(error, OSError) and error.errno in NO_FILE:
        return "no such file" if isinstance(error, FileNotFoundError) else os.strerror(error.errno)
    return " ".join(str(error).split()) or type(error).__name__
