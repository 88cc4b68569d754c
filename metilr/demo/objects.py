"""Works in the round of the drawn museum: vessels and figurines, rendered from any side and in any light."""

import dataclasses
import math

import numpy as np
from PIL import Image

from metilr.demo.brush import Array, Colour, clouds, grid, mix, pick_colour, to_image


@dataclasses.dataclass(frozen=True)
class View:
    """How an object is photographed.

    Attributes:
        turn: Rotation about the vertical axis, in radians.
        lamp: Where the light comes from: -1 is left, 1 is right.
        ground: Colours of the upper and lower background.
    """

    turn: float = 0.0
    lamp: float = -0.6
    ground: tuple[Colour, Colour] = ((205, 205, 203), (150, 150, 152))


def draw_vessel(
    size: tuple[int, int], work: np.random.Generator, detail: np.random.Generator, view: View
) -> Image.Image:
    """Render a turned and painted vessel: ``work`` throws the pot, ``detail`` paints it."""
    ys, xs = grid(size)
    xs = (xs - 0.5) * size[0] / size[1]  # in heights of the image
    top, foot = work.uniform(0.1, 0.2), work.uniform(0.82, 0.9)
    along = (ys - top) / (foot - top)  # 0 at the mouth, 1 at the foot
    handles = int(work.integers(3))
    # Handles need room at the sides.
    widest = (0.3 if handles else 0.4) * min(1.0, size[0] / size[1])
    radius = _turn_profile(along, widest, work)
    across = xs / radius
    inside = (np.abs(across) < 1) & (along > 0) & (along < 1)
    azimuth = np.arcsin(np.clip(across, -1, 1)) + view.turn

    clay = _pick_glazes(work)
    surface = _paint_bands(azimuth, np.broadcast_to(along, azimuth.shape), clay, work, detail)
    facing = np.sqrt(np.clip(1 - across**2, 0, 1))
    light = 0.35 + 0.7 * np.clip(0.8 * facing + 0.5 * view.lamp * across, 0, 1)
    gloss = 0.35 * work.uniform() * np.exp(-(((across - 0.5 * view.lamp) / 0.12) ** 2))
    body = surface * light[:, :, None] + gloss[:, :, None]

    array = _stage(size, foot, view)
    if handles:
        array = _add_handles(array, xs, along, widest, handles, clay[0], view, work)
    mouth = ((xs / radius.max(where=along < 0.05, initial=0.02)) ** 2 + ((ys - top) / 0.02) ** 2) < 1
    array = np.where(inside[:, :, None], body, array)
    array = np.where((mouth & (along < 0.03))[:, :, None], np.array(clay[0]) / 255 * 0.3, array)
    return to_image(array)


def draw_figurine(
    size: tuple[int, int], work: np.random.Generator, detail: np.random.Generator, view: View
) -> Image.Image:
    """Render a figurine of stone, clay or bronze, modelled from balls; ``detail`` moves its arms and head."""
    balls = _model_figure(work, detail)
    ys, xs = grid(size)
    scale = min(1.0, 1.25 * size[0] / size[1])
    xs, ys = (xs - 0.5) * size[0] / size[1] / scale, (ys - 0.5) / scale
    weight = np.zeros((size[1], size[0]))
    blended = np.zeros_like(weight)
    cos, sin = math.cos(view.turn), math.sin(view.turn)
    for x, y, z, radius in balls:
        seen_x, seen_z = cos * x + sin * z, cos * z - sin * x
        # Only the ball's own rows and columns are touched.
        rows = slice(*np.searchsorted(ys[:, 0], (y - radius, y + radius)))
        columns = slice(*np.searchsorted(xs[0], (seen_x - radius, seen_x + radius)))
        height = radius**2 - (xs[:, columns] - seen_x) ** 2 - (ys[rows] - y) ** 2
        depth = seen_z + np.sqrt(np.clip(height, 0, None))
        # A soft maximum melts the balls into one body.
        share = np.where(height > 0, np.exp(30 * depth), 0)
        weight[rows, columns] += share
        blended[rows, columns] += share * depth
    inside = weight > 0
    relief = np.where(inside, blended / np.maximum(weight, 1e-30), 0)

    slope_y, slope_x = np.gradient(relief * size[1] * scale)
    length = np.sqrt(1 + slope_x**2 + slope_y**2)
    light = np.clip((0.75 - view.lamp * slope_x * 0.6 + 0.5 * slope_y) / length, 0.05, 1.2)
    stone = pick_colour(work, (0.04, 0.5), (0.05, 0.5), (0.3, 0.95))
    veins = 1 + work.uniform(0.02, 0.2) * clouds(work, size, 4, 5)
    body = np.array(stone) / 255 * (0.15 + 0.85 * light * veins)[:, :, None]
    array = np.where(inside[:, :, None], body, _stage(size, 0.5 + 0.42 * scale, view))
    return to_image(array)


