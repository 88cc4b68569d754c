"""The works that the drawn museum shows: what each one is, and how it looks in the catalogue and to a visitor."""

import dataclasses
from collections.abc import Callable

import numpy as np
from PIL import Image
from torchvision.transforms.v2 import functional as F

from metilr.data.visits import VisitStrengths, derive_seed, simulate_visit
from metilr.demo.brush import Colour, pick_colour, shade
from metilr.demo.objects import View, draw_figurine, draw_vessel
from metilr.demo.paintings import draw_abstract, draw_landscape, draw_still_life
from metilr.demo.portraits import draw_portrait
from metilr.demo.prints_and_textiles import draw_print, draw_textile

_Size = tuple[int, int]
_FLAT: dict[str, Callable[[_Size, np.random.Generator, np.random.Generator], Image.Image]] = {
    "landscape": draw_landscape,
    "portrait": draw_portrait,
    "abstract": draw_abstract,
    "still life": draw_still_life,
    "print": draw_print,
    "textile": draw_textile,
}
_ROUND: dict[str, Callable[[_Size, np.random.Generator, np.random.Generator, View], Image.Image]] = {
    "vessel": draw_vessel,
    "figurine": draw_figurine,
}
# Shares of a collection: as many works in the round as in a real museum of art, vessels above all.
_KINDS = {
    "landscape": 0.16,
    "portrait": 0.16,
    "abstract": 0.12,
    "still life": 0.08,
    "print": 0.1,
    "textile": 0.1,
    "vessel": 0.2,
    "figurine": 0.08,
}


@dataclasses.dataclass(frozen=True)
class Work:
    """One work of art, which can be drawn again and again.

    Attributes:
        kind: What draws it, such as "vessel".
        size: Width and height of its catalogue image.
        work_seed: Settles its composition or shape; near-twins share it.
        detail_seed: Settles its details.
    """

    kind: str
    size: _Size
    work_seed: int
    detail_seed: int


def invent_work(seed: int, longest_side: int) -> Work:
    """Invent a work: its kind, its proportions and its seeds."""
    rng = np.random.default_rng(seed)
    kind = str(rng.choice(list(_KINDS), p=list(_KINDS.values())))
    tallest = {"landscape": 1.0, "abstract": 1.5, "still life": 1.1, "textile": 1.6}.get(kind, 1.8)
    widest = {"portrait": 0.9, "figurine": 0.9, "vessel": 1.2, "landscape": 1.9}.get(kind, 1.5)
    ratio = rng.uniform(1 / widest, tallest)  # height over width
    # Sides are multiples of 16 px, so that many images share a shape and go through a model together.
    width, height = (max(16, round(side * longest_side / max(1.0, ratio) / 16) * 16) for side in (1.0, ratio))
    return Work(kind, (width, height), int(rng.integers(2**62)), int(rng.integers(2**62)))


def invent_twin(work: Work, seed: int) -> Work:
    """Invent a near-twin: the same composition or shape, other details."""
    return dataclasses.replace(work, detail_seed=derive_seed(seed, "twin", work.detail_seed))


def draw_catalogue_image(work: Work, number: int) -> Image.Image:
    """Draw a work's catalogue image; with ``number`` above 0, another view of it.

    A work in the round turns, under another lamp and before another background. A flat one is shown in its frame.
    """
    rng = np.random.default_rng([work.detail_seed, number])
    if work.kind in _ROUND:
        return _draw(work, _studio_view(rng, number))
    image = _draw(work, View())
    return _visit(image, VisitStrengths(frame=0.6, light=0.2), int(rng.integers(2**62))) if number else image


def draw_visit(work: Work, strengths: VisitStrengths, seed: int) -> Image.Image:
    """Draw a visitor's photograph of a work.

    A work in the round stands in its gallery, turned, and has neither frame nor wall around the picture.
    """
    if work.kind not in _ROUND:
        return _visit(_draw(work, View()), strengths, seed)
    image = _draw(work, _gallery_view(np.random.default_rng(seed), strengths))
    # The camera stands free before it: nothing flat is seen from the side.
    tilt = 0.3 * strengths.perspective
    return _visit(image, dataclasses.replace(strengths, frame=0.0, wall=0.0, perspective=tilt), seed)


def draw_scene_visit(
    draw: Callable[[_Size, np.random.Generator], Image.Image],
    size: _Size,
    strengths: VisitStrengths,
    seed: int,
) -> Image.Image:
    """Draw a visitor's photograph of something that is no art."""
    image = draw(size, np.random.default_rng(seed))
    return _visit(image, dataclasses.replace(strengths, frame=0.0, wall=0.0, glare=0.0), seed)


def _draw(work: Work, view: View) -> Image.Image:
    composition, detail = np.random.default_rng(work.work_seed), np.random.default_rng(work.detail_seed)
    if work.kind in _ROUND:
        return _ROUND[work.kind](work.size, composition, detail, view)
    return _FLAT[work.kind](work.size, composition, detail)


def _studio_view(rng: np.random.Generator, number: int) -> View:
    grey = pick_colour(rng, saturation=(0.0, 0.06), value=(0.45, 0.95))
    turn = 0.0 if number == 0 else rng.uniform(0.5, 1.3) * (-1) ** number
    return View(turn, rng.uniform(-0.8, 0.8), (grey, shade(grey, 0.75)))


def _gallery_view(rng: np.random.Generator, strengths: VisitStrengths) -> View:
    wall: Colour = pick_colour(rng, saturation=(0.02, 0.25), value=(0.3, 0.9))
    plinth: Colour = pick_colour(rng, saturation=(0.0, 0.3), value=(0.2, 0.9))
    # From the front or, in a strong visit, up to 50 degrees to its side.
    return View(rng.uniform(-0.9, 0.9) * strengths.perspective, rng.uniform(-0.9, 0.9), (wall, plinth))


def _visit(image: Image.Image, strengths: VisitStrengths, seed: int) -> Image.Image:
    return F.to_pil_image(simulate_visit(F.pil_to_tensor(image), strengths, seed))
