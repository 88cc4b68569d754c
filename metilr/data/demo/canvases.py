"""Flat works of the drawn museum: landscapes, portraits, abstracts, still lifes, prints and textiles.

Every function takes two sources of chance: ``work`` settles the composition, ``detail`` its ornament, small
figures and their colours. Near-twins share the first and differ in the second.
"""

import itertools
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from metilr.data.demo.brush import (
    OVERSAMPLING,
    Colour,
    clouds,
    finish_canvas,
    grid,
    mix,
    paint_over,
    pick_colour,
    pick_palette,
    ridge,
    shade,
    start_canvas,
    to_array,
    to_image,
)


def draw_landscape(size: tuple[int, int], work: np.random.Generator, detail: np.random.Generator) -> Image.Image:
    """Draw sky, mountains, a plain or water, trees and perhaps houses, in oil."""
    ys, _ = grid(size)
    horizon = work.uniform(0.4, 0.7)
    sky_top = pick_colour(work, (0.5, 0.68), (0.1, 0.6), (0.4, 0.95))
    sky_low = pick_colour(work, (0.0, 0.17), (0.1, 0.5), (0.7, 0.98))
    sky = mix(sky_top, sky_low, ys / horizon + 0.25 * clouds(work, size, 2))
    land = pick_colour(work, (0.08, 0.4), (0.2, 0.6), (0.3, 0.75))
    array = np.where((ys > horizon)[:, :, None], mix(land, shade(land, 0.5), 2 * ys - 1), sky)

    for layer in range(int(work.integers(1, 4))):
        top = horizon - (0.22 - 0.07 * layer) + 0.12 * ridge(work, size[0])
        colour = mix(sky_low, shade(land, 0.6), np.full((1, 1), 0.35 + 0.2 * layer))
        mask = (ys > top[None, :]) & (ys < horizon + 0.02)
        array = np.where(mask[:, :, None], colour, array)
    if work.uniform() < 0.4:  # water mirrors the sky
        depth = np.clip((ys - horizon) / (1 - horizon), 0, 1)
        water = mix(sky_low, shade(sky_top, 0.7), depth + 0.15 * clouds(work, size, 3))
        array = np.where((ys > horizon + 0.03)[:, :, None], water, array)

    canvas = to_image(array).resize((size[0] * OVERSAMPLING, size[1] * OVERSAMPLING))
    pen = ImageDraw.Draw(canvas)
    _draw_sun(pen, canvas.size, horizon, detail)
    for _ in range(int(work.integers(0, 4))):
        _draw_house(pen, canvas.size, horizon, work)
    for _ in range(int(work.integers(2, 12))):
        _draw_tree(pen, canvas.size, horizon, work, land)
    for _ in range(int(detail.integers(0, 4))):
        _draw_tree(pen, canvas.size, horizon, detail, land)
    painted = finish_canvas(canvas).filter(ImageFilter.MedianFilter(5))
    return paint_over(painted, work, 0.1)


