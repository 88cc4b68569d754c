"""From an image file to a uint8 RGB tensor, the same whatever the file's mode, orientation or depth."""

import errno
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from metilr.data.image_files import NO_FILE
from metilr.data.image_limits import TooManyPixels, max_pixels, open_image
from metilr.errors import UserError
from metilr.files import named

EXIF_ORIENTATION = 0x0112
QUARTER_TURNS = (5, 6, 7, 8)  # EXIF orientations that exchange height and width
# Formats whose header tells the size of what is decoded. Pillow turns TIFF itself, and an ICO holds several sizes.
HEADER_TELLS_SIZE = ("JPEG", "MPO", "PNG", "WEBP")

FAILING_MACHINE = tuple(
    getattr(errno, name)
    for name in (
        "EIO", "ESTALE", "EMFILE", "ENFILE", "ENOMEM", "ENODEV", "ENXIO",
        "ENOTCONN", "ETIMEDOUT", "EHOSTDOWN", "EHOSTUNREACH", "EREMOTEIO",  # of network disks
    )
    if hasattr(errno, name)
)  # fmt: skip


class BadImageError(UserError):
    """An image file that cannot be decoded; the message names it.

    Attributes:
        reason: Why, in a few words.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


def load_image(path: Path, image_size: int | None = None, limit: int | None = None) -> Tensor:
    """Decode a file to RGB, uint8 ``(3, H, W)``.

    EXIF orientation is applied; alpha is laid on white; grey, palette and CMYK become RGB; 16-bit grey is
    scaled to 8 bits. Of an animation the first frame counts.

    Args:
        path: Image file.
        image_size: Length in px that the longest side is resized to (bilinear, antialiased, up or down);
            ``None`` keeps the size.
        limit: Most pixels of the file; ``None``: as ``limit_images`` says.

    Raises:
        BadImageError: If the file is missing, truncated, not an image of a usual kind, too large, or of a kind
            without a clear 8-bit reading (32-bit float).
        OSError: If the disk, not the file, is at fault.
    """
    try:
        with open_image(path, max_pixels() if limit is None else limit) as image:
            return to_tensor(image, image_size)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise many types on broken files; each means the same here
        raise _bad_image(path, error) from None


def to_tensor(image: Image.Image, image_size: int | None = None) -> Tensor:
    """Decode an opened image as ``load_image`` does, uint8 ``(3, H, W)``.

    Raises:
        Exception: Of many types: whatever Pillow's decoders raise.
    """
    rgb = _to_rgb(ImageOps.exif_transpose(image))
    height, width = resized_shape(rgb.height, rgb.width, image_size)
    if (height, width) != (rgb.height, rgb.width):
        rgb = rgb.resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous()  # HxWxC to CxHxW


def image_shape(path: Path, image_size: int | None = None, limit: int | None = None) -> tuple[int, int]:
    """Height and width of ``load_image``'s result, from the file's header alone where that is enough.

    Raises:
        BadImageError: If the header cannot be read, or claims too many pixels.
        OSError: If the disk, not the file, is at fault.
    """
    try:
        with open_image(path, max_pixels() if limit is None else limit) as image:
            if image.format not in HEADER_TELLS_SIZE:
                image.load()
            width, height = image.size
            if image.getexif().get(EXIF_ORIENTATION) in QUARTER_TURNS:
                height, width = width, height
    except MemoryError:
        raise
    except Exception as error:
        raise _bad_image(path, error) from None
    return resized_shape(height, width, image_size)


def resized_shape(height: int, width: int, image_size: int | None) -> tuple[int, int]:
    """Height and width with the longest side at ``image_size``, the other in proportion, at least 1 px."""
    if image_size is None:
        return height, width
    ratio = image_size / max(height, width)
    return max(1, round(height * ratio)), max(1, round(width * ratio))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow clips 16-bit grey at 255 instead of scaling it.
        grey = np.asarray(image).astype(np.float64).clip(0, 65535) / 257
        return Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("32-bit float pixels have no stated range; convert it to 8 bits")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _refuse_failing_machine(error: Exception) -> None:
    """Pass on what says nothing about the image: leaving it out would make a passing fault permanent."""
    if isinstance(error, OSError) and error.errno in FAILING_MACHINE:
        raise error


def _bad_image(path: Path, error: Exception) -> BadImageError:
    with named(path):
        reason = why_undecodable(error)
    remedy = "make it smaller, raise --max_megapixels" if isinstance(error, TooManyPixels) else "replace it"
    message = f"{path}: cannot be decoded ({reason}); {remedy}, or leave it out with --bad_images skip"
    return BadImageError(message, reason)


def why_undecodable(error: Exception) -> str:
    """Say in a few words what an error of Pillow's decoders means.

    Raises:
        OSError: If the disk, not the file, is at fault.
    """
    _refuse_failing_machine(error)
    if isinstance(error, OSError) and error.errno in NO_FILE:
        return "no such file" if isinstance(error, FileNotFoundError) else os.strerror(error.errno)
    if isinstance(error, OSError) and "cannot identify" in str(error):
        return "not an image"
    return " ".join(str(error).split()) or type(error).__name__
