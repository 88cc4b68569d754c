"""Plans the drawn museum, its visitors and its annotations, and writes it in the Met layout, whole or not at all."""

import dataclasses
import hashlib
import io
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from PIL import Image
from rich.progress import track
from torchvision.transforms.v2 import functional as F

from metilr.data.visits import PRESETS, VisitStrengths, derive_seed, refuse_bad_seed, simulate_visit
from metilr.demo import drawing
from metilr.errors import UserError
from metilr.files import named, read_json

VERSION = 3  # raise it with every change that changes a pixel or an annotation
_MARKER = "demo.json"
_KIND = "synthetic museum drawn by metilr"
_Row = dict[str, Any]
_Drawings = dict[str, Callable[[], Image.Image]]  # by the image's path below images/
_Plan = tuple[dict[str, list[_Row]], _Drawings]  # annotations by file name, and what draws the images

# What draws each kind of art, its share of a collection, and between what its height is of its width. There are as
# many works in the round as in a real museum of art.
_ART: dict[str, tuple[Callable[..., Image.Image], float, float, float]] = {
    "landscape": (drawing.draw_landscape, 0.18, 0.55, 1.0),
    "portrait": (drawing.draw_portrait, 0.16, 1.1, 1.8),
    "abstract": (drawing.draw_abstract, 0.14, 0.7, 1.5),
    "textile": (drawing.draw_textile, 0.12, 0.7, 1.6),
    "print": (drawing.draw_print, 0.12, 0.7, 1.8),
    "vessel": (drawing.draw_vessel, 0.28, 0.9, 1.8),
}
_SCENES = {"signs": drawing.draw_sign, "food": drawing.draw_food}
# How each visitor of a split photographs, and their share of it. As in the real data, few people took most photographs.
_VISITORS = {
    "val": [("mild", 0.55), ("medium", 0.35), ("severe", 0.1)],
    "test": [("mild", 0.45), ("medium", 0.3), ("severe", 0.08), ("mild", 0.1), ("medium", 0.05), ("severe", 0.02)],
}


@dataclasses.dataclass(frozen=True)
class MuseumSize:
    """How large the drawn museum is."""

    exhibits: int = 300  # each with one or two database images, rarely three
    mini_exhibits: int = 160  # all exhibits of val and test among them
    val: tuple[int, int, int] = (50, 60, 40)  # photographs of exhibits, of other art, and of no art
    test: tuple[int, int, int] = (120, 150, 100)
    longest_side: int = 320  # px


@dataclasses.dataclass(frozen=True)
class Work:
    """A work of art, or something else to photograph, which can be drawn again and again."""

    kind: str
    size: drawing.Size
    work_seed: int  # settles its composition or shape; near-twins share it
    detail_seed: int

    def draw(self, *view: drawing.View) -> Image.Image:
        """Draw it; a vessel as it is seen in that view."""
        work, detail = np.random.default_rng(self.work_seed), np.random.default_rng(self.detail_seed)
        if self.kind in _SCENES:
            return _SCENES[self.kind](self.size, work)
        return _ART[self.kind][0](self.size, work, detail, *view)

    def draw_for_catalogue(self, number: int) -> Image.Image:
        """Draw its catalogue image; ``number`` above 0: a vessel turned, a picture in its frame."""
        if self.kind == "vessel":
            rng = np.random.default_rng([self.detail_seed, number])
            turn = rng.uniform(0.5, 1.3) * (-1) ** number if number else 0.0
            return self.draw(_pick_view(rng, turn, saturation=(0, 0.06), value=(0.45, 0.95)))
        framed = VisitStrengths(frame=0.6, light=0.2)
        return _visit(self.draw(), framed, self.detail_seed + number) if number else self.draw()

    def draw_photograph(self, strengths: VisitStrengths, seed: int) -> Image.Image:
        """Draw a visitor's photograph of it."""
        if self.kind != "vessel" and self.kind not in _SCENES:
            return _visit(self.draw(), strengths, seed)
        rng = np.random.default_rng(seed)
        view = _pick_view(rng, rng.uniform(-0.9, 0.9) * strengths.perspective, saturation=(0, 0.3), value=(0.2, 0.9))
        # What stands free has neither frame nor wall around it, and nothing flat is seen from the side.
        strengths = dataclasses.replace(strengths, frame=0, wall=0, perspective=0.3 * strengths.perspective)
        return _visit(self.draw(view), strengths, seed)