def draw_portrait(size: tuple[int, int], work: np.random.Generator, detail: np.random.Generator) -> Image.Image:
    """Draw a sitter before a dark ground: shoulders, head, hair, face, perhaps a hat and a ruff."""
    ground = pick_colour(work, saturation=(0.1, 0.6), value=(0.12, 0.6))
    canvas, pen = start_canvas(size, ground)
    width, height = canvas.size
    unit = min(width, height * 0.8)
    middle, eyes = width * work.uniform(0.4, 0.6), height * work.uniform(0.34, 0.46)
    head = unit * work.uniform(0.13, 0.19)
    skin = pick_colour(work, (0.03, 0.09), (0.25, 0.6), (0.45, 0.95))
    dress = pick_colour(work, saturation=(0.2, 0.8), value=(0.12, 0.7))
    hair = pick_colour(work, (0.02, 0.14), (0.2, 0.7), (0.08, 0.75))

    spread = unit * work.uniform(0.3, 0.46)
    shoulders = eyes + 2 * head
    pen.ellipse((middle - spread, shoulders, middle + spread, height * 1.8), fill=dress)
    if work.uniform() < 0.7:  # hair falls behind the neck
        fall = head * work.uniform(1.0, 2.2)
        pen.ellipse((middle - 1.25 * head, eyes - 1.5 * head, middle + 1.25 * head, eyes + fall), fill=hair)
    pen.polygon(
        [
            (middle - 0.45 * head, eyes),
            (middle + 0.45 * head, eyes),
            (middle + 0.6 * head, shoulders + 0.5 * head),
            (middle - 0.6 * head, shoulders + 0.5 * head),
        ],
        fill=shade(skin, 0.8),
    )
    _draw_collar(pen, middle, shoulders, head, detail)
    brooch = (middle + head * detail.uniform(-0.7, 0.7), shoulders + head * detail.uniform(0.6, 1.6))
    draw_ball(pen, brooch, head * detail.uniform(0.12, 0.25), pick_colour(detail, saturation=(0.3, 0.9)))
    pen.ellipse((middle - head, eyes - 1.25 * head, middle + head, eyes + 1.4 * head), fill=skin)
    pen.chord((middle - 1.05 * head, eyes - 1.35 * head, middle + 1.05 * head, eyes + head), 190, 350, fill=hair)
    _draw_face(pen, middle, eyes, head, skin, work)
    if work.uniform() < 0.4:
        _draw_hat(pen, middle, eyes, head, work, detail)
    lit = to_array(finish_canvas(canvas).filter(ImageFilter.GaussianBlur(0.8)))
    ys, xs = grid(size)
    lamp = 1.2 - 0.9 * np.hypot(xs - work.uniform(0.2, 0.5), ys - work.uniform(0.1, 0.4))
    return paint_over(to_image(lit * lamp[:, :, None]), work, 0.1)


def draw_abstract(size: tuple[int, int], work: np.random.Generator, detail: np.random.Generator) -> Image.Image:
    """Draw one of four modern schools: grids, colour fields, circles and lines, splinters."""
    palette = pick_palette(work, 6)
    school = (_draw_bars, _draw_fields, _draw_circles, _draw_splinters)[int(work.integers(4))]
    return paint_over(school(size, palette, work, detail), work, 0.05)


def draw_still_life(size: tuple[int, int], work: np.random.Generator, detail: np.random.Generator) -> Image.Image:
    """Draw fruit and a bottle on a table."""
    wall = pick_colour(work, saturation=(0.1, 0.5), value=(0.2, 0.7))
    canvas, pen = start_canvas(size, wall)
    width, height = canvas.size
    edge = height * work.uniform(0.5, 0.65)
    pen.rectangle((0, edge, width, height), fill=pick_colour(work, (0.02, 0.12), (0.2, 0.6), (0.3, 0.85)))
    for _ in range(int(work.integers(1, 4))):
        _draw_bottle(pen, width * work.uniform(0.1, 0.8), edge + height * 0.1, height * 0.5, work)
    fruits = [work] * int(work.integers(4, 9)) + [detail] * int(detail.integers(1, 4))
    for chance in fruits:
        radius = 0.09 * min(width, height) * chance.uniform(0.6, 1.3)
        draw_ball(
            pen,
            (width * chance.uniform(0.15, 0.85), edge + height * chance.uniform(0.02, 0.25)),
            radius,
            pick_colour(chance, (-0.03, 0.33), (0.5, 0.9), (0.4, 0.95)),
        )
    painted = finish_canvas(canvas).filter(ImageFilter.GaussianBlur(0.7))
    return paint_over(painted, work, 0.14)


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


