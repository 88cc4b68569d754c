"""What the drawn museum shows: works of art, flat and in the round, and what else visitors photograph.

A work takes two sources of chance: ``work`` settles its composition or shape, ``detail`` its ornament, in which
near-twins differ. Lengths are in widths of the picture, whose height is ``pen.tall``; colours are 0 to 255.
"""

import colorsys
import itertools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageDraw

Size = tuple[int, int]  # width, height in px
Random = np.random.Generator
Colour = tuple[int, int, int]
_INK = (28, 26, 28)


def pick_colour(rng: Random, hue: Any = (0, 1), saturation: Any = (0.2, 0.7), value: Any = (0.3, 0.95)) -> Colour:
    """Draw a colour from ranges of hue, saturation and value."""
    red, green, blue = colorsys.hsv_to_rgb(rng.uniform(*hue) % 1, rng.uniform(*saturation), rng.uniform(*value))
    return round(255 * red), round(255 * green), round(255 * blue)


def _shade(colour: Colour, factor: float) -> Colour:
    red, green, blue = (min(255, round(channel * factor)) for channel in colour)
    return red, green, blue


def _mix(first: Colour, second: Colour, share: np.ndarray) -> np.ndarray:
    return np.array(first) + np.subtract(second, first) * np.clip(share, 0, 1)[..., None]


def _clouds(rng: Random, size: Size) -> np.ndarray:
    """Smooth noise of four scales, ``(H, W)``, within about ±1; a row of it is a mountain line."""
    grids = [rng.uniform(-1, 1, (cells, cells)) * 1.5 / cells for cells in (3, 6, 12, 24)]
    return np.sum([cv2.resize(grid, size, interpolation=cv2.INTER_CUBIC) for grid in grids], axis=0)


def _image(array: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(array, 0, 255).astype(np.uint8))


class _Pen:
    """Draws at twice the picture's size, which smooths edges, in widths of the picture."""

    def __init__(self, size: Size, ground: Colour | np.ndarray) -> None:
        self.scale, self.tall = 2 * size[0], size[1] / size[0]
        canvas = _image(np.broadcast_to(np.array(ground), (size[1], size[0], 3)))
        self.canvas = canvas.resize((2 * size[0], 2 * size[1]))
        self.draw = ImageDraw.Draw(self.canvas)

    def polygon(self, points: Iterable[Any], fill: Colour) -> None:
        self.draw.polygon([(x * self.scale, y * self.scale) for x, y in points], fill=fill)

    def box(self, left: float, top: float, right: float, low: float, fill: Colour) -> None:
        self.polygon([(left, top), (right, top), (right, low), (left, low)], fill)

    def line(self, points: Iterable[Any], fill: Colour, thick: float) -> None:
        points = [(x * self.scale, y * self.scale) for x, y in points]
        self.draw.line(points, fill=fill, width=max(1, round(thick * self.scale)))

    def disc(self, x: float, y: float, radius: float, fill: Colour, tall: float = 1) -> None:
        x, y, across, down = (self.scale * length for length in (x, y, radius, radius * tall))
        self.draw.ellipse((x - across, y - down, x + across, y + down), fill=fill)

    def finish(self, rng: Random, roughness: float) -> Image.Image:
        """Return the picture, with uneven colour and the grain of canvas, cloth or paper."""
        array = np.asarray(self.canvas.reduce(2))
        grain = 2 * _clouds(rng, array.shape[1::-1]) + rng.normal(size=array.shape[:2]) / 2
        return _image(array * (1 + roughness * grain[..., None]))


