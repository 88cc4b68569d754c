"""Small pictures for pages."""

import io
from pathlib import Path

from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from metilr.data.transforms import load_image

SIDE = 200  # px: sharp on a phone, and a thousand of them stay below 10 MB


def jpeg_thumbnail(file: Path, side: int = SIDE) -> bytes:
    """Return an image file as a JPEG whose longest side has at most so many px.

    Raises:
        BadImageError: If the file is missing or cannot be decoded.
    """
    return jpeg_of(load_image(file), side)


def jpeg_of(image: Tensor, side: int = SIDE) -> bytes:
    """Return an image, uint8 ``(3, H, W)``, as a JPEG whose longest side has at most so many px."""
    picture: Image.Image = F.to_pil_image(image)
    picture.thumbnail((side, side))
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=80, optimize=True)
    return stream.getvalue()
