"""Pictures full of detail, each by its seed."""

import cv2
import numpy as np
from PIL import Image


def picture(seed: int, width: int = 360, height: int = 300) -> Image.Image:
    """Shapes and texture of several sizes."""
    rng = np.random.default_rng(seed)
    noise = sum(
        scale * cv2.GaussianBlur(rng.standard_normal((height, width, 3)).astype(np.float32), (0, 0), scale)
        for scale in (1.5, 4.0, 12.0)
    )
    canvas = np.clip(128 + 40 * noise, 0, 255).astype(np.uint8)
    for _ in range(25):
        middle = (int(rng.integers(width)), int(rng.integers(height)))
        colour = tuple(int(level) for level in rng.integers(0, 255, 3))
        size = int(rng.integers(6, 40))
        if rng.random() < 0.5:
            cv2.circle(canvas, middle, size, colour, -1)
        else:
            cv2.rectangle(canvas, middle, (middle[0] + size, middle[1] + size), colour, -1)
    return Image.fromarray(canvas)