def draw_landscape(size: Size, work: Random, detail: Random) -> Image.Image:
    """Draw sky, mountains, a plain or water, trees; the detail is the sun and some of the trees."""
    ys, horizon = np.linspace(0, 1, size[1])[:, None], work.uniform(0.4, 0.7)
    high = pick_colour(work, (0.5, 0.68), (0.1, 0.6), (0.4, 0.95))
    low = pick_colour(work, (0.0, 0.17), (0.1, 0.5), (0.7, 0.98))
    land = pick_colour(work, (0.08, 0.4), (0.2, 0.6), (0.3, 0.75))
    array = _mix(high, low, ys / horizon + 0.3 * _clouds(work, size))
    for layer in range(int(work.integers(1, 4))):
        line = horizon - 0.2 + 0.07 * layer + 0.25 * _clouds(work, size)[0]
        array = np.where((ys > line)[..., None], _mix(low, _shade(land, 0.6), np.array(0.35 + 0.2 * layer)), array)
    plain = (low, _shade(high, 0.7)) if work.uniform() < 0.35 else (land, _shade(land, 0.5))  # water mirrors the sky
    ground = _mix(*plain, (ys - horizon) / (1 - horizon) + 0.15 * _clouds(work, size))
    pen = _Pen(size, np.where((ys > horizon)[..., None], ground, array))
    pen.disc(detail.uniform(0, 1), pen.tall * horizon * detail.uniform(0.1, 0.7), 0.03, _shade(low, 1.3))
    for chance in [work] * int(work.integers(3, 12)) + [detail] * int(detail.integers(1, 4)):
        near = chance.uniform(0.2, 1) ** 2
        x, foot, height = chance.uniform(), pen.tall * (horizon + (0.95 - horizon) * near), 0.04 + 0.25 * near
        leaves = _shade(land, chance.uniform(0.35, 0.9))
        pen.line([(x, foot), (x, foot - height / 2)], (60, 42, 30), 0.06 * height)
        for up in np.linspace(0.2, 0.9, 8) if chance.uniform() < 0.4 else chance.uniform(0.45, 0.95, 9):
            pen.disc(x + height * chance.normal(0, 0.1), foot - up * height, height * (0.2 - 0.13 * up), leaves)
    return pen.finish(work, 0.1)


def draw_portrait(size: Size, work: Random, detail: Random) -> Image.Image:
    """Draw a sitter before a dark ground; the detail is the collar and a brooch."""
    pen = _Pen(size, pick_colour(work, saturation=(0.1, 0.6), value=(0.12, 0.8)))
    x, y, head = work.uniform(0.35, 0.65), pen.tall * work.uniform(0.3, 0.46), work.uniform(0.11, 0.19)
    skin = pick_colour(work, (0.03, 0.09), (0.25, 0.6), (0.45, 0.95))
    hair = pick_colour(work, (0.02, 0.14), (0.2, 0.7), (0.08, 0.75))
    chest, felt = y + 2 * head, pick_colour(work)
    pen.disc(x, chest + 0.8, work.uniform(0.25, 0.5), pick_colour(work, value=(0.12, 0.7)), 2)
    pen.disc(x, y, 1.25 * head, hair, work.uniform(1.2, 2.2))
    pen.box(x - 0.45 * head, y, x + 0.45 * head, chest + 0.3 * head, _shade(skin, 0.8))
    linen, beads = pick_colour(detail, value=(0.6, 1.0)), int(detail.integers(2, 14))
    for angle in np.linspace(0.2, math.pi - 0.2, beads):
        pen.disc(x + head * math.cos(angle), chest + 0.8 * head * math.sin(angle), 0.9 * head / beads + 0.01, linen)
    pen.disc(x + head * detail.uniform(-0.7, 0.7), chest + 1.2 * head, 0.2 * head, pick_colour(detail))
    pen.disc(x, y, head, skin, 1.3)
    pen.disc(x, y - 1.05 * head, head * work.uniform(0.7, 1), hair, 0.5)
    if work.uniform() < 0.4:
        pen.box(x - 0.8 * head, y - head * work.uniform(1.5, 2.5), x + 0.8 * head, y - head, felt)
        pen.disc(x, y - 0.95 * head, head * work.uniform(1.2, 1.9), _shade(felt, 0.8), 0.15)
    for eye in (x - 0.4 * head, x + 0.4 * head):
        pen.disc(eye, y, 0.2 * head, (225, 220, 210), 0.5)
        pen.disc(eye, y, 0.1 * head, _INK)
    pen.disc(x, y + 0.4 * head, 0.12 * head, _shade(skin, 0.8), 1.5)
    pen.disc(x, y + 0.8 * head, head * work.uniform(0.2, 0.4), (150, 70, 70), 0.3)
    return pen.finish(work, 0.1)