def _pick_glazes(work: np.random.Generator) -> list[Colour]:
    """Return the pot's own colour and three to paint it with, dark on light or light on dark."""
    hue, saturation = ((0.02, 0.09), (0.4, 0.75))  # terracotta
    style = work.uniform()
    if style < 0.25:
        hue, saturation = (0.08, 0.15), (0.1, 0.6)  # cream to ochre
    elif style < 0.45:
        hue, saturation = (0.55, 0.65), (0.1, 0.7)  # blue and white
    elif style < 0.6:
        hue, saturation = (0.3, 0.5), (0.1, 0.45)  # celadon
    elif style < 0.7:
        hue, saturation = (0.0, 1.0), (0.2, 0.7)
    light, dark = (0.65, 0.95), (0.1, 0.4)
    body, paint = (light, dark) if work.uniform() < 0.6 else (dark, light)
    return [pick_colour(work, hue, saturation, body)] + [
        pick_colour(work, (-0.05, 0.65), (0.1, 0.7), paint) for _ in range(3)
    ]


def _turn_profile(along: Array, widest: float, work: np.random.Generator) -> Array:
    """Radius of the pot at each height, ``(H, 1)``: a smooth curve through six drawn radii."""
    knots = np.clip(work.uniform(0.3, 1.0, 6), 0, 1)
    knots[int(work.integers(2, 5))] = 1.0
    knots[0] = max(knots[0], 0.3)
    positions = np.linspace(0, 1, 6)
    fine = np.linspace(0, 1, 200)
    rough = np.interp(fine, positions, knots)
    kernel = np.hanning(61)
    smooth = np.convolve(np.pad(rough, 30, mode="edge"), kernel / kernel.sum(), mode="valid")
    return widest * np.interp(np.clip(along, 0, 1), fine, smooth)


