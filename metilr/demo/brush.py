"""What all drawings share: colours, paint texture, ridges, balls; arrays are float ``(H, W, 3)`` in [0, 1]."""

import colorsys

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Array = NDArray[np.float64]
Colour = tuple[int, int, int]

# Polygons are drawn this much larger and then reduced, which smooths their edges.
OVERSAMPLING = 2


def pick_colour(
    rng: np.random.Generator,
    hue: tuple[float, float] = (0.0, 1.0),
    saturation: tuple[float, float] = (0.2, 0.7),
    value: tuple[float, float] = (0.3, 0.95),
) -> Colour:
    """Draw a colour from ranges of hue, saturation and value."""
    red, green, blue = colorsys.hsv_to_rgb(rng.uniform(*hue) % 1.0, rng.uniform(*saturation), rng.uniform(*value))
    return round(255 * red), round(255 * green), round(255 * blue)


def pick_palette(rng: np.random.Generator, count: int) -> list[Colour]:
    """Draw colours that belong together: neighbours of one hue, and every third its complement."""
    hue, spread = rng.uniform(), rng.uniform(0.04, 0.14)
    palette = []
    for number in range(count):
        centre = hue + (0.5 if number % 3 == 2 else 0.0)
        palette.append(pick_colour(rng, (centre - spread, centre + spread), (0.15, 0.8), (0.2, 0.95)))
    return palette


def shade(colour: Colour, factor: float) -> Colour:
    """Lighten or darken a colour."""
    red, green, blue = (min(255, max(0, round(channel * factor))) for channel in colour)
    return red, green, blue


def start_canvas(size: tuple[int, int], colour: Colour) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """Return an oversampled canvas for an image of ``size`` (width, height), and a pen for it."""
    canvas = Image.new("RGB", (size[0] * OVERSAMPLING, size[1] * OVERSAMPLING), colour)
    return canvas, ImageDraw.Draw(canvas)


def finish_canvas(canvas: Image.Image) -> Image.Image:
    """Reduce an oversampled canvas to its image."""
    return canvas.reduce(OVERSAMPLING)


def to_array(image: Image.Image) -> Array:
    """Convert an image to floats."""
    return np.asarray(image, dtype=np.float64) / 255


def to_image(array: Array) -> Image.Image:
    """Convert floats to an image, clipping."""
    return Image.fromarray((np.clip(array, 0, 1) * 255).astype(np.uint8))


def clouds(rng: np.random.Generator, size: tuple[int, int], coarsest: int = 3, octaves: int = 4) -> Array:
    """Draw smooth noise of several scales, ``(H, W)``, mean about 0 and within about ±1."""
    total = np.zeros((size[1], size[0]))
    for octave in range(octaves):
        cells = coarsest * 2**octave
        grid = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
        total += np.asarray(grid.resize(size, Image.Resampling.BICUBIC)) / 2**octave
    return total


def ridge(rng: np.random.Generator, width: int, roughness: float = 0.5) -> Array:
    """Draw a mountain line by midpoint noise, ``(W,)``, within about ±1."""
    line, points, height = np.zeros(width), 3, 1.0
    while points < width:
        knots = rng.uniform(-height, height, points)
        line += np.interp(np.linspace(0, points - 1, width), np.arange(points), knots)
        points, height = points * 2, height * roughness
    return line / 2


def paint_over(image: Image.Image, rng: np.random.Generator, strength: float = 0.06) -> Image.Image:
    """Give an image the uneven colour and the weave of paint on canvas."""
    array = to_array(image)
    patches = clouds(rng, image.size, 4, 5)[:, :, None]
    weave = rng.normal(size=array.shape[:2])[:, :, None]
    return to_image(array * (1 + strength * patches) + 0.3 * strength * weave)


def grid(size: tuple[int, int]) -> tuple[Array, Array]:
    """Return rows ``(H, 1)`` and columns ``(1, W)`` in [0, 1]."""
    return (np.arange(size[1])[:, None] + 0.5) / size[1], (np.arange(size[0])[None, :] + 0.5) / size[0]


def mix(first: Colour, second: Colour, share: Array) -> Array:
    """Blend two colours, ``(H, W, 3)``, where the share of the second is ``(H, W)``."""
    start, stop = np.array(first) / 255, np.array(second) / 255
    return start + (stop - start) * np.clip(share, 0, 1)[:, :, None]


def draw_ball(pen: ImageDraw.ImageDraw, centre: tuple[float, float], radius: float, colour: Colour) -> None:
    """Draw a ball lit from the upper left."""
    x, y = centre
    pen.ellipse((x - radius, y + 0.6 * radius, x + 1.5 * radius, y + 1.2 * radius), fill=(50, 40, 35))
    for step in range(8):
        share = step / 8
        size = radius * (1 - share)
        left, top = x - 0.35 * radius * share, y - 0.35 * radius * share
        pen.ellipse((left - size, top - size, left + size, top + size), fill=shade(colour, 0.55 + 0.65 * share))
