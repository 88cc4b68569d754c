"""What scene, light and camera make of a simulated visit.

A photograph is red, green and blue in [0, 1], ``(3, H, W)``, float32, and is changed in place, plane by plane, since a
plane of 500 px stays in a processor's cache.
"""

import math
from typing import NamedTuple

import cv2
import numpy as np
import torch


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

    def choose(self, options: tuple[tuple[float, float, float], ...]) -> np.ndarray:
        """One of the colours, ``(3,)``."""
        return np.array(options[int(self.uniform(0, len(options)))], np.float32)

    def normal(self, *shape: int) -> np.ndarray:
        """Standard normal numbers in that shape, float32."""
        return torch.randn(shape, generator=self.generator).numpy()


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


class Frame(NamedTuple):
    """A bevelled frame: its colour, ``(3,)``, how many bevels it has, and the width of its bars in px."""

    colour: np.ndarray
    bevels: float
    width: int


def choose_frame(height: int, width: int, strength: float, stream: Stream) -> Frame:
    """A frame for a picture of that size; of no width if the strength is 0."""
    colour, effect, bevels = stream.choose(_FRAME_COLOURS), stream.effect(strength), stream.uniform(0.5, 2.5)
    return Frame(colour, bevels, whole_pixels(0.16 * effect * min(height, width)) if strength > 0 else 0)


def put_in_frame(picture: np.ndarray, frame: Frame) -> np.ndarray:
    """Put the frame around the picture: uint8, ``(3, H, W)`` to ``(3, H + 2 width, W + 2 width)``."""
    colour, width = frame.colour[:, None, None], frame.width
    framed = np.pad(picture, ((0, 0), (width, width), (width, width)))
    if width == 0:
        return framed
    # 0 at the outer edge of the frame, 1 at its inner edge, where it casts its shadow.
    depth = (np.arange(width, dtype=np.float32) + 0.5) / width
    profile = 0.85 + 0.2 * np.sin(2 * math.pi * frame.bevels * depth) - 0.3 * depth**6
    bar = _levels(colour * profile)  # 3 x 1 x width
    framed[:, width:-width, :width], framed[:, width:-width, -width:] = bar, bar[..., ::-1]
    from_edge, columns = np.arange(width)[:, None], np.arange(framed.shape[2])
    from_side = np.minimum(columns, columns[::-1])
    profile = profile[np.minimum(from_edge, from_side)]  # the bars meet in diagonals
    # Galleries are lit from above: the lower bar's bevel faces the lamps.
    upper, lower = (profile * np.where(from_edge < from_side, np.float32(lit), 1) for lit in (0.85, 1.15))
    framed[:, :width], framed[:, -width:] = _levels(colour * upper), _levels(colour * lower)[:, ::-1]
    return framed


def _levels(colours: np.ndarray) -> np.ndarray:
    return (255 * colours).round().clip(0, 255).astype(np.uint8)