def draw_abstract(size: Size, work: Random, detail: Random) -> Image.Image:
    """Draw coloured fields in a grid, or discs, splinters and lines; the last of them are the detail."""
    hue, splinters = work.uniform(), work.uniform(-0.5, 1)
    hues = [hue, hue + 0.1, hue - 0.1, hue + 0.5, hue + 0.45]  # neighbours, and their complements
    palette = [pick_colour(work, (hue, hue), (0.15, 0.8), (0.2, 0.95)) for hue in hues]
    pen = _Pen(size, _shade(palette[0], 1.3))
    if splinters < 0:
        xs, ys = (itertools.pairwise([0, *np.sort(work.uniform(0, 1, work.integers(2, 6))), 1]) for _ in range(2))
        for (left, right), (top, low) in itertools.product(xs, ys):
            pen.box(left, top * pen.tall, right, low * pen.tall, _INK)
            pen.box(left, top * pen.tall, right - 0.02, low * pen.tall - 0.02, palette[work.integers(5)])
    for chance in [work] * int(work.integers(8, 30)) * (splinters > 0) + [detail] * 3:
        centre, reach, fill = chance.uniform(0, [1, pen.tall]), chance.uniform(0.03, 0.25), palette[chance.integers(5)]
        if chance.uniform() < splinters:
            pen.polygon(centre + reach * chance.uniform(-1, 1, (3, 2)), fill)
        else:
            pen.disc(centre[0], centre[1], reach, _shade(fill, chance.uniform(0.6, 1.2)))
        pen.line(chance.uniform(0, [1, pen.tall], (2, 2)), _INK, chance.uniform(0, 0.01))
    return pen.finish(work, 0.05)


def draw_textile(size: Size, work: Random, detail: Random) -> Image.Image:
    """Draw a cloth: a small abstract, mirrored again and again."""
    side = max(4, round(max(size) * work.uniform(0.08, 0.2)))
    motif = np.asarray(draw_abstract((side, side), work, detail))
    return Image.fromarray(np.pad(motif, ((0, size[1] - side), (0, size[0] - side), (0, 0)), mode="symmetric"))


def draw_print(size: Size, work: Random, detail: Random) -> Image.Image:
    """Draw an etching of hills or trees on toned paper; the detail is its hatching, the state of the plate."""
    paper = pick_colour(work, (0.05, 0.17), (0.05, 0.35), (0.7, 0.95))
    ink = pick_colour(work, saturation=(0.1, 0.6), value=(0.08, 0.35))
    pen, hills = _Pen(size, paper), int(work.integers(4, 10)) if work.uniform() < 0.5 else 1
    for row in range(hills):  # nearer ones hide farther ones and are darker, as mist would have it
        line = pen.tall * (0.9 - 0.07 * (hills - row) + 0.15 * _clouds(work, (60, 3))[1])
        points = [*zip(np.linspace(0.06, 0.94, 60), line, strict=True)]
        pen.polygon([*points, (0.94, 0.94 * pen.tall), (0.06, 0.94 * pen.tall)], _shade(paper, 1 - 0.5 * row / hills))
        pen.line(points, ink, work.uniform(0.004, 0.012))
    tips = [(work.uniform(0.2, 0.8), 0.9 * pen.tall, -1.57) for _ in range(int(work.integers(1, 4)) * (hills == 1))]
    length, shorter, spread, leaf = work.uniform([0.1, 0.6, 0.2, 0], [0.3, 0.85, 1.2, 0.02])
    for depth in range(6):
        branches, tips = tips, []
        for x, y, angle in branches:
            reach = pen.tall * length * shorter**depth * work.uniform(0.8, 1.2)
            end = x + reach * math.cos(angle), y + reach * math.sin(angle)
            pen.line([(x, y), end], ink, 0.003 * (6 - depth))
            pen.disc(end[0], end[1], leaf * (depth == 5), ink)
            tips += [(*end, angle + side * spread * work.uniform(0.2, 1)) for side in (-1, 1)]
    for _ in range(int(detail.integers(1, 4))):
        left, top, reach = detail.uniform(0.1, 0.6), pen.tall * detail.uniform(0.1, 0.7), detail.uniform(0.1, 0.25)
        for step in np.linspace(0, reach, int(detail.integers(8, 20))):
            pen.line([(left + step, top), (left + step - 0.3 * reach, top + reach)], ink, 0.003)
    return pen.finish(work, 0.05)


