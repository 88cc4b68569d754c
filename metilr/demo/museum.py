"""Draws a planned museum and writes it in the Met layout, whole or not at all."""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.progress import track

from metilr.data.visits import refuse_bad_seed
from metilr.demo.plan import MuseumSize, Plan, Row, plan_museum
from metilr.errors import UserError

DEMO = Path("runs/demo")
"""Where commands without a data root draw it."""

# Raise it with every change that changes a pixel or an annotation.
VERSION = 1
_MARKER = "demo.json"
_KIND = "synthetic museum drawn by metilr"
_CONTENTS = frozenset({_MARKER, "ground_truth", "images"})
_SECONDS_UNTIL_ABANDONED = 3600


def draw_demo(root: Path, seed: int = 0) -> None:
    """Draw the synthetic museum of the demo, in the Met's layout.

    It is what ``metilr evaluate`` draws for itself when no ``--root`` is given: a place to try every command without
    a download. No image in it is a photograph; figures measured on it say nothing about real museums.

    Args:
        root: Folder to write, and what ``--root`` of other commands then takes. A demo already there is kept if
            it is the same and replaced if not; a folder with anything else in it is refused.
        seed: Another seed, from 0 up, gives another museum.

    Raises:
        UserError: If ``root`` holds something else than a demo or cannot be written, or the seed is out of range.
    """
    print(f"the demo is in {make_demo(root, seed)}")


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
        UserError: If ``root`` holds something else than a drawn museum, or cannot be written, or the seed is
            outside [0, 2⁶³).
    """
    refuse_bad_seed(seed)
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
            _write_museum(partial_folder, marker, plan_museum(seed, size), progress)
            _put_in_place(partial_folder, root, marker)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{root}: the demo cannot be written ({reason}); choose another folder") from error
    return root


def _write_museum(folder: Path, marker: Row, plan: Plan, progress: bool) -> None:
    """Write images and annotations, then the marker that calls them complete."""
    for path in plan.drawings:
        (folder / "images" / path).parent.mkdir(parents=True, exist_ok=True)
    for kind in ("test_met", "test_other", "test_noart"):
        (folder / "images" / kind).mkdir(parents=True, exist_ok=True)

    def draw(path: str) -> None:
        content = io.BytesIO()  # see write_picture; the whole museum gets its name at once
        plan.drawings[path]().save(content, "JPEG", quality=90)
        (folder / "images" / path).write_bytes(content.getbuffer())

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


def _read_marker(root: Path) -> Row | None:
    """Return the marker of a drawn museum, or None where there is none."""
    try:
        marker = json.loads((root / _MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) and marker.get("kind") == _KIND else None


def _is_complete(root: Path, marker: Row) -> bool:
    found = _read_marker(root)
    return found is not None and all(found.get(key) == value for key, value in marker.items())


def _refuse_foreign(root: Path) -> None:
    """Raise unless ``root`` is missing, empty, or a drawn museum with nothing added at its top."""
    if not os.path.lexists(root):
        return
    if not root.is_dir():
        raise UserError(f"{root}: not a folder; choose another for the demo")
    entries = {entry.name for entry in root.iterdir()}
    foreign = sorted(entries - _CONTENTS if _read_marker(root) else entries)
    if foreign:
        raise UserError(f"{root}: holds {foreign[0]!r}, which is not the demo's; move it, or choose another folder")


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


def _put_in_place(museum: Path, root: Path, marker: Row) -> None:
    if _is_complete(root, marker):  # another process was faster
        return
    with contextlib.suppress(FileNotFoundError):  # as on a first run
        root.rename(museum.parent / "replaced")
    try:
        museum.rename(root)
    except OSError:
        if not _is_complete(root, marker):
            raise