def _paint_bands(
    azimuth: Array, along: Array, clay: list[Colour], work: np.random.Generator, detail: np.random.Generator
) -> Array:
    """Paint the pot's surface, ``(H, W, 3)``: bands of ornament, one of them drawn by the detail."""
    surface = mix(clay[0], clay[1], np.zeros_like(azimuth))
    edges = np.sort(work.uniform(0.05, 0.95, 2 * int(work.integers(1, 4))))
    own = int(work.integers(len(edges) // 2))
    for band in range(len(edges) // 2):
        chance = detail if band == own else work
        low, high = edges[2 * band], edges[2 * band + 1]
        if high - low < 0.03:
            high = low + 0.03
        height = (along - low) / (high - low)
        paint = _ornament(azimuth, height, chance) * ((height > 0) & (height < 1))
        rim = (np.abs(height - 0.5) > 0.46) & (np.abs(height - 0.5) < 0.54)
        colour = np.array(clay[int(chance.integers(1, 4))]) / 255
        surface = np.where((paint + rim > 0.5)[:, :, None], colour, surface)
    return surface


def _ornament(azimuth: Array, height: Array, chance: np.random.Generator) -> Array:
    """Draw a frieze on the unrolled wall of the pot: 1 where there is paint."""
    repeats = int(chance.integers(6, 22))
    phase = (azimuth / (2 * math.pi) * repeats) % 1.0
    style = int(chance.integers(6))
    if style == 0:  # zigzag
        painted = np.abs(height - (0.2 + 1.2 * np.abs(phase - 0.5))) < 0.12
    elif style == 1:  # dots
        painted = (phase - 0.5) ** 2 + (height - 0.5) ** 2 < chance.uniform(0.04, 0.14)
    elif style == 2:  # meander
        bars = (np.abs(phase - 0.15) < 0.08) | (np.abs(height - 0.2) < 0.08) & (phase < 0.8)
        painted = bars | (np.abs(phase - 0.75) < 0.08) & (height < 0.7) | (np.abs(height - 0.65) < 0.08) & (phase > 0.4)
    elif style == 3:  # waves
        painted = height > 0.5 + 0.3 * np.sin(2 * math.pi * phase)
    elif style == 4:  # checks
        painted = (phase > 0.5) ^ ((height * chance.integers(2, 5)) % 1.0 > 0.5)
    else:  # leaves
        painted = np.abs(phase - 0.5) < 0.4 * np.sin(math.pi * np.clip(height, 0, 1))
    return painted.astype(np.float64)


def _add_handles(
    array: Array,
    xs: Array,
    along: Array,
    widest: float,
    count: int,
    colour: Colour,
    view: View,
    work: np.random.Generator,
) -> Array:
    """Put one or two ring handles at the pot's sides; a turned pot shows them nearer to the middle."""
    centre, reach, tall = work.uniform(0.25, 0.45), work.uniform(0.5, 0.75) * widest, work.uniform(0.12, 0.2)
    for side in (-1, 1)[:count]:
        x = side * math.cos(view.turn) * 0.75 * widest
        ring = np.hypot((xs - x) / reach, (along - centre) / tall)
        mask = (ring > 0.78) & (ring < 1.0)
        tone = 0.75 + 0.25 * np.cos((ring - 0.89) * 14)
        array = np.where(mask[:, :, None], np.array(colour) / 255 * 0.8 * tone[:, :, None], array)
    return array


def _model_figure(work: np.random.Generator, detail: np.random.Generator) -> list[tuple[float, float, float, float]]:
    """Return the balls of a standing figure as x, y (down), z and radius, in heights of the image."""
    balls = []

    def limb(start: Array, end: Array, thick: float, thin: float) -> None:
        for share in np.linspace(0, 1, 14):
            x, y, z = start + share * (end - start)
            balls.append((float(x), float(y), float(z), thick + share * (thin - thick)))

    stout = work.uniform(0.06, 0.12)
    lean = work.uniform(-0.05, 0.05)
    hip, neck = np.array([0.0, 0.12, 0.0]), np.array([lean, -0.2, 0.0])
    limb(hip, neck, stout * work.uniform(1.0, 1.4), stout * 0.9)
    head = work.uniform(0.055, 0.09)
    nod = detail.uniform(-0.04, 0.04)
    balls.append((lean + nod, -0.29, 0.02, head))
    balls.append((lean + nod, -0.28, 0.02 + head, head * 0.3))  # the nose shows where it looks
    if work.uniform() < 0.4:  # a crown or bun
        balls.append((lean + nod, -0.29 - head, 0.0, head * 0.6))
    for side in (-1, 1):
        shoulder = neck + np.array([side * stout * 1.1, 0.03, 0.0])
        swing = np.array([side * detail.uniform(0.02, 0.14), detail.uniform(-0.1, 0.13), detail.uniform(-0.05, 0.1)])
        elbow = shoulder + swing
        hand = elbow + np.array([side * detail.uniform(-0.1, 0.1), detail.uniform(-0.12, 0.1), 0.06])
        limb(shoulder, elbow, 0.035, 0.03)
        limb(elbow, hand, 0.03, 0.024)
        stance = np.array([side * work.uniform(0.03, 0.1), 0.4, work.uniform(-0.04, 0.06)])
        limb(hip + np.array([side * 0.04, 0.0, 0.0]), stance, 0.055, 0.035)
    if work.uniform() < 0.5:  # a long robe
        limb(hip, np.array([0.0, 0.38, 0.0]), stout, stout * work.uniform(1.1, 1.7))
    for x in np.linspace(-0.14, 0.14, 7):  # the plinth
        balls.extend((float(x), 0.42, z, 0.04) for z in (-0.05, 0.05))
    return balls


def _stage(size: tuple[int, int], foot: float, view: View) -> Array:
    """A studio background with the object's shadow on the table."""
    ys, xs = grid(size)
    upper, lower = view.ground
    array = mix(upper, lower, np.broadcast_to(np.clip((ys - foot + 0.12) * 6, 0, 1), (size[1], size[0])))
    array = array * (1.08 - 0.5 * ((xs - 0.5 - 0.3 * view.lamp) ** 2 + (ys - 0.4) ** 2))[:, :, None]
    shadow = np.exp(-(((xs - 0.5 + 0.12 * view.lamp) / 0.2) ** 2) - ((ys - foot) / 0.025) ** 2)
    return array * (1 - 0.6 * shadow)[:, :, None]
