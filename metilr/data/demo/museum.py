"""Plans the drawn museum, draws it and writes it in the Met layout, whole or not at all."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.progress import track

from metilr.data.demo.exhibits import (
    Work,
    draw_catalogue_image,
    draw_scene_visit,
    draw_visit,
    invent_twin,
    invent_work,
)
from metilr.data.demo.scenes import SCENES
from metilr.data.visits import PRESETS, derive_seed
from metilr.errors import UserError

# Raise it with every change that changes a pixel or an annotation.
VERSION = 1
_MARKER = "demo.json"
_KIND = "synthetic museum drawn by metilr"
_CONTENTS = frozenset({_MARKER, "ground_truth", "images"})
_SECONDS_UNTIL_ABANDONED = 3600


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

_Drawing = Callable[[], Image.Image]
_Row = dict[str, Any]


@dataclasses.dataclass
class _Plan:
    """The museum before it is drawn: annotations by file name, and what draws each image."""

    ground_truth: dict[str, list[_Row]] = dataclasses.field(default_factory=dict)
    drawings: dict[str, _Drawing] = dataclasses.field(default_factory=dict)


def make_demo(root: Path, seed: int = 0, size: MuseumSize | None = None, progress: bool = True) -> Path:
    """Draw a synthetic museum in the Met layout, unless it is there already.

    The museum appears at ``root`` when it is complete, with a marker file ``demo.json``; an interrupted run leaves
    nothing there. The same version, seed and size give the same files, byte for byte on one machine. A drawn
    museum of another version, seed or size is replaced; anything else is left alone.

    Args:
        root: Folder to write; its parents are made.
        seed: Another seed gives another museum.
        size: Number and size of the images.
        progress: Show a progress bar.

    Returns:
        The folder.

    Raises:
        UserError: If ``root`` holds something else than a drawn museum, or cannot be written.
    """
    root, size = Path(root), size or MuseumSize()
    marker = {
        "kind": _KIND,
        "version": VERSION,
        "seed": seed,
        "size": json.loads(json.dumps(dataclasses.asdict(size))),
    }
    if _is_complete(root, marker):
        return root
    _refuse_foreign(root)
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(root)
        with _partial_folder(root) as partial_folder:
            _write_museum(partial_folder, marker, _plan_museum(seed, size), progress)
            _put_in_place(partial_folder, root, marker)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{root}: the demo cannot be written ({reason}); choose another --root") from error
    return root


def _plan_museum(seed: int, size: MuseumSize) -> _Plan:
    rng = np.random.default_rng(derive_seed(seed, "museum", 0))
    plan = _Plan()
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
    plan: _Plan,
    split: str,
    exhibits: list[tuple[int, Work]],
    counts: tuple[int, int, int],
    seed: int,
    longest_side: int,
) -> list[_Row]:
    """Plan a split's photographs: of exhibits, of other museums' works, and of no art."""
    rng = np.random.default_rng(derive_seed(seed, split, 0))
    photographers = _PHOTOGRAPHERS[split]
    shares = [photographer.share for photographer in photographers]
    met, other, no_art = counts
    rows: list[_Row] = []
    for number in range(met + other + no_art):
        photographer = photographers[int(rng.choice(len(photographers), p=shares))]
        strengths = PRESETS[photographer.preset]
        query_seed = derive_seed(seed, f"{split} query", number)
        name = hashlib.blake2b(f"{seed}/{split}/{number}".encode(), digest_size=6).hexdigest() + ".jpg"
        row: _Row
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


def _write_museum(folder: Path, marker: _Row, plan: _Plan, progress: bool) -> None:
    """Write images and annotations, then the marker that calls them complete."""
    for path in plan.drawings:
        (folder / "images" / path).parent.mkdir(parents=True, exist_ok=True)
    for kind in ("test_met", "test_other", "test_noart"):
        (folder / "images" / kind).mkdir(parents=True, exist_ok=True)

    def draw(path: str) -> None:
        plan.drawings[path]().save(folder / "images" / path, quality=90)

    # Pillow, NumPy and torch let go of the interpreter while they work, so threads share two cores well enough
    # and need no start-up time and no picklable drawings.
    executor = ThreadPoolExecutor(max_workers=2)
    try:
        drawn = executor.map(draw, plan.drawings)
        description = "Drawing the synthetic museum"
        for _ in track(drawn, description, total=len(plan.drawings), disable=not progress, transient=True):
            pass
    finally:
        executor.shutdown(cancel_futures=True)

    (folder / "ground_truth").mkdir()
    for name, rows in plan.ground_truth.items():
        (folder / "ground_truth" / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    counts = {name: len(rows) for name, rows in plan.ground_truth.items()}
    text = json.dumps({**marker, "counts": counts}, indent=2) + "\n"
    (folder / _MARKER).write_text(text, encoding="utf-8")


def _read_marker(root: Path) -> _Row | None:
    """Return the marker of a drawn museum, or None where there is none."""
    try:
        marker = json.loads((root / _MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) and marker.get("kind") == _KIND else None


def _is_complete(root: Path, marker: _Row) -> bool:
    found = _read_marker(root)
    return found is not None and all(found.get(key) == value for key, value in marker.items())


def _refuse_foreign(root: Path) -> None:
    """Raise unless ``root`` is missing, empty, or a drawn museum with nothing added at its top."""
    if not os.path.lexists(root):
        return
    if not root.is_dir():
        raise UserError(f"{root}: not a folder; choose another --root for the demo")
    entries = {entry.name for entry in root.iterdir()}
    foreign = sorted(entries - _CONTENTS if _read_marker(root) else entries)
    if foreign:
        raise UserError(f"{root}: holds {foreign[0]!r}, which is not the demo's; move it or choose another --root")


@contextlib.contextmanager
def _partial_folder(root: Path) -> Iterator[Path]:
    """Make a folder beside ``root``, on the same file system, and remove what is left of it in the end."""
    holder = Path(tempfile.mkdtemp(prefix=f".{root.name}.partial-", dir=root.parent))
    try:
        museum = holder / root.name
        museum.mkdir()  # unlike mkdtemp's, with the usual permissions
        yield museum
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def _remove_abandoned(root: Path) -> None:
    """Remove the partial folders of killed runs; younger ones may belong to a run in progress."""
    for folder in root.parent.glob(f".{root.name}.partial-*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > _SECONDS_UNTIL_ABANDONED:
                shutil.rmtree(folder, ignore_errors=True)


def _put_in_place(museum: Path, root: Path, marker: _Row) -> None:
    if _is_complete(root, marker):  # another process was faster
        return
    with contextlib.suppress(FileNotFoundError):  # as on a first run
        root.rename(museum.parent / "replaced")
    try:
        museum.rename(root)
    except OSError:
        if not _is_complete(root, marker):
            raise