def draw_ball(pen: ImageDraw.ImageDraw, centre: tuple[float, float], radius: float, colour: Colour) -> None:
    """Draw a ball lit from the upper left."""
    x, y = centre
    pen.ellipse((x - radius, y + 0.6 * radius, x + 1.5 * radius, y + 1.2 * radius), fill=(50, 40, 35))
    for step in range(8):
        share = step / 8
        size = radius * (1 - share)
        left, top = x - 0.35 * radius * share, y - 0.35 * radius * share
        pen.ellipse((left - size, top - size, left + size, top + size), fill=shade(colour, 0.55 + 0.65 * share))


def _draw_sun(pen: ImageDraw.ImageDraw, size: tuple[int, int], horizon: float, detail: np.random.Generator) -> None:
    if detail.uniform() < 0.6:
        x, y = size[0] * detail.uniform(0.1, 0.9), size[1] * horizon * detail.uniform(0.15, 0.8)
        radius = min(size) * detail.uniform(0.02, 0.06)
        colour = pick_colour(detail, (0.04, 0.16), (0.05, 0.6), (0.9, 1.0))
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def _draw_tree(
    pen: ImageDraw.ImageDraw, size: tuple[int, int], horizon: float, chance: np.random.Generator, land: Colour
) -> None:
    nearness = chance.uniform(0.2, 1.0) ** 2
    x, foot = size[0] * chance.uniform(), size[1] * (horizon + (0.95 - horizon) * nearness)
    height = size[1] * (0.06 + 0.3 * nearness) * chance.uniform(0.7, 1.2)
    trunk = max(2, round(0.06 * height))
    pen.line((x, foot, x, foot - 0.5 * height), fill=(60, 42, 30), width=trunk)
    leaves = shade(land, chance.uniform(0.35, 0.9))
    if chance.uniform() < 0.4:  # a cypress or fir
        pen.polygon(
            [
                (x - 0.16 * height, foot - 0.15 * height),
                (x + 0.16 * height, foot - 0.15 * height),
                (x, foot - height),
            ],
            fill=leaves,
        )
        return
    for _ in range(9):
        left, top = x + height * chance.normal(0, 0.14), foot - height * chance.uniform(0.45, 0.95)
        radius = height * chance.uniform(0.08, 0.18)
        box = (left - radius, top - radius, left + radius, top + radius)
        pen.ellipse(box, fill=shade(leaves, chance.uniform(0.7, 1.3)))


def _draw_house(pen: ImageDraw.ImageDraw, size: tuple[int, int], horizon: float, chance: np.random.Generator) -> None:
    side = size[1] * chance.uniform(0.04, 0.11)
    x, y = size[0] * chance.uniform(0.05, 0.85), size[1] * horizon + side * chance.uniform(0, 0.8)
    wall = pick_colour(chance, (0.03, 0.14), (0.05, 0.4), (0.6, 0.95))
    roof = pick_colour(chance, (-0.03, 0.08), (0.3, 0.7), (0.3, 0.7))
    pen.rectangle((x, y - side, x + 1.4 * side, y), fill=wall)
    pen.polygon([(x - 0.1 * side, y - side), (x + 1.5 * side, y - side), (x + 0.7 * side, y - 1.7 * side)], fill=roof)
    for window in range(2):
        left = x + side * (0.2 + 0.65 * window)
        pen.rectangle((left, y - 0.7 * side, left + 0.3 * side, y - 0.35 * side), fill=shade(wall, 0.35))


