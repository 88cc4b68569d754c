"""What `metilr audit` finds of faults planted into a museum, and how long all against all takes at the Met's size.

    python benchmarks/audit.py --root DIR [--folder runs/audit_benchmark]     # 30 copies, 10 leaks, 10 exchanged labels
    python benchmarks/audit.py --rows 397121                                  # made-up rows of width 512, search alone

The first copies the museum, adds copies of 30 catalogue images (recompressed, resized to 60%, cropped by 10%, grey,
mirrored, framed, in turn; every second one under another exhibit), puts 10 such copies of others among the photos of
test, and exchanges the labels of 10 photos of test in pairs. Prints what of these an audit with `lite0_in` finds, at
each score, and a JSON line.
"""

import argparse
import itertools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from measuring import Clock, PeakMemory, show
from PIL import Image, ImageOps
from tuning import WIDTH

from metilr.auditing.groups import SCORES, nearest_images
from metilr.auditing.run import NEIGHBOURS
from metilr.commands.audit import audit
from metilr.extraction.options import ExtractionOptions
from metilr.models import ModelOptions

CHANGES: dict[str, tuple[Callable[[Image.Image], Image.Image], int]] = {  # and the quality of the JPEG
    "recompressed": (lambda image: image, 40),
    "resized": (lambda image: image.resize((int(0.6 * image.width), int(0.6 * image.height))), 85),
    "cropped": (lambda image: image.crop(_inner(image, 0.05)), 85),
    "grey": (ImageOps.grayscale, 85),
    "mirrored": (ImageOps.mirror, 85),
    "framed": (lambda image: ImageOps.expand(image, int(0.08 * max(image.size)), (90, 60, 30)), 85),
}
COPIES, LEAKS, LABELS = 30, 10, 10
LISTED = 20  # labels that are looked at


def main() -> None:
    """Plant and find, or search."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("runs/audit_benchmark"))
    parser.add_argument("--rows", type=int)
    parser.add_argument("--backbone", default="lite0_in")
    parser.add_argument("--weights")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.root is not None:
        model = ModelOptions(backbone=options.backbone, weights=options.weights)
        find(plant(options.root, options.folder / "museum", options.seed), options.folder, model)
    if options.rows is not None:
        compare_all(options.rows, options.seed)


def _inner(image: Image.Image, share: float) -> tuple[int, int, int, int]:
    """The picture without such a share of it on each side."""
    width, height = image.size
    return int(share * width), int(share * height), int((1 - share) * width), int((1 - share) * height)


def plant(root: Path, museum: Path, seed: int) -> Path:
    """Copy a museum and plant the faults; ``planted.json`` in it says which."""
    shutil.rmtree(museum, ignore_errors=True)
    for part in ("ground_truth", "images"):
        shutil.copytree(root / part, museum / part)
    files = {name: museum / "ground_truth" / f"{name}.json" for name in ("MET_database", "testset")}
    database, test = (json.loads(file.read_text()) for file in files.values())
    rng = np.random.default_rng(seed)
    ids = sorted({entry["id"] for entry in database})

    def copy_of(entry: dict[str, Any], number: int, to: str) -> str:
        name, (change, quality) = [*CHANGES.items()][number % len(CHANGES)]
        with Image.open(museum / "images" / entry["path"]) as image:
            changed = change(image.convert("RGB"))
        file = museum / "images" / to / f"planted_{number}_{name}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        changed.convert("RGB").save(file, quality=quality)
        return f"{to}/{file.name}"

    chosen = [database[i] for i in rng.permutation(len(database))[: COPIES + LEAKS]]
    copies, leaks = [], []
    for number, entry in enumerate(chosen[:COPIES]):
        path, others = copy_of(entry, number, "MET/planted"), [each for each in ids if each != entry["id"]]
        database.append({"id": int(rng.choice(others)) if number % 2 else entry["id"], "path": path})
        copies.append([entry["path"], path])
    met = [entry for entry in test if "MET_id" in entry]
    for number, entry in enumerate(chosen[COPIES:]):
        path = copy_of(entry, number, "test_met")
        test.append({"path": path, "MET_id": entry["id"]})
        leaks.append([entry["path"], path])
    by_exhibit = {entry["MET_id"]: entry for entry in (met[i] for i in rng.permutation(len(met)))}  # one photo of each
    labels = [*by_exhibit.values()][:LABELS]
    for one, other in zip(labels[::2], labels[1::2], strict=True):
        one["MET_id"], other["MET_id"] = other["MET_id"], one["MET_id"]
    for file, content in zip(files.values(), (database, test), strict=True):
        file.write_text(json.dumps(content))
    planted = {"copies": copies, "leaks": leaks, "labels": [entry["path"] for entry in labels]}
    (museum / "planted.json").write_text(json.dumps(planted))
    return museum


def find(museum: Path, folder: Path, model: ModelOptions) -> None:
    """Audit, and hold what is found against what was planted."""
    clock = Clock()
    extraction = ExtractionOptions(engine="openvino") if model.weights is None else ExtractionOptions(num_workers=0)
    found = audit(museum, model=model, extraction=extraction, output=folder / "audit")
    seconds = clock()
    planted = json.loads((museum / "planted.json").read_text())
    copies = {frozenset(pair) for pair in planted["copies"]}
    leaks = {path for _, path in planted["leaks"]}
    pairs, leaked = set(), set()
    for group in found.copies:
        in_database = [image.path for image in group.images if image.split == "database"]
        pairs |= {frozenset(pair) for pair in itertools.combinations(in_database, 2)}
        if group.kind == "leak":
            leaked |= {image.path for image in group.images if image.split != "database"}
    doubts = [doubt.image.path for doubt in found.labels][:LISTED]
    labels = set(planted["labels"])
    rows = [
        ["copies", len(copies), len(copies & pairs), len(pairs)],
        ["leaks", len(leaks), len(leaks & leaked), len(leaked)],
        ["labels", len(labels), len(labels & {*doubts}), len({*doubts})],
    ]
    names = ["planted", "hit", "found"]
    figures = {name: dict(zip(names, counts, strict=True)) for name, *counts in rows}
    curve = [each.model_dump() for each in found.thresholds]
    assert [each["score"] for each in curve] == [*SCORES]
    title = f"faults planted into {museum.name}, and found"
    show(
        title,
        ["", "planted", "of these found", "found in all"],
        rows,
        {**figures, "curve": curve, "seconds": round(seconds)},
    )


def compare_all(n: int, seed: int) -> None:
    """Each of n made-up rows against all others, with the blocks on disk."""
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as place:
        rows = np.lib.format.open_memmap(Path(place, "rows.npy"), "w+", np.float32, (n, WIDTH))
        for start in range(0, n, 50_000):
            some = rng.standard_normal((min(50_000, n - start), WIDTH), dtype=np.float32)
            rows[start : start + len(some)] = some / np.linalg.norm(some, axis=1, keepdims=True)
        rows.flush()
        with PeakMemory() as memory:
            clock = Clock()
            nearest_images(rows, rows, NEIGHBOURS, True, Path(place, "blocks"), quiet=False)
            seconds = clock()
    figures = {"rows": n, "neighbours": NEIGHBOURS, "seconds": round(seconds, 1), "added_bytes": memory.added}
    columns = ["rows", "s", "memory added, GB", "rows themselves, GB"]
    show(f"all against all, {n:,} x {WIDTH}", columns, [[n, seconds, memory.added / 1e9, 4 * n * WIDTH / 1e9]], figures)


if __name__ == "__main__":
    main()
