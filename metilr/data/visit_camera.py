"""What lens, sensor and file format make of a simulated visit: blur, small size, noise and compression.

Images are float in [0, 1], ``(3, H, W)``, if not said otherwise; with strength 0 each function returns the image
as it is.
"""

import io
import math

import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from metilr.data.visit_stream import Stream


def blur(image: torch.Tensor, strength: float, stream: Stream) -> torch.Tensor:
    """Blur by lens and shaking hand."""
    if strength == 0:
        return image
    # Less than 0.3 px would not show.
    sigma = max(0.3, 0.012 * max(image.shape[1:]) * stream.effect(strength))
    shake = stream.uniform(0.4, 1.0)
    sigmas = (sigma, sigma * shake) if stream.sign() > 0 else (sigma * shake, sigma)
    return gaussian_blur(image, *sigmas)


def shrink(image: torch.Tensor, strength: float, stream: Stream) -> torch.Tensor:
    """Shrink to a small file's size."""
    if strength == 0:
        return image
    return F.resize(image, list(shrunk_shape(image.shape[1], image.shape[2], strength, stream)), antialias=True)


def shrunk_shape(height: int, width: int, strength: float, stream: Stream) -> tuple[int, int]:
    """Height and width of what ``shrink`` makes of an image of that size."""
    if strength == 0:
        return height, width
    share = 1 - 0.75 * stream.effect(strength)
    return whole_pixels(height * share), whole_pixels(width * share)


def add_noise(image: torch.Tensor, strength: float, stream: Stream) -> torch.Tensor:
    """Add fine noise and coarse blotches of colour; may leave [0, 1]."""
    if strength == 0:
        return image
    # torchvision's gaussian_noise draws from the global random state, which a visit must leave alone.
    sigma = 0.12 * stream.effect(strength)
    height, width = image.shape[1:]
    fine = stream.normal(1, height, width)
    coarse = stream.normal(3, whole_pixels(height / 3), whole_pixels(width / 3))
    blotches = F.resize(coarse, [height, width], antialias=True)
    return image + sigma * (0.8 * fine + 0.6 * blotches)


def compress(image: torch.Tensor, strength: float, stream: Stream) -> torch.Tensor:
    """Compress as JPEG; the image is uint8, before and after."""
    if strength == 0:
        return image
    # Pillow's encoder, since torchvision deprecated its own, which transforms.v2 still calls.
    file = io.BytesIO()
    F.to_pil_image(image).save(file, "JPEG", quality=round(95 - 85 * stream.effect(strength)))
    with Image.open(file) as compressed:
        return F.pil_to_tensor(compressed).contiguous()


def gaussian_blur(image: torch.Tensor, sigma_x: float, sigma_y: float) -> torch.Tensor:
    """Blur along both axes as torchvision does, each by one matrix product: a few times as fast as its convolution."""
    return _blur_matrix(image.shape[1], sigma_y) @ image @ _blur_matrix(image.shape[2], sigma_x).T


def _blur_matrix(n: int, sigma: float) -> torch.Tensor:
    """Blur of n pixels in a row: each output's weights of the inputs, ``(n, n)``; edges reflect."""
    # Reflection cannot reach past the opposite edge.
    radius = min(math.ceil(3 * sigma), n - 1)
    offsets = torch.arange(-radius, radius + 1)
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    inputs = (torch.arange(n)[:, None] + offsets).abs()
    inputs = n - 1 - (n - 1 - inputs).abs()
    return torch.zeros(n, n).scatter_add_(1, inputs, (weights / weights.sum()).expand(n, -1))


def whole_pixels(side: float) -> int:
    """Round a length to whole pixels, at least one."""
    return max(1, round(side))