def _draw_face(
    pen: ImageDraw.ImageDraw,
    middle: float,
    eyes: float,
    head: float,
    skin: Colour,
    work: np.random.Generator,
) -> None:
    apart, glance = head * work.uniform(0.34, 0.46), head * work.uniform(-0.08, 0.08)
    iris = pick_colour(work, (0.05, 0.6), (0.2, 0.6), (0.1, 0.45))
    for side in (-apart, apart):
        x = middle + side
        pen.ellipse((x - 0.2 * head, eyes - 0.1 * head, x + 0.2 * head, eyes + 0.1 * head), fill=(225, 220, 210))
        x += glance
        pen.ellipse((x - 0.1 * head, eyes - 0.1 * head, x + 0.1 * head, eyes + 0.1 * head), fill=iris)
        brow = eyes - head * 0.28
        box = (
            middle + side - 0.25 * head,
            brow - 0.08 * head,
            middle + side + 0.25 * head,
            brow + 0.2 * head,
        )
        pen.arc(box, 200, 340, fill=shade(skin, 0.4), width=max(2, round(0.05 * head)))
    nose = eyes + head * work.uniform(0.4, 0.6)
    pen.line([(middle, eyes), (middle + 0.14 * head, nose), (middle - 0.05 * head, nose)],
             fill=shade(skin, 0.7), width=max(2, round(0.06 * head)))  # fmt: skip
    mouth, smile = eyes + head * 0.85, work.uniform(0.25, 0.45) * head
    lips = pick_colour(work, (-0.03, 0.03), (0.4, 0.7), (0.4, 0.8))
    pen.ellipse((middle - smile, mouth - 0.07 * head, middle + smile, mouth + 0.1 * head), fill=lips)
    if work.uniform() < 0.25:
        beard = pick_colour(work, (0.02, 0.12), (0.1, 0.5), (0.1, 0.6))
        pen.chord(
            (middle - 0.9 * head, eyes - 0.2 * head, middle + 0.9 * head, eyes + 1.7 * head),
            30,
            150,
            fill=beard,
        )


def _draw_collar(pen: ImageDraw.ImageDraw, middle: float, top: float, head: float, detail: np.random.Generator) -> None:
    style = int(detail.integers(3))
    colour = pick_colour(detail, saturation=(0.0, 0.5), value=(0.6, 1.0))
    if style == 0:  # a ruff
        for fold in np.linspace(-1.3, 1.3, 11):
            x, y = middle + fold * head, top + 0.25 * head * (1 - fold**2 / 2)
            pen.ellipse((x - 0.2 * head, y - 0.3 * head, x + 0.2 * head, y + 0.3 * head), fill=colour,
                        outline=shade(colour, 0.6))  # fmt: skip
    elif style == 1:  # a string of beads
        for angle in np.linspace(0.1, math.pi - 0.1, 15):
            x, y = middle + head * math.cos(angle), top + 0.2 * head + 0.9 * head * math.sin(angle)
            pen.ellipse((x - 0.09 * head, y - 0.09 * head, x + 0.09 * head, y + 0.09 * head), fill=colour)
    else:  # lapels
        for side in (-1, 1):
            pen.polygon([(middle, top + 1.6 * head), (middle + side * 0.5 * head, top),
                         (middle + side * 1.2 * head, top + 0.5 * head)], fill=colour)  # fmt: skip


def _draw_hat(
    pen: ImageDraw.ImageDraw,
    middle: float,
    eyes: float,
    head: float,
    work: np.random.Generator,
    detail: np.random.Generator,
) -> None:
    brim, crown = work.uniform(1.2, 2.1) * head, work.uniform(0.6, 1.4) * head
    felt = pick_colour(work, value=(0.1, 0.6))
    base = eyes - 0.75 * head
    pen.rounded_rectangle((middle - 0.9 * head, base - crown, middle + 0.9 * head, base), 0.3 * head, fill=felt)
    band = pick_colour(detail, saturation=(0.4, 0.9))
    pen.rectangle((middle - 0.9 * head, base - 0.3 * head, middle + 0.9 * head, base), fill=band)
    pen.ellipse((middle - brim, base - 0.18 * head, middle + brim, base + 0.18 * head), fill=shade(felt, 0.8))


