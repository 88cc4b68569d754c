"""Portraits of the drawn museum.

Every function takes two sources of chance: ``work`` settles the composition, ``detail`` its ornament, small
figures and their colours. Near-twins share the first and differ in the second.
"""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from metilr.demo.brush import (
    Colour,
    draw_ball,
    finish_canvas,
    grid,
    paint_over,
    pick_colour,
    shade,
    start_canvas,
    to_array,
    to_image,
)


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