class View(NamedTuple):
    """How a work in the round is photographed."""

    turn: float  # about the vertical axis, in radians
    lamp: float  # where the light comes from: -1 is left, 1 is right
    wall: Colour
    table: Colour


def draw_vessel(size: Size, work: Random, detail: Random, view: View) -> Image.Image:
    """Draw a turned and painted pot: ``work`` throws it, the detail paints one of its bands."""
    ys, xs = np.mgrid[0.5 : size[1], 0.5 : size[0]] / size[1]
    xs -= size[0] / size[1] / 2  # both in heights of the image
    top, foot, handles = work.uniform(0.1, 0.2), work.uniform(0.82, 0.9), int(work.integers(3))
    along = (ys - top) / (foot - top)  # 0 at the mouth, 1 at the foot
    widest = (0.3 if handles else 0.4) * min(1, size[0] / size[1])
    knots = np.repeat([*work.uniform(0.3, 1, 3), 1, *work.uniform(0.3, 1, 2)], 20)[None]
    profile = cv2.GaussianBlur(knots, (0, 0), 10, borderType=cv2.BORDER_REPLICATE)[0]
    across = np.clip(xs / (widest * np.interp(along, np.linspace(0, 1, profile.size), profile)), -1, 1)
    light, dark = ((0.65, 0.95), (0.1, 0.4))[:: work.choice([1, -1])]
    hue = work.choice([0.03, 0.05, 0.1, 0.38, 0.57])  # terracotta above all, cream, celadon, cobalt
    clay = pick_colour(work, (hue, hue + 0.05), (0.1, 0.75), light)
    paints = [pick_colour(work, (-0.05, 0.65), (0.1, 0.7), dark) for _ in range(3)]

    surface = np.broadcast_to(np.array(clay), (*xs.shape, 3))
    edges = np.sort(work.uniform(0.05, 0.95, 2 * int(work.integers(1, 4)))).reshape(-1, 2)
    own = work.integers(len(edges))
    for band, (low, high) in enumerate(edges):
        chance = detail if band == own else work
        height, style, thick = (along - low) / max(0.03, high - low), chance.integers(5), chance.uniform(0.6, 1.2)
        phase = (np.arcsin(across) + view.turn) / (2 * math.pi) * int(chance.integers(6, 22)) % 1
        painted = (
            np.abs(height - 0.2 - 1.2 * np.abs(phase - 0.5)) < 0.15 * thick,  # a zigzag
            (phase - 0.5) ** 2 + (height - 0.5) ** 2 < 0.1 * thick,  # dots
            height > 0.5 + 0.3 * thick * np.sin(2 * math.pi * phase),  # waves
            (phase > 0.5) ^ (height * 3 % 1 > 0.5),  # checks
            np.abs(phase - 0.5) < 0.4 * thick * np.sin(math.pi * np.clip(height, 0, 1)),  # leaves
        )[style] & (np.abs(height - 0.5) < 0.5)
        rims = np.abs(np.abs(height - 0.5) - 0.5) < 0.04
        surface = np.where((painted | rims)[..., None], paints[chance.integers(3)], surface)
    lit = 0.35 + 0.7 * np.clip(0.8 * np.sqrt(1 - across**2) + 0.5 * view.lamp * across, 0, 1)
    gloss = 90 * work.uniform() * np.exp(-(((across - 0.5 * view.lamp) / 0.12) ** 2))

    shadow = 1 - 0.6 * np.exp(-(((xs + 0.12 * view.lamp) / 0.2) ** 2) - ((ys - foot) / 0.025) ** 2)
    lamp = 1.08 - 0.5 * ((xs - 0.3 * view.lamp) ** 2 + (ys - 0.4) ** 2)
    array = _mix(view.wall, view.table, (ys - foot + 0.12) * 6) * (lamp * shadow)[..., None]
    for side in (-1, 1)[:handles]:  # a turned pot shows its handles nearer to the middle
        ring = np.hypot((xs / widest - 0.75 * side * math.cos(view.turn)) / 0.6, (along - 0.35) / 0.16)
        array = np.where((np.abs(ring - 0.89) < 0.11)[..., None], _shade(clay, 0.7), array)
    inside = (np.abs(across) < 1) & (np.abs(along - 0.5) < 0.5)
    array = np.where(inside[..., None], surface * lit[..., None] + gloss[..., None], array)
    mouth = (xs / (widest * profile[0])) ** 2 + ((ys - top) / 0.02) ** 2 < 1
    return _image(np.where(mouth[..., None], _shade(clay, 0.3), array))