def _draw_bars(
    size: tuple[int, int], palette: list[Colour], work: np.random.Generator, detail: np.random.Generator
) -> Image.Image:
    canvas, pen = start_canvas(size, (235, 230, 215))
    width, height = canvas.size
    xs = [0.0, *sorted(work.uniform(0, width, int(work.integers(2, 6)))), width]
    ys = [0.0, *sorted(work.uniform(0, height, int(work.integers(2, 6)))), height]
    thick = int(work.integers(3, 14))
    for left, right in itertools.pairwise(xs):
        for top, bottom in itertools.pairwise(ys):
            chance = detail if work.uniform() < 0.15 else work
            if chance.uniform() < 0.5:
                pen.rectangle((left, top, right, bottom), fill=palette[int(chance.integers(6))])
            pen.rectangle((left, top, right, bottom), outline=(25, 25, 28), width=thick)
    accent, side = detail.uniform(0, 0.85, 2) * canvas.size, 0.12 * min(width, height)
    pen.rectangle((*accent, *(accent + side)), fill=pick_colour(detail), outline=(25, 25, 28), width=thick)
    return finish_canvas(canvas)


def _draw_fields(
    size: tuple[int, int], palette: list[Colour], work: np.random.Generator, detail: np.random.Generator
) -> Image.Image:
    canvas, pen = start_canvas(size, palette[0])
    width, height = canvas.size
    edges = np.linspace(0.05, 0.95, int(work.integers(3, 6))) + work.uniform(-0.06, 0.06)
    for number, (top, bottom) in enumerate(itertools.pairwise(edges)):
        colour = shade(palette[1 + number], detail.uniform(0.8, 1.2))
        pen.rectangle((0.08 * width, (top + 0.02) * height, 0.92 * width, (bottom - 0.02) * height), fill=colour)
    return finish_canvas(canvas).filter(ImageFilter.GaussianBlur(work.uniform(2, 7)))


def _draw_circles(
    size: tuple[int, int], palette: list[Colour], work: np.random.Generator, detail: np.random.Generator
) -> Image.Image:
    canvas, pen = start_canvas(size, shade(palette[0], 1.3))
    width, height = canvas.size
    for chance in [work] * int(work.integers(5, 16)) + [detail] * 2:
        x, y = width * chance.uniform(), height * chance.uniform()
        radius = min(width, height) * chance.uniform(0.02, 0.2)
        for ring in range(int(chance.integers(1, 4))):
            inner = radius * (1 - 0.3 * ring)
            pen.ellipse((x - inner, y - inner, x + inner, y + inner), fill=palette[int(chance.integers(6))])
    for chance in [work] * int(work.integers(3, 9)) + [detail]:
        ends = [(width * chance.uniform(), height * chance.uniform()) for _ in range(2)]
        pen.line(ends, fill=(30, 28, 30), width=int(chance.integers(2, 12)))
    return finish_canvas(canvas)


def _draw_splinters(
    size: tuple[int, int], palette: list[Colour], work: np.random.Generator, detail: np.random.Generator
) -> Image.Image:
    canvas, pen = start_canvas(size, palette[0])
    for chance in [work] * int(work.integers(12, 40)) + [detail] * 3:
        centre = chance.uniform(0, 1, 2) * canvas.size
        reach = min(canvas.size) * chance.uniform(0.08, 0.35)
        points = [tuple(centre + reach * chance.uniform(-1, 1, 2)) for _ in range(int(chance.integers(3, 5)))]
        pen.polygon(points, fill=shade(palette[int(chance.integers(6))], chance.uniform(0.6, 1.2)))
    return finish_canvas(canvas)


def _draw_bottle(pen: ImageDraw.ImageDraw, x: float, foot: float, height: float, chance: np.random.Generator) -> None:
    colour = pick_colour(chance, (0.08, 0.6), (0.2, 0.7), (0.15, 0.6))
    radius, height = height * chance.uniform(0.12, 0.22), height * chance.uniform(0.7, 1.1)
    pen.rounded_rectangle((x - radius, foot - 0.6 * height, x + radius, foot), 0.6 * radius, fill=colour)
    pen.rectangle((x - 0.35 * radius, foot - height, x + 0.35 * radius, foot - 0.5 * height), fill=colour)
    gleam = (x - 0.6 * radius, foot - 0.5 * height, x - 0.35 * radius, foot - 0.1 * height)
    pen.rectangle(gleam, fill=shade(colour, 1.8))


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
