"""A museum in the Met layout, small enough to draw in every test that needs images."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

SHAPES = ((24, 32), (32, 24), (28, 28))  # height and width
DATABASE_IDS = (70, 70, 9, 9, 41, 500, 12, 33)  # 8 images of 6 exhibits, not in ascending order
MINI = 6  # images of the mini database: the exhibits 70, 9, 41 and 500
MET_IDS = {"val": (9, 70, 41, 9), "test": (500, 41, 70, 9)}
N_DISTRACTORS = 3


def write_museum(root: Path, seed: int = 0) -> Path:
    """Draw 8 database images of 6 exhibits, and for val and test 4 met queries and 3 distractors each."""
    rng = np.random.default_rng(seed)
    database = [{"id": id_, "path": f"MET/{id_}/{i}.jpg"} for i, id_ in enumerate(DATABASE_IDS)]
    queries = {}
    for split, ids in MET_IDS.items():
        queries[split] = [{"path": f"test_met/{split}{i}.jpg", "MET_id": id_} for i, id_ in enumerate(ids)]
        queries[split] += [{"path": f"test_other/{split}{i}.jpg", "category": "x"} for i in range(N_DISTRACTORS)]
    patterns = {id_: rng.uniform(0, 255, (4, 4, 3)) for id_ in DATABASE_IDS}
    for i, entry in enumerate([*database, *queries["val"], *queries["test"]]):
        pattern = patterns.get(entry.get("id", entry.get("MET_id")), rng.uniform(0, 255, (4, 4, 3)))
        noisy = np.clip(pattern + rng.normal(0, 12, pattern.shape), 0, 255).astype(np.uint8)
        height, width = SHAPES[i % len(SHAPES)]
        file = root / "images" / entry["path"]
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy).resize((width, height), Image.Resampling.BICUBIC).save(file, quality=92)
    write_ground_truth(root, database, queries["val"], queries["test"], database[:MINI])
    return root


def write_ground_truth(root: Path, database: object, val: object, test: object, mini: object = None) -> Path:
    """Write the four JSON files as they are given, right or wrong."""
    folder = root / "ground_truth"
    folder.mkdir(parents=True, exist_ok=True)
    contents = {"MET_database": database, "valset": val, "testset": test, "mini_MET_database": mini}
    for name, content in contents.items():
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return root


def make_unreachable(root: Path) -> list[str]:
    """Give two queries of test names under which a system has no file: a link to itself, and one of 300 bytes."""
    loop, long = "test_met/test1.jpg", f"test_other/{'x' * 300}.jpg"
    (root / "images" / loop).unlink()
    (root / "images" / loop).symlink_to("test1.jpg")
    file = root / "ground_truth" / "testset.json"
    entries = json.loads(file.read_text())
    entries[-1]["path"] = long
    file.write_text(json.dumps(entries))
    return [loop, long]