def draw_sign(size: Size, rng: Random) -> Image.Image:
    """Draw a page or wall panel, with bars in place of words."""
    pen = _Pen(size, pick_colour(rng, saturation=(0.0, 0.3), value=(0.7, 1.0)))
    ink, step = pick_colour(rng, saturation=(0.0, 0.5), value=(0.05, 0.4)), rng.uniform(0.03, 0.06)
    pen.box(0.08, 0.06 * pen.tall, rng.uniform(0.3, 0.8), 0.12 * pen.tall, ink)
    for top in np.arange(0.2 * pen.tall, 0.92 * pen.tall, step):
        for left, right in itertools.pairwise(np.arange(0.08, 0.92, 0.05) + rng.uniform(0, 0.04, 17)):
            pen.box(left, top, right - 0.015, top + 0.4 * step, ink)
    return pen.finish(rng, 0.03)


def draw_food(size: Size, rng: Random) -> Image.Image:
    """Draw a plate with something on it."""
    pen, hue = _Pen(size, pick_colour(rng, (0.02, 0.15), (0.1, 0.6), (0.3, 0.9))), rng.uniform(-0.05, 0.35)
    x, y, radius = rng.uniform(0.4, 0.6), pen.tall * rng.uniform(0.4, 0.6), min(1, pen.tall) * rng.uniform(0.35, 0.46)
    for ring, grey in ((1, 200), (0.97, 245), (0.7, 225)):
        pen.disc(x, y, radius * ring, (grey, grey, grey - 6))
    for across, down, berry in rng.normal((0, 0, 0.16), (0.25, 0.25, 0.03), (rng.integers(5, 40), 3)) * radius:
        fill, left, top = pick_colour(rng, (hue, hue + 0.1), (0.4, 0.9)), x + across, y + down
        for step in np.linspace(0, 0.3, 8):  # lit from the upper left
            pen.disc(left - step * berry, top - step * berry, (1 - 3 * step) * berry, _shade(fill, 0.6 + 2 * step))
    return pen.finish(rng, 0.06)
