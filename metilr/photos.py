"""Photographs from anywhere, to be recognised: decoded within limits, whatever they claim to be."""

import warnings
from pathlib import Path
from typing import IO, NamedTuple

from PIL import Image
from torch import Tensor

from metilr.data.transforms import to_tensor, why_undecodable
from metilr.errors import UserError

MAX_PIXELS = 50_000_000  # phones take 12 to 50 megapixels; decoded, that is 150 MB
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")  # Pillow knows more, and some of them start programs


class BadPhotoError(UserError):
    """A photograph that is not decoded; the message says why, and leaves the name to the caller."""


class TooManyPixelsError(BadPhotoError):
    """A photograph beyond ``MAX_PIXELS``, which its header tells before anything is decoded."""


class Photo(NamedTuple):
    """A decoded photograph.

    Attributes:
        image: RGB, uint8 ``(3, H, W)``.
        reduced: Whether it was made smaller to fit ``largest_side``.
    """

    image: Tensor
    reduced: bool


def load_photo(file: Path | IO[bytes], image_size: int | None = None, largest_side: int | None = None) -> Photo:
    """Decode a photograph as ``load_image`` does, if it is an image of a usual kind and not too large.

    Args:
        file: Its path, or the opened file.
        image_size: Length in px that the longest side is resized to; None keeps the size.
        largest_side: Without ``image_size``: reduce a photograph whose longest side is longer to this; None does not.

    Raises:
        BadPhotoError: If it cannot be decoded.
        OSError: If the disk is at fault.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is lower
            with Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise _too_many_pixels()
                too_long = image_size is None and largest_side is not None and max(image.size) > largest_side
                return Photo(to_tensor(image, largest_side if too_long else image_size), too_long)
    except (BadPhotoError, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise _too_many_pixels() from None
    except Exception as error:  # as in load_image
        raise BadPhotoError(f"cannot be decoded ({why_undecodable(error)})") from None


def _too_many_pixels() -> TooManyPixelsError:
    return TooManyPixelsError(f"has more than {MAX_PIXELS // 10**6} megapixels; make it smaller")
