"""Photographs from anywhere, to be recognised: decoded within limits, whatever they claim to be."""

from pathlib import Path
from typing import IO, NamedTuple

from torch import Tensor

from metilr.data.image_limits import TooManyPixels, open_image
from metilr.data.transforms import to_tensor, why_undecodable
from metilr.errors import UserError

MAX_PHOTO_MEGAPIXELS = 50.0  # phones take 12 to 50; decoded, that is 150 MB


class BadPhotoError(UserError):
    """A photograph that is not decoded; the message says why, and leaves the name to the caller."""


class TooManyPixelsError(BadPhotoError):
    """A photograph beyond the limit, which its header tells before anything is decoded."""


class Photo(NamedTuple):
    """A decoded photograph.

    Attributes:
        image: RGB, uint8 ``(3, H, W)``.
        reduced: Whether it was made smaller to fit ``largest_side``.
    """

    image: Tensor
    reduced: bool


def load_photo(
    file: Path | IO[bytes],
    image_size: int | None = None,
    largest_side: int | None = None,
    max_pixels: int = int(MAX_PHOTO_MEGAPIXELS * 10**6),
) -> Photo:
    """Decode a photograph as ``load_image`` does, if it is an image of a usual kind and not too large.

    Args:
        file: Its path, or the opened file.
        image_size: Length in px that the longest side is resized to; None keeps the size.
        largest_side: Without ``image_size``: reduce a photograph whose longest side is longer to this; None does not.
        max_pixels: More are refused, before anything is decoded.

    Raises:
        BadPhotoError: If it cannot be decoded.
        OSError: If the disk is at fault.
    """
    try:
        with open_image(file, max_pixels) as image:
            too_long = image_size is None and largest_side is not None and max(image.size) > largest_side
            return Photo(to_tensor(image, largest_side if too_long else image_size), too_long)
    except MemoryError:
        raise
    except TooManyPixels as error:
        raise TooManyPixelsError(f"has {error}; make it smaller") from None
    except Exception as error:  # as in load_image
        raise BadPhotoError(f"cannot be decoded ({why_undecodable(error)})") from None
