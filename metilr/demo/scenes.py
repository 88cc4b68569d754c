"""What visitors photograph besides art: rooms, food, plants, signs, facades and the sky."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

from metilr.demo.brush import (
    clouds,
    draw_ball,
    finish_canvas,
    grid,
    mix,
    paint_over,
    pick_colour,
    ridge,
    shade,
    start_canvas,
    to_image,
)


def draw_room(size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """Draw a room: wall, floor, a window or door, furniture, sometimes empty frames."""
    wall = pick_colour(rng, saturation=(0.02, 0.3), value=(0.5, 0.95))
    canvas, pen = start_canvas(size, wall)
    width, height = canvas.size
    floor = height * rng.uniform(0.6, 0.8)
    pen.rectangle((0, floor, width, height), fill=pick_colour(rng, (0.03, 0.12), (0.2, 0.6), (0.2, 0.7)))
    for board in range(12):
        pen.line((width * board / 11, floor, width * (2.4 * board / 11 - 0.7), height), fill=(70, 55, 45), width=2)
    for _ in range(int(rng.integers(1, 4))):
        left, top = width * rng.uniform(0, 0.75), height * rng.uniform(0.08, 0.3)
        right, bottom = left + width * rng.uniform(0.1, 0.3), top + height * rng.uniform(0.15, 0.35)
        pane = pick_colour(rng, (0.5, 0.65), (0.05, 0.4), (0.5, 1.0))
        pen.rectangle((left, top, right, bottom), fill=pane, outline=shade(wall, 0.5), width=6)
        pen.line(((left + right) / 2, top, (left + right) / 2, bottom), fill=shade(wall, 0.5), width=4)
    for _ in range(int(rng.integers(1, 4))):
        left, seat = width * rng.uniform(0, 0.7), floor + height * rng.uniform(-0.12, 0.05)
        right, wood = left + width * rng.uniform(0.15, 0.4), pick_colour(rng, value=(0.15, 0.7))
        pen.rectangle((left, seat, right, seat + height * 0.08), fill=wood)
        for leg in (left, right - 8):
            pen.rectangle((leg, seat, leg + 8, seat + height * 0.2), fill=shade(wood, 0.7))
    return paint_over(finish_canvas(canvas), rng, 0.04)


def draw_food(size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """Draw a plate with something on it."""
    canvas, pen = start_canvas(size, pick_colour(rng, (0.02, 0.15), (0.1, 0.6), (0.3, 0.9)))
    width, height = canvas.size
    radius = min(width, height) * rng.uniform(0.35, 0.46)
    x, y = width * rng.uniform(0.4, 0.6), height * rng.uniform(0.4, 0.6)
    for ring, tone in ((1.0, 200), (0.97, 245), (0.7, 225)):
        reach = radius * ring
        pen.ellipse((x - reach, y - reach, x + reach, y + reach), fill=(tone, tone, tone - 6))
    hue = rng.uniform(-0.05, 0.35)
    for _ in range(int(rng.integers(5, 40))):
        angle, reach = rng.uniform(0, 6.3), radius * 0.6 * rng.uniform() ** 0.5
        place = (x + reach * np.cos(angle), y + reach * np.sin(angle))
        colour = pick_colour(rng, (hue - 0.06, hue + 0.06), (0.4, 0.9), (0.4, 0.95))
        draw_ball(pen, place, radius * rng.uniform(0.08, 0.25), colour)
    return paint_over(finish_canvas(canvas).filter(ImageFilter.GaussianBlur(1)), rng, 0.06)


def draw_plants(size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """Draw leaves and flowers close up."""
    canvas, pen = start_canvas(size, pick_colour(rng, (0.2, 0.42), (0.3, 0.7), (0.1, 0.35)))
    width, height = canvas.size
    green = rng.uniform(0.2, 0.4)
    for _ in range(int(rng.integers(60, 160))):
        start = rng.uniform(0, 1, 2) * canvas.size
        ahead = rng.normal(0, 0.12 * min(width, height), 2)
        aside = np.array([-ahead[1], ahead[0]]) * rng.uniform(0.15, 0.4)
        leaf = [
            tuple(start),
            tuple(start + ahead / 2 + aside),
            tuple(start + ahead),
            tuple(start + ahead / 2 - aside),
        ]
        pen.polygon(leaf, fill=pick_colour(rng, (green - 0.05, green + 0.05), (0.3, 0.8), (0.2, 0.85)))
    petals = pick_colour(rng, (0.7, 1.2), (0.3, 0.9), (0.6, 1.0))
    for _ in range(int(rng.integers(0, 15))):
        centre, radius = rng.uniform(0, 1, 2) * canvas.size, 0.04 * min(width, height) * rng.uniform(0.5, 1.5)
        for angle in np.linspace(0, 6.28, 6)[:-1]:
            x, y = centre + 1.2 * radius * np.array([np.cos(angle), np.sin(angle)])
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=petals)
    return paint_over(finish_canvas(canvas).filter(ImageFilter.GaussianBlur(0.8)), rng, 0.1)


def draw_sign(size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """Draw a page or wall panel of text, as bars in place of words."""
    paper = pick_colour(rng, saturation=(0.0, 0.3), value=(0.7, 1.0))
    canvas, pen = start_canvas(size, paper)
    width, height = canvas.size
    ink = pick_colour(rng, saturation=(0.0, 0.5), value=(0.05, 0.4))
    pen.rectangle((0.08 * width, 0.06 * height, width * rng.uniform(0.3, 0.8), 0.13 * height), fill=ink)
    step = height * rng.uniform(0.025, 0.06)
    for top in np.arange(0.2 * height, 0.92 * height, step):
        left, end = 0.08 * width, width * (0.92 if rng.uniform() < 0.8 else rng.uniform(0.2, 0.8))
        while left < end:
            word = width * rng.uniform(0.02, 0.12)
            pen.rectangle((left, top, min(left + word, end), top + 0.4 * step), fill=ink)
            left += word + 0.015 * width
    return paint_over(finish_canvas(canvas), rng, 0.03)


def draw_facade(size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """Draw houses along a street."""
    canvas, pen = start_canvas(size, pick_colour(rng, (0.5, 0.65), (0.1, 0.5), (0.6, 1.0)))
    width, height = canvas.size
    left = 0.0
    while left < width:
        right, top = left + width * rng.uniform(0.2, 0.5), height * rng.uniform(0.05, 0.4)
        wall = pick_colour(rng, (0.0, 0.15), (0.05, 0.5), (0.4, 0.9))
        pen.rectangle((left, top, right, height), fill=wall)
        columns, rows = int(rng.integers(2, 6)), int(rng.integers(3, 8))
        glass = pick_colour(rng, saturation=(0.05, 0.4), value=(0.15, 0.7))
        across, down = (right - left) / columns, (height - top) / rows
        for row in range(rows):
            for column in range(columns):
                x, y = left + (column + 0.25) * across, top + (row + 0.2) * down
                pen.rectangle((x, y, x + 0.5 * across, y + 0.55 * down), fill=glass, outline=shade(wall, 1.2), width=3)
        left = right
    pen.rectangle((0, 0.93 * height, width, height), fill=(90, 88, 86))
    return paint_over(finish_canvas(canvas), rng, 0.06)


def draw_sky(size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """Draw clouds above a dark skyline."""
    ys, _ = grid(size)
    high = pick_colour(rng, (0.52, 0.75), (0.2, 0.8), (0.3, 0.9))
    low = pick_colour(rng, (-0.1, 0.15), (0.1, 0.7), (0.6, 1.0))
    array = mix(high, low, ys + rng.uniform(0.1, 0.5) * clouds(rng, size, int(rng.integers(2, 5)), 5))
    line = rng.uniform(0.7, 0.95) + 0.06 * ridge(rng, size[0])
    array = np.where((ys > line[None, :])[:, :, None], np.array(shade(high, 0.25)) / 255, array)
    return paint_over(to_image(array), rng, 0.03)


SCENES: dict[str, Callable[[tuple[int, int], np.random.Generator], Image.Image]] = {
    "Rooms": draw_room,
    "Food": draw_food,
    "Plants": draw_plants,
    "Signs": draw_sign,
    "Streets": draw_facade,
    "Skies": draw_sky,
}
"""Category of a non-art query and what draws it."""
