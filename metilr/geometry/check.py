"""What a photo and an image of an exhibit have in common, as a picture: side by side, with the matching regions."""

import io

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from metilr.geometry.verify import LocalFeatures, Verification, matching_regions

SIDE = 260  # px of each of the two
GAP = 6  # px between them
LINES = 30  # matches drawn: more hide the images
COLOUR = (255, 190, 0)


def matching_picture(
    photo: Tensor, image: Tensor, first: LocalFeatures, second: LocalFeatures, found: Verification
) -> bytes:
    """Draw the outline of the matching region in both images, and lines between matching positions.

    Args:
        photo: uint8 ``(3, H, W)``.
        image: uint8 ``(3, H', W')``.
        first: Of the photo.
        second: Of the image.
        found: What ``verify`` found.

    Returns:
        A JPEG.
    """
    left, left_zoom = _thumbnail(photo)
    right, right_zoom = _thumbnail(image)
    offset = np.array([left.width + GAP, 0])
    canvas = Image.new("RGB", (left.width + GAP + right.width, max(left.height, right.height)), "white")
    canvas.paste(left, (0, 0))
    canvas.paste(right, (int(offset[0]), 0))
    draw = ImageDraw.Draw(canvas)
    for place in np.linspace(0, found.n_inliers - 1, min(LINES, found.n_inliers)).astype(int):
        i, j = found.matches[place]
        ends = [first.positions[i] * left_zoom, second.positions[j] * right_zoom + offset]
        draw.line([tuple(end.tolist()) for end in ends], fill=COLOUR, width=1)
    here, there = matching_regions(first, found)
    for outline in (here * left_zoom, there * right_zoom + offset):
        if len(outline):
            draw.line([tuple(corner) for corner in [*outline.tolist(), outline[0].tolist()]], fill=COLOUR, width=3)
    stream = io.BytesIO()
    canvas.save(stream, "JPEG", quality=80, optimize=True)
    return stream.getvalue()


def _thumbnail(image: Tensor) -> tuple[Image.Image, float]:
    """A small picture and its size relative to the image."""
    picture: Image.Image = F.to_pil_image(image)
    zoom = min(1.0, SIDE / max(picture.size))
    return picture.resize((max(1, round(picture.width * zoom)), max(1, round(picture.height * zoom)))), zoom
