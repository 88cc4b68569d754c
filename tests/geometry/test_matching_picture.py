import io

import numpy as np
import torch
from PIL import Image

from metilr.geometry.check import COLOUR, GAP, SIDE, matching_picture
from metilr.geometry.verify import LocalFeatures, Verification


def test_the_region_is_outlined_in_both_images():
    """Four corners in a photo of 520 px, which is shown at half its size, and the same moved in an image of 260 px."""
    corners = np.array([[100, 100], [300, 100], [300, 300], [100, 300]], dtype=np.float32)
    first = LocalFeatures(corners, np.eye(4, dtype=np.float32))
    second = LocalFeatures(corners / 2 + 20, np.eye(4, dtype=np.float32))
    transform = np.array([[0.5, 0, 20], [0, 0.5, 20], [0, 0, 1.0]])
    found = Verification(np.stack([np.arange(4)] * 2, axis=1), transform)
    grey = [torch.full((3, side, side), 90, dtype=torch.uint8) for side in (2 * SIDE, SIDE)]
    with Image.open(io.BytesIO(matching_picture(*grey, first, second, found))) as picture:
        assert picture.size == (2 * SIDE + GAP, SIDE)
        pixels = np.array(picture).astype(int)
    for edge in ((100, 50), (50, 100), (100 + 20, 50 + 20 + SIDE + GAP), (50 + 20, 100 + 20 + SIDE + GAP)):  # y, x
        assert np.abs(pixels[edge] - COLOUR).max() < 60
    assert np.abs(pixels[10, 10] - 90).max() < 10 and np.abs(pixels[200, SIDE + GAP + 240] - 90).max() < 10
