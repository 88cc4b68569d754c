"""Plans the drawn museum: which exhibits it has, who photographs them, and what the annotations say."""

import dataclasses
import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from metilr.data.visits import PRESETS, derive_seed
from metilr.demo.exhibits import (
    Work,
    draw_catalogue_image,
    draw_scene_visit,
    draw_visit,
    invent_twin,
    invent_work,
)
from metilr.demo.scenes import SCENES

Row = dict[str, Any]
_Drawing = Callable[[], Image.Image]


@dataclasses.dataclass(frozen=True)
class MuseumSize:
    """How large the drawn museum is.

    Attributes:
        exhibits: Exhibits, each with one or two database images, rarely three.
        mini_exhibits: Those of the mini database, which holds all exhibits of val and test.
        val: Met, other-artwork and non-art queries of the validation split.
        test: The same of the test split.
        longest_side: Longest side of the images, in pixels.
    """

    exhibits: int = 300
    mini_exhibits: int = 160
    val: tuple[int, int, int] = (50, 60, 40)
    test: tuple[int, int, int] = (120, 150, 100)
    longest_side: int = 320


@dataclasses.dataclass(frozen=True)
class _Photographer:
    """One visitor: how they photograph, and how much of a split is theirs."""

    name: str
    preset: str
    share: float


# As in the real data, few people took most photographs, and val and test share none of them.
_PHOTOGRAPHERS = {
    "val": (
        _Photographer("visitor 1", "mild", 0.55),
        _Photographer("visitor 2", "medium", 0.35),
        _Photographer("visitor 3", "severe", 0.1),
    ),
    "test": (
        _Photographer("visitor 4", "mild", 0.45),
        _Photographer("visitor 5", "medium", 0.3),
        _Photographer("visitor 6", "severe", 0.08),
        _Photographer("visitor 7", "mild", 0.1),
        _Photographer("visitor 8", "medium", 0.05),
        _Photographer("visitor 9", "severe", 0.02),
    ),
}


@dataclasses.dataclass
class Plan:
    """The museum before it is drawn: annotations by file name, and what draws each image."""

    ground_truth: dict[str, list[Row]] = dataclasses.field(default_factory=dict)
    drawings: dict[str, _Drawing] = dataclasses.field(default_factory=dict)


def plan_museum(seed: int, size: MuseumSize) -> Plan:
    """Plan annotations and drawings; the same seed and size give the same plan."""
    rng = np.random.default_rng(derive_seed(seed, "museum", 0))
    plan = Plan()
    works = _invent_collection(seed, size)
    ids = sorted(
        int(number) for number in rng.choice(np.arange(30, 2500 * size.exhibits), size.exhibits, replace=False)
    )
    order = rng.permutation(size.exhibits)

    database = []
    for exhibit_id, work in zip(ids, works, strict=True):
        for view in range(int(rng.choice([1, 2, 3], p=[0.78, 0.18, 0.04]))):
            path = f"MET/{exhibit_id}/{view}.jpg"
            database.append({"id": exhibit_id, "path": path})
            plan.drawings[path] = partial(draw_catalogue_image, work, view)
    mini_ids = {ids[number] for number in order[: size.mini_exhibits]}
    plan.ground_truth["MET_database"] = database
    plan.ground_truth["mini_MET_database"] = [row for row in database if row["id"] in mini_ids]

    # Some classes are photographed once, some twice.
    val_classes = max(1, size.val[0] * 3 // 4)
    test_classes = max(1, size.test[0] * 3 // 4)
    val = [(ids[number], works[number]) for number in order[:val_classes]]
    test = [(ids[number], works[number]) for number in order[val_classes : val_classes + test_classes]]
    plan.ground_truth["valset"] = _plan_queries(plan, "val", val, size.val, seed, size.longest_side)
    plan.ground_truth["testset"] = _plan_queries(plan, "test", test, size.test, seed, size.longest_side)
    return plan


def _invent_collection(seed: int, size: MuseumSize) -> list[Work]:
    """Invent the exhibits' works; one in seven is a near-twin of the work before it."""
    rng = np.random.default_rng(derive_seed(seed, "collection", 0))
    works: list[Work] = []
    while len(works) < size.exhibits:
        if works and rng.uniform() < 1 / 7:
            works.append(invent_twin(works[-1], seed))
        else:
            works.append(invent_work(derive_seed(seed, "exhibit", len(works)), size.longest_side))
    return works


def _plan_queries(
    plan: Plan,
    split: str,
    exhibits: list[tuple[int, Work]],
    counts: tuple[int, int, int],
    seed: int,
    longest_side: int,
) -> list[Row]:
    """Plan a split's photographs: of exhibits, of other museums' works, and of no art."""
    rng = np.random.default_rng(derive_seed(seed, split, 0))
    photographers = _PHOTOGRAPHERS[split]
    shares = [photographer.share for photographer in photographers]
    met, other, no_art = counts
    rows: list[Row] = []
    for number in range(met + other + no_art):
        photographer = photographers[int(rng.choice(len(photographers), p=shares))]
        strengths = PRESETS[photographer.preset]
        query_seed = derive_seed(seed, f"{split} query", number)
        name = hashlib.blake2b(f"{seed}/{split}/{number}".encode(), digest_size=6).hexdigest() + ".jpg"
        row: Row
        if number < met:
            exhibit_id, work = exhibits[number % len(exhibits)]
            row = {"MET_id": exhibit_id, "path": f"test_met/{name}", "photographer": photographer.name, "url": "None"}
            drawing = partial(draw_visit, work, strengths, query_seed)
        elif number < met + other:
            work = invent_work(derive_seed(query_seed, "other museum", 0), longest_side)
            row = {"path": f"test_other/{name}", "url": "None", "category": work.kind.capitalize()}
            drawing = partial(draw_visit, work, strengths, query_seed)
        else:
            category = list(SCENES)[int(rng.integers(len(SCENES)))]
            sides = (longest_side, longest_side * 3 // 4)
            scene_size = sides if rng.uniform() < 0.6 else sides[::-1]
            row = {"path": f"test_noart/{name}", "url": "None", "category": category}
            drawing = partial(draw_scene_visit, SCENES[category], scene_size, strengths, query_seed)
        rows.append(row)
        plan.drawings[row["path"]] = drawing
    # Not sorted by kind: nothing about a query can be told from its place.
    return [rows[place] for place in rng.permutation(len(rows))]