def paint_wall(coverage: np.ndarray, stream: Stream) -> np.ndarray:
    """The wall behind the picture, ``(3, H, W)``: plaster, the picture's shadow and its label."""
    height, width = coverage.shape
    colour = stream.choose(_WALL_COLOURS) * np.float32(stream.uniform(0.85, 1.05))
    plaster = cv2.resize(1 + 0.03 * stream.normal(12, 12), (width, height))
    offset = max(1, round(0.02 * max(height, width)))
    step = _step(height, width)
    size = -(-width // step), -(-height // step)
    coarse = cv2.resize(np.roll(coverage, offset, 0), size, interpolation=cv2.INTER_AREA)
    shadow = cv2.resize(gaussian_blur(coarse, offset / step, offset / step), (width, height))
    wall = colour[:, None, None] * (plaster * (1 - 0.45 * shadow))
    if stream.uniform() < 0.6:
        left, top = int(stream.uniform(0, 0.9) * width), int(stream.uniform(0.5, 0.9) * height)
        label = wall[:, top : top + max(1, height // 18), left : left + max(1, width // 12)]
        label[:] = 0.25 * label + 0.7
    return wall


def _step(height: int, width: int) -> int:
    """Pixels to one of the planes that shadows and lamps are drawn in: their soft rims are some 2% of a side wide."""
    return max(1, min(4, max(height, width) // 80))


_GREY = (0.2989, 0.587, 0.114)  # of red, green and blue, as ITU-R BT.601 and torchvision have it


def light_badly(photograph: np.ndarray, strength: float, stream: Stream) -> None:
    """Light the photograph dimly, in a tint and unevenly; may leave [0, 1]."""
    if strength == 0:
        return
    brightness, saturation = 1 - 0.6 * stream.effect(strength), 1 - 0.4 * stream.effect(strength)
    # Lamps are warm more often than cold: red up and blue down, or the other way round.
    warmth = 0.3 * stream.effect(strength) * (1 if stream.uniform() < 0.7 else -1)
    green = 0.05 * strength * stream.uniform(-1, 1)
    gains = (brightness * (1 + warmth / 2), brightness * (1 + green), brightness * (1 - warmth / 2))
    ys, xs = _pixel_centres(*photograph.shape[1:])
    angle = stream.uniform(0, 2 * math.pi)
    along = math.cos(angle) * (xs - 0.5) + math.sin(angle) * (ys - 0.5)
    # along spans at most ±√½: 0 nearest to the lamp, 1 in the far corner
    falloff = 1 - 0.6 * stream.effect(strength) * (along / math.sqrt(2) + 0.5)
    grey = sum(share * plane for share, plane in zip(_GREY, photograph, strict=True)) * (1 / saturation - 1)
    falloff *= saturation
    for plane, gain in zip(photograph, gains, strict=True):
        plane += grey
        plane *= gain * falloff


def add_glare(photograph: np.ndarray, coverage: np.ndarray, strength: float, stream: Stream) -> None:
    """Mirror lamps in the picture, where ``coverage``, ``(H, W)``, is its share of a pixel."""
    if strength == 0:
        return
    height, width = coverage.shape
    step = _step(height, width)
    ys, xs = _pixel_centres(-(-height // step), -(-width // step))
    dark = np.ones((ys.shape[0], xs.shape[1]), np.float32)
    for _ in range(1 + int(stream.uniform(0, 3) * strength)):
        centre_x, centre_y = stream.uniform(0.15, 0.85), stream.uniform(0.1, 0.8)
        radius_x = 0.12 * stream.effect(strength) + 0.02
        radius_y = radius_x * stream.uniform(0.5, 1.8)
        # A fourth power has the flat top and soft rim of a mirrored lamp or window.
        lamp = np.exp(-(((xs - centre_x) / radius_x) ** 4)) * np.exp(-(((ys - centre_y) / radius_y) ** 4))
        halo = np.exp(-(((xs - centre_x) / (3 * radius_x)) ** 2)) * np.exp(-(((ys - centre_y) / (3 * radius_x)) ** 2))
        dark *= 1 - stream.effect(strength) * (0.8 * lamp + 0.25 * halo)
    # Varnish and glass mirror lamps, a painted wall does not.
    mirrored = cv2.resize(1 - dark, (width, height)) * coverage
    for plane in photograph:
        plane += mirrored * (1 - plane)


def _pixel_centres(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows ``(H, 1)`` and columns ``(1, W)`` of the pixels' centres, in shares of the sides."""
    ys, xs = ((np.arange(n, dtype=np.float32) + 0.5) / n for n in (height, width))
    return ys[:, None], xs[None, :]


def blur(photograph: np.ndarray, strength: float, stream: Stream) -> None:
    """Blur by lens and shaking hand."""
    if strength == 0:
        return
    # Less than 0.3 px would not show.
    sigma = max(0.3, 0.012 * max(photograph.shape[1:]) * stream.effect(strength))
    shake = stream.uniform(0.4, 1.0)
    sigmas = (sigma, sigma * shake) if stream.sign() > 0 else (sigma * shake, sigma)
    for plane in photograph:
        plane[:] = gaussian_blur(plane, *sigmas)


def gaussian_blur(plane: np.ndarray, sigma_x: float, sigma_y: float) -> np.ndarray:
    """Blur along both axes as torchvision does, to three standard deviations; edges reflect."""
    sigmas = (plane.shape[1], sigma_x), (plane.shape[0], sigma_y)
    size = [2 * min(math.ceil(3 * sigma), n - 1) + 1 for n, sigma in sigmas]  # nothing past the opposite edge
    return cv2.GaussianBlur(plane, size, sigma_x, sigmaY=sigma_y, borderType=cv2.BORDER_REFLECT_101)


def add_noise(photograph: np.ndarray, strength: float, stream: Stream) -> None:
    """Add fine noise and coarse blotches of colour; may leave [0, 1]."""
    if strength == 0:
        return
    sigma = 0.12 * stream.effect(strength)
    height, width = photograph.shape[1:]
    fine = 0.8 * sigma * stream.normal(height, width)
    coarse = 0.6 * sigma * stream.normal(3, whole_pixels(height / 3), whole_pixels(width / 3))
    for plane, blotches in zip(photograph, coarse, strict=True):
        plane += fine
        plane += cv2.resize(blotches, (width, height))


def shrunk_shape(height: int, width: int, strength: float, stream: Stream) -> tuple[int, int]:
    """Height and width of the small file that a photograph of that size becomes."""
    if strength == 0:
        return height, width
    share = 1 - 0.75 * stream.effect(strength)
    return whole_pixels(height * share), whole_pixels(width * share)


def compress(image: np.ndarray, strength: float, stream: Stream) -> np.ndarray:
    """Compress as JPEG; uint8, ``(H, W, 3)``, blue first as OpenCV has it, before and after."""
    if strength == 0:
        return image
    _, file = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, round(95 - 85 * stream.effect(strength))])
    return np.asarray(cv2.imdecode(file, cv2.IMREAD_COLOR))
