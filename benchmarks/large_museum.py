"""A made-up museum of the mini Met's counts: small images of many shapes, each exhibit with colours of its own."""

import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# As published: images and exhibits of the mini database; of each split its met queries, the exhibits that they show,
# photographs of other art and of none, and photographers.
DATABASE = (38_307, 33_501)
QUERIES = {"val": (129, 111, 1_168, 868, 14), "test": (1_003, 734, 10_352, 7_964, 25)}
# All images have nearly the same area. Batches come the largest first: if later ones needed less memory, this would
# hide what is not given back.
HEIGHTS = (96, 171)
AREA = 128**2
PATTERN = 8  # squares a side; what makes an exhibit is these squares' colours, smoothly enlarged


def make_large_museum(root: Path, share: float = 1.0) -> Path:
    """Make a data root in the Met layout, ground truth last; one that is there with its ground truth is left as it is.

    Args:
        root: The folder.
        share: Of all counts.
    """
    if (root / "ground_truth").exists():
        return root
    truth = _ground_truth(share)
    paths = [(entry["path"], entry.pop("exhibit")) for entries in truth.values() for entry in entries]
    with ProcessPoolExecutor() as pool:
        chunks = [paths[i : i + 500] for i in range(0, len(paths), 500)]
        list(pool.map(_draw, [root / "images"] * len(chunks), chunks, range(0, len(paths), 500)))
    unfinished = root / "ground_truth_unfinished"
    unfinished.mkdir(exist_ok=True)
    for name, entries in truth.items():
        (unfinished / f"{name}.json").write_text(json.dumps(entries))
    unfinished.rename(root / "ground_truth")
    return root


def _ground_truth(share: float) -> dict[str, list[dict[str, Any]]]:
    """Entries of the three files, and in each the ``exhibit`` that the image shows, below 0 if none of the museum."""
    rng = np.random.default_rng(0)

    def scaled(n: int) -> int:
        return max(1, round(n * share))

    n_images, n_classes = map(scaled, DATABASE)
    shown = [*range(n_classes), *rng.integers(0, n_classes, n_images - n_classes).tolist()]
    database = [{"id": id_, "path": f"MET/{id_}/{i}.jpg", "exhibit": id_} for i, id_ in enumerate(shown)]
    truth: dict[str, list[dict[str, Any]]] = {"mini_MET_database": database}
    first, n_others = 0, 0
    for split, (n_met, n_shown, n_other, n_noart, n_photographers) in QUERIES.items():
        ids = first + np.arange(scaled(n_met)) % scaled(n_shown)  # val and test share no exhibit
        first += scaled(n_shown)
        by = rng.integers(0, n_photographers, len(ids)).tolist()
        entries: list[dict[str, Any]] = [
            {"path": f"test_met/{split}{i}.jpg", "MET_id": id_, "photographer": f"{split}{by[i]}", "exhibit": id_}
            for i, id_ in enumerate(ids.tolist())
        ]
        for folder, n in (("test_other", scaled(n_other)), ("test_noart", scaled(n_noart))):
            entries += [{"path": f"{folder}/{split}{i}.jpg", "exhibit": -1 - n_others - i} for i in range(n)]
            n_others += n
        truth[f"{split}set"] = entries
    return truth


def _draw(folder: Path, images: Sequence[tuple[str, int]], first: int) -> None:
    """Draw images, numbered from ``first``."""
    for i, (path, exhibit) in enumerate(images, first):
        colours = np.random.default_rng([0, exhibit] if exhibit >= 0 else [1, -exhibit])
        rng = np.random.default_rng([2, i])
        pattern = colours.uniform(0, 255, (PATTERN, PATTERN, 3))
        noisy = np.clip(pattern + rng.normal(0, 12, pattern.shape), 0, 255).astype(np.uint8)
        height = int(rng.integers(*HEIGHTS))
        width = round(AREA * rng.uniform(0.97, 1.03) / height)
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy).resize((width, height), Image.Resampling.BICUBIC).save(file, quality=85)
