"""Works on paper and cloth of the drawn museum.

Every function takes two sources of chance: ``work`` settles the composition, ``detail`` its ornament, small
figures and their colours. Near-twins share the first and differ in the second.
"""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from metilr.demo.brush import (
    Colour,
    clouds,
    finish_canvas,
    paint_over,
    pick_colour,
    pick_palette,
    ridge,
    shade,
    start_canvas,
    to_array,
    to_image,
)


def draw_print(size: tuple[int, int], work: np.random.Generator, detail: np.random.Generator) -> Image.Image:
    """Draw an etching of plants or of a coast on toned paper; the detail is the state of the plate."""
    paper = pick_colour(work, (0.08, 0.14), (0.05, 0.3), (0.75, 0.95))
    ink = pick_colour(work, (0.0, 0.12), (0.1, 0.6), (0.08, 0.3))
    canvas, pen = start_canvas(size, paper)
    width, height = canvas.size
    if work.uniform() < 0.6:
        for _ in range(int(work.integers(1, 4))):
            start = (width * work.uniform(0.3, 0.7), height * 0.93)
            _draw_branch(pen, start, -math.pi / 2 + work.uniform(-0.4, 0.4), height * 0.2, 6, ink, work)
    else:
        rows = int(work.integers(4, 10))
        for row in range(rows):
            line = height * (0.2 + 0.07 * row) + height * 0.06 * ridge(work, 60, 0.6)
            points = list(zip(np.linspace(0.06, 0.94, 60) * width, line.tolist(), strict=True))
            # Nearer ranges hide farther ones and are darker, as mist would have it.
            tone = shade(paper, 1.0 - 0.5 * row / rows * work.uniform(0.5, 1.0))
            pen.polygon([*points, (0.94 * width, 0.94 * height), (0.06 * width, 0.94 * height)], fill=tone)
            pen.line(points, fill=ink, width=int(work.integers(2, 7)))
    _hatch(pen, canvas.size, ink, detail)
    pen.rectangle((width * 0.05, height * 0.05, width * 0.95, height * 0.95), outline=ink, width=3)
    return paint_over(finish_canvas(canvas), work, 0.05)


def draw_textile(size: tuple[int, int], work: np.random.Generator, detail: np.random.Generator) -> Image.Image:
    """Draw a woven or printed cloth: a mirrored motif, repeated, within a border."""
    palette = pick_palette(work, 5)
    side = int(work.integers(24, 60))
    motif, pen = start_canvas((side, side), palette[0])
    for chance in [work] * int(work.integers(3, 7)) + [detail] * 2:
        _draw_motif(pen, motif.width, palette[int(chance.integers(1, 5))], chance)
    half = finish_canvas(motif)
    tile = Image.new("RGB", (2 * side, 2 * side))
    tile.paste(half, (0, 0))
    tile.paste(ImageOps.mirror(half), (side, 0))
    tile.paste(ImageOps.flip(tile.crop((0, 0, 2 * side, side))), (0, side))
    cloth = Image.new("RGB", size)
    for row, top in enumerate(range(0, size[1], 2 * side)):
        shift = side if row % 2 and work.uniform() < 0.5 else 0
        for left in range(-shift, size[0], 2 * side):
            cloth.paste(tile, (left, top))
    border = ImageDraw.Draw(cloth)
    for stripe in range(int(work.integers(0, 5))):
        inset = 5 * stripe
        box = (inset, inset, size[0] - 1 - inset, size[1] - 1 - inset)
        border.rectangle(box, outline=palette[int(work.integers(5))], width=5)
    array = to_array(cloth)
    threads = 0.94 + 0.06 * np.sin(np.arange(size[0]) * 2.1)[None, :] * np.sin(np.arange(size[1]) * 2.1)[:, None]
    folds = 1 + 0.08 * clouds(work, size, 2, 2)
    return paint_over(to_image(array * (threads * folds)[:, :, None]), work, 0.05)


def _draw_branch(
    pen: ImageDraw.ImageDraw,
    start: tuple[float, float],
    angle: float,
    length: float,
    depth: int,
    ink: Colour,
    work: np.random.Generator,
) -> None:
    end = (start[0] + length * math.cos(angle), start[1] + length * math.sin(angle))
    pen.line([start, end], fill=ink, width=depth)
    if depth == 1:
        radius = length * 0.6
        pen.ellipse((end[0] - radius, end[1] - radius, end[0] + radius, end[1] + radius), outline=ink, width=2)
        return
    for turn in (-0.5, 0.5):
        _draw_branch(
            pen,
            end,
            angle + turn * work.uniform(0.2, 1.4),
            length * work.uniform(0.6, 0.9),
            depth - 1,
            ink,
            work,
        )


def _hatch(pen: ImageDraw.ImageDraw, size: tuple[int, int], ink: Colour, detail: np.random.Generator) -> None:
    for _ in range(int(detail.integers(1, 4))):
        left, top = size[0] * detail.uniform(0.1, 0.7), size[1] * detail.uniform(0.1, 0.7)
        reach = min(size) * detail.uniform(0.1, 0.25)
        for step in np.linspace(0, reach, int(detail.integers(8, 20))):
            pen.line((left + step, top, left + step - 0.3 * reach, top + reach), fill=ink, width=2)


def _draw_motif(pen: ImageDraw.ImageDraw, side: int, colour: Colour, chance: np.random.Generator) -> None:
    x, y = side * chance.uniform(), side * chance.uniform()
    radius = side * chance.uniform(0.1, 0.4)
    shape = int(chance.integers(4))
    if shape == 0:
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    elif shape == 1:
        pen.polygon([(x - radius, y), (x, y - radius), (x + radius, y), (x, y + radius)], fill=colour)
    elif shape == 2:
        pen.line((0, y, side, side - y), fill=colour, width=max(2, round(0.3 * radius)))
    else:
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), outline=colour, width=max(2, side // 12))
