"""What scene, light and camera make of a simulated visit."""

import io
import math

import cv2
import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F


class Stream:
    """Random numbers of one part of one visit, from its own seed; no other random state is read or changed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """One number in [low, high)."""
        return low + (high - low) * torch.rand((), generator=self.generator, dtype=torch.float64).item()

    def effect(self, strength: float) -> float:
        """Between 40% and 100% of the strength: a part that is on always shows."""
        return strength * self.uniform(0.4, 1.0)

    def sign(self) -> int:
        """1 or -1, equally likely."""
        return 1 if self.uniform() < 0.5 else -1

    def choose(self, options: tuple[tuple[float, float, float], ...]) -> torch.Tensor:
        """One of the colours, ``(3, 1, 1)``."""
        return torch.tensor(options[int(self.uniform(0, len(options)))])[:, None, None]

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal numbers in that shape."""
        return torch.randn(shape, generator=self.generator)


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
    return (
        image
        if strength == 0
        else F.resize(image, list(shrunk_shape(image.shape[1], image.shape[2], strength, stream)), antialias=True)
    )


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
    noise = F.resize(coarse.mul_(0.6 * sigma), [height, width], antialias=True)
    return noise.add_(fine, alpha=0.8 * sigma).add_(image)


def compress(image: torch.Tensor, strength: float, stream: Stream) -> torch.Tensor:
    """Compress as JPEG; the image is uint8, before and after."""
    if strength == 0:
        return image
    # Pillow's encoder, since torchvision deprecated its own, which transforms.v2 still calls.
    file = io.BytesIO()
    picture = Image.fromarray(np.ascontiguousarray(image.numpy().transpose(1, 2, 0)))
    picture.save(file, "JPEG", quality=round(95 - 85 * stream.effect(strength)))
    with Image.open(file) as compressed:
        return torch.from_numpy(np.asarray(compressed).transpose(2, 0, 1).copy())


def gaussian_blur(image: torch.Tensor, sigma_x: float, sigma_y: float) -> torch.Tensor:
    """Blur along both axes as torchvision does; edges reflect.

    OpenCV's is several times as fast. It runs in one thread, so it is safe in processes that were forked.
    """
    rows, columns = (_gaussian(n, sigma) for n, sigma in zip(image.shape[1:], (sigma_y, sigma_x), strict=True))
    blurred = [
        cv2.sepFilter2D(plane.numpy(), -1, columns, rows, borderType=cv2.BORDER_REFLECT_101)
        for plane in image.contiguous()
    ]
    return torch.from_numpy(np.stack(blurred))


def _gaussian(n: int, sigma: float) -> np.ndarray:
    """Weights of a blur along n pixels, ``(2 r + 1,)``, of which some 99.7% of a Gaussian remain."""
    radius = min(math.ceil(3 * sigma), n - 1)  # reflection cannot reach past the opposite edge
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return (weights / weights.sum()).astype(np.float32)


def whole_pixels(side: float) -> int:
    """Round a length to whole pixels, at least one."""
    return max(1, round(side))


# RGB in [0, 1]: gilt, pale gilt, walnut, oak, ebony, white lacquer.
_FRAME_COLOURS = (
    (0.72, 0.55, 0.25), (0.80, 0.70, 0.46), (0.30, 0.19, 0.12), (0.58, 0.42, 0.27), (0.10, 0.09, 0.09),
    (0.90, 0.89, 0.86),
)  # fmt: skip
# White, warm grey, cool grey, cream, sage, Pompeian red, slate blue: what galleries are painted in.
_WALL_COLOURS = (
    (0.90, 0.89, 0.87), (0.74, 0.71, 0.67), (0.62, 0.64, 0.66), (0.86, 0.80, 0.66), (0.55, 0.60, 0.50),
    (0.48, 0.20, 0.18), (0.30, 0.36, 0.45),
)  # fmt: skip


def put_in_frame(image: torch.Tensor, strength: float, stream: Stream) -> torch.Tensor:
    """Put a bevelled frame around the picture."""
    if strength == 0:
        return image
    colour, width = _choose_frame(image.shape[1], image.shape[2], strength, stream)
    bevels = stream.uniform(0.5, 2.5)
    framed = image.new_empty(3, image.shape[1] + 2 * width, image.shape[2] + 2 * width)
    framed[:, width:-width, width:-width] = image
    # 0 at the outer edge of the frame, 1 at its inner edge, where it casts its shadow.
    depth = (torch.arange(width) + 0.5) / width
    profile = 0.85 + 0.2 * torch.sin(2 * math.pi * bevels * depth) - 0.3 * depth**6
    bar = (colour * profile).clamp(0, 1)  # 3 x 1 x width
    framed[:, width:-width, :width], framed[:, width:-width, -width:] = bar, bar.flip(2)
    from_edge, columns = torch.arange(width)[:, None], torch.arange(framed.shape[2])
    from_side = torch.minimum(columns, columns.flip(0))
    profile = profile[torch.minimum(from_edge, from_side)]  # the bars meet in diagonals
    # Galleries are lit from above: the lower bar's bevel faces the lamps.
    upper, lower = (profile * torch.where(from_edge < from_side, lit, 1.0) for lit in (0.85, 1.15))
    framed[:, :width], framed[:, -width:] = (colour * upper).clamp(0, 1), (colour * lower).clamp(0, 1).flip(1)
    return framed


