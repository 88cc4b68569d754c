"""Paintings of the drawn museum, but for portraits: landscapes, abstracts and still lifes.

Every function takes two sources of chance: ``work`` settles the composition, ``detail`` its ornament, small
figures and their colours. Near-twins share the first and differ in the second.
"""

import itertools

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from metilr.demo.brush import (
    OVERSAMPLING,
    Colour,
    clouds,
    draw_ball,
    finish_canvas,
    grid,
    mix,
    paint_over,
    pick_colour,
    pick_palette,
    ridge,
    shade,
    start_canvas,
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