def _pick_view(rng: np.random.Generator, turn: float, **colours: tuple[float, float]) -> drawing.View:
    wall, table = (drawing.pick_colour(rng, **colours) for _ in range(2))
    return drawing.View(turn, rng.uniform(-0.9, 0.9), wall, table)


def _visit(image: Image.Image, strengths: VisitStrengths, seed: int) -> Image.Image:
    return F.to_pil_image(simulate_visit(F.pil_to_tensor(image), strengths, seed))


def invent_work(seed: int, longest_side: int) -> Work:
    """Invent a work of art: its kind, its proportions and its seeds."""
    rng = np.random.default_rng(seed)
    kind = str(rng.choice(list(_ART), p=[share for _, share, *_ in _ART.values()]))
    ratio = rng.uniform(*_ART[kind][2:])
    # Sides are multiples of 16 px, so that many images share a shape and go through a model together.
    width, height = (max(16, round(side * longest_side / max(1.0, ratio) / 16) * 16) for side in (1.0, ratio))
    return Work(kind, (width, height), int(rng.integers(2**62)), int(rng.integers(2**62)))


def plan_museum(seed: int, size: MuseumSize) -> _Plan:
    """Plan annotations and drawings; the same seed and size give the same plan."""
    rng = np.random.default_rng(derive_seed(seed, "museum", 0))
    works: list[Work] = []
    for number in range(size.exhibits):
        if works and rng.uniform() < 1 / 7:  # a near-twin of the one before
            works.append(dataclasses.replace(works[-1], detail_seed=derive_seed(seed, "twin", number)))
        else:
            works.append(invent_work(derive_seed(seed, "exhibit", number), size.longest_side))
    ids = np.sort(rng.choice(np.arange(30, 2500 * size.exhibits), size.exhibits, replace=False)).tolist()
    drawings: _Drawings = {}
    for exhibit_id, work in zip(ids, works, strict=True):
        for number in range(int(rng.choice([1, 2, 3], p=[0.78, 0.18, 0.04]))):
            drawings[f"MET/{exhibit_id}/{number}.jpg"] = partial(work.draw_for_catalogue, number)
    database: list[_Row] = [{"id": int(path.split("/")[1]), "path": path} for path in drawings]

    exhibits = [(ids[number], works[number]) for number in rng.permutation(size.exhibits)]
    mini_ids = {exhibit_id for exhibit_id, _ in exhibits[: size.mini_exhibits]}
    classes = max(1, size.val[0] * 3 // 4), max(1, size.test[0] * 3 // 4)  # some are photographed twice
    val, test = exhibits[: classes[0]], exhibits[classes[0] : sum(classes)]
    ground_truth = {
        "MET_database": database,
        "mini_MET_database": [row for row in database if row["id"] in mini_ids],
        "valset": _plan_queries(drawings, "val", val, seed, size),
        "testset": _plan_queries(drawings, "test", test, seed, size),
    }
    return ground_truth, drawings


def _plan_queries(drawings: _Drawings, split: str, exhibits: list[Any], seed: int, size: MuseumSize) -> list[_Row]:
    """Plan a split's photographs: of exhibits (pairs of id and work), of other museums' works, and of no art."""
    rng = np.random.default_rng(derive_seed(seed, split, 0))
    presets, shares = zip(*_VISITORS[split], strict=True)
    met, other, no_art = size.val if split == "val" else size.test
    rows: list[_Row] = []
    for number in range(met + other + no_art):
        visitor, query_seed = int(rng.choice(len(shares), p=shares)), derive_seed(seed, f"{split} query", number)
        name = hashlib.blake2b(f"{seed}/{split}/{number}".encode(), digest_size=6).hexdigest() + ".jpg"
        row: _Row = {"path": f"test_met/{name}", "url": "None"}
        if number < met:
            exhibit_id, work = exhibits[number % len(exhibits)]
            row.update(MET_id=exhibit_id, photographer=f"{split} visitor {visitor + 1}")
        elif number < met + other:
            work = invent_work(derive_seed(query_seed, "other museum", 0), size.longest_side)
            row.update(path=f"test_other/{name}", category=work.kind.capitalize())
        else:
            width, height = rng.permutation([size.longest_side, size.longest_side * 3 // 4]).tolist()
            work = Work(str(rng.choice(list(_SCENES))), (width, height), query_seed, query_seed)
            row.update(path=f"test_noart/{name}", category=work.kind.capitalize())
        rows.append(row)
        drawings[row["path"]] = partial(work.draw_photograph, PRESETS[presets[visitor]], query_seed)
    return [rows[place] for place in rng.permutation(len(rows))]  # nothing about a query can be told from its place


def make_demo(root: Path, seed: int = 0, size: MuseumSize | None = None, progress: bool = True) -> Path:
    """Draw a synthetic museum in the Met layout at ``root``, unless it is there already; return ``root``.

    An interrupted run leaves nothing there. The same version, seed and size give the same files, byte for byte on one
    machine; a drawn museum of others is replaced, a folder with anything else in it is refused. Of two processes at
    once, one draws and the other waits.
    """
    refuse_bad_seed(seed)
    root, size = Path(root), size or MuseumSize()
    marker = {"kind": _KIND, "version": VERSION, "seed": seed, "size": json.loads(json.dumps(dataclasses.asdict(size)))}
    if _read_marker(root) == marker:
        return root
    names = {path.name for path in root.iterdir()} if root.exists() else set()
    if foreign := sorted(names - {_MARKER, "ground_truth", "images"} if _read_marker(root) else names):
        raise UserError(f"{root}: holds {foreign[0]!r}, which is not the demo's; move it, or choose another folder")
    unfinished = root.parent / f".{root.name}.unfinished"
    root.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(root.parent / f".{root.name}.lock"):
        try:
            if _read_marker(root) != marker:
                shutil.rmtree(unfinished, ignore_errors=True)  # a killed run's
                _write_museum(unfinished / root.name, marker, plan_museum(seed, size), progress)
                if root.exists():
                    root.rename(unfinished / "replaced")
                (unfinished / root.name).rename(root)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return root


def _write_museum(folder: Path, marker: _Row, plan: _Plan, progress: bool) -> None:
    """Write images, annotations and the marker that says whose they are."""
    ground_truth, drawings = plan
    for place in [*drawings, "test_met/*", "test_other/*", "test_noart/*", "../ground_truth/*"]:
        (folder / "images" / place).parent.mkdir(parents=True, exist_ok=True)

    def draw(path: str) -> None:
        content = io.BytesIO()  # Pillow, when it writes to a disk itself, does not notice that the disk is full
        drawings[path]().save(content, "JPEG", quality=90)
        with named(folder / "images" / path):
            (folder / "images" / path).write_bytes(content.getbuffer())

    # Two threads will do: Pillow, NumPy and torch let go of the interpreter while they work.
    with ThreadPoolExecutor(2) as executor:
        drawn, title = executor.map(draw, drawings), "Drawing the synthetic museum"
        for _ in track(drawn, title, total=len(drawings), disable=not progress, transient=True):
            pass
    for name, rows in ground_truth.items():
        (folder / "ground_truth" / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / _MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")


def _read_marker(root: Path) -> _Row | None:
    """Return what a drawn museum's marker says, or None where there is none."""
    try:
        marker = read_json(root / _MARKER)
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) and marker.get("kind") == _KIND else None