def framed_shape(height: int, width: int, strength: float, stream: Stream) -> tuple[int, int]:
    """Height and width of what ``put_in_frame`` makes of a picture of that size."""
    if strength == 0:
        return height, width
    _, bar = _choose_frame(height, width, strength, stream)
    return height + 2 * bar, width + 2 * bar


def _choose_frame(height: int, width: int, strength: float, stream: Stream) -> tuple[torch.Tensor, int]:
    """Colour ``(3, 1, 1)`` and width in px of the frame's bars."""
    colour = stream.choose(_FRAME_COLOURS)
    return colour, max(1, round(0.16 * stream.effect(strength) * min(height, width)))


_GREY = torch.tensor([0.2989, 0.587, 0.114])  # of red, green and blue, as ITU-R BT.601 and torchvision have it


def paint_wall(coverage: torch.Tensor, strength: float, stream: Stream) -> torch.Tensor:
    """The wall behind the picture, ``(3, H, W)``: plaster, the picture's shadow and its label."""
    height, width = coverage.shape[1:]
    colour = stream.choose(_WALL_COLOURS) * stream.uniform(0.85, 1.05)
    plaster = F.resize(1 + 0.03 * stream.normal(1, 12, 12), [height, width], antialias=True)
    offset = max(1, round(0.02 * max(height, width)))
    shadow = gaussian_blur(coverage.roll(offset, 1), offset, offset)
    wall = colour * (plaster * (1 - 0.45 * shadow))
    if strength > 0 and stream.uniform() < 0.6:
        left, top = int(stream.uniform(0, 0.9) * width), int(stream.uniform(0.5, 0.9) * height)
        label = wall[:, top : top + max(1, height // 18), left : left + max(1, width // 12)]
        label.copy_(0.25 * label + 0.7)
    return wall


def light_badly(image: torch.Tensor, strength: float, stream: Stream) -> torch.Tensor:
    """Light the photograph dimly, in a tint and unevenly."""
    if strength == 0:
        return image
    brightness, saturation = 1 - 0.6 * stream.effect(strength), 1 - 0.4 * stream.effect(strength)
    # Lamps are warm more often than cold: red up and blue down, or the other way round.
    warmth = 0.3 * stream.effect(strength) * (1 if stream.uniform() < 0.7 else -1)
    green = 0.05 * strength * stream.uniform(-1, 1)
    gains = brightness * torch.tensor([1 + warmth / 2, 1 + green, 1 - warmth / 2])
    pale = saturation * torch.eye(3) + (1 - saturation) * _GREY
    ys, xs = _pixel_centres(image)
    angle = stream.uniform(0, 2 * math.pi)
    along = math.cos(angle) * (xs / image.shape[2] - 0.5) + math.sin(angle) * (ys / image.shape[1] - 0.5)
    # along spans at most ±√½: 0 nearest to the lamp, 1 in the far corner
    falloff = 1 - 0.6 * stream.effect(strength) * (along / math.sqrt(2) + 0.5)
    lit = (gains[:, None] * pale) @ image.flatten(1)
    return (lit.view_as(image) * falloff).clamp_(0, 1)


def add_glare(image: torch.Tensor, coverage: torch.Tensor, strength: float, stream: Stream) -> torch.Tensor:
    """Mirror lamps in the picture, where ``coverage``, ``(1, H, W)``, is its share of a pixel."""
    if strength == 0:
        return image
    ys, xs = _pixel_centres(image)
    ys, xs = ys / image.shape[1], xs / image.shape[2]
    lamps, dark = 1 + int(stream.uniform(0, 3) * strength), torch.ones_like(coverage)
    for _ in range(lamps):
        centre_x, centre_y = stream.uniform(0.15, 0.85), stream.uniform(0.1, 0.8)
        radius_x = 0.12 * stream.effect(strength) + 0.02
        radius_y = radius_x * stream.uniform(0.5, 1.8)
        # A fourth power has the flat top and soft rim of a mirrored lamp or window.
        shape = torch.exp(-(((xs - centre_x) / radius_x) ** 4)) * torch.exp(-(((ys - centre_y) / radius_y) ** 4))
        halo = torch.exp(-(((xs - centre_x) / (3 * radius_x)) ** 2)) * torch.exp(
            -(((ys - centre_y) / (3 * radius_x)) ** 2)
        )
        amount = stream.effect(strength) * (0.8 * shape + 0.25 * halo)
        # Varnish and glass mirror lamps, a painted wall does not.
        dark *= 1 - amount * coverage
    return image.sub(1).mul_(dark).add_(1).clamp_(0, 1)


def _pixel_centres(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows ``(H, 1)`` and columns ``(1, W)`` of the pixels' centres."""
    height, width = image.shape[1:]
    return torch.arange(height)[:, None] + 0.5, torch.arange(width)[None, :] + 0.5
