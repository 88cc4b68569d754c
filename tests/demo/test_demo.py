import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from metilr.cli import main
from metilr.demo import MuseumSize, make_demo, museum
from metilr.demo.drawing import View
from metilr.errors import UserError
from tests.full_disk import files_of_at_most

TINY = MuseumSize(exhibits=14, mini_exhibits=9, val=(3, 2, 2), test=(5, 2, 3), longest_side=48)


def small(seed: int, longest_side: int = 16) -> dict:
    return {"seed": seed, "size": MuseumSize(3, 2, (1, 0, 0), (1, 0, 1), longest_side), "progress": False}


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def read(root: Path, name: str) -> list[dict]:
    return json.loads((root / "ground_truth" / f"{name}.json").read_text())


def hashes(root: Path) -> dict[str, str]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file() and path.suffix != ".lock")
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_demo(tmp_path_factory.mktemp("demo") / "museum", seed=3, size=TINY, progress=False)


def test_annotations_have_the_published_form_and_the_counts_asked_for(root):
    database = read(root, "MET_database")
    ids = {row["id"] for row in database}
    assert [row["path"] for row in database] == [f"MET/{row['id']}/{Path(row['path']).name}" for row in database]
    assert len(ids) == TINY.exhibits < len(database)  # some have several views
    assert max(ids) - min(ids) >= 2 * len(ids)  # a museum's numbers have gaps
    mini_ids = {row["id"] for row in read(root, "mini_MET_database")}
    assert len(mini_ids) == TINY.mini_exhibits
    assert [row for row in database if row["id"] in mini_ids] == read(root, "mini_MET_database")
    for name, counts in (("valset", TINY.val), ("testset", TINY.test)):
        rows = read(root, name)
        for row in rows:
            own = {"MET_id", "photographer"} if row["path"].startswith("test_met/") else {"category"}
            assert set(row) == {"path", "url"} | own
        kinds = [row["path"].split("/")[0] for row in rows]
        assert tuple(kinds.count(kind) for kind in ("test_met", "test_other", "test_noart")) == counts
    val, test = ([row for row in read(root, name) if "MET_id" in row] for name in ("valset", "testset"))
    assert not {row["photographer"] for row in val} & {row["photographer"] for row in test}
    val_ids, test_ids = {row["MET_id"] for row in val}, {row["MET_id"] for row in test}
    assert val_ids and test_ids and not val_ids & test_ids and val_ids | test_ids <= mini_ids


def test_every_image_is_named_once_and_is_a_jpeg_of_the_right_size_unlike_all_others(root):
    paths = [row["path"] for name in ("MET_database", "valset", "testset") for row in read(root, name)]
    found = {name.removeprefix("images/"): sha for name, sha in hashes(root).items() if name.startswith("images/")}
    assert sorted(paths) == sorted(found)
    assert len(set(found.values())) == len(found)
    for path in paths:
        with Image.open(root / "images" / path) as image:
            assert np.asarray(image).std() > 1
            assert (image.format, image.mode) == ("JPEG", "RGB") and max(image.size) <= TINY.longest_side


def test_same_seed_gives_the_same_bytes_and_another_seed_another_museum(root, tmp_path, monkeypatch):
    assert hashes(make_demo(tmp_path / "again", seed=3, size=TINY, progress=False)) == hashes(root)
    other = hashes(make_demo(tmp_path / "other", seed=4, size=TINY, progress=False))
    assert not set(other.values()) & set(hashes(root).values())
    marker = json.loads((root / "demo.json").read_text())
    assert "synthetic" in marker["kind"] and marker["seed"] == 3
    monkeypatch.setattr(museum, "plan_museum", None)
    assert make_demo(root, seed=3, size=TINY) == root  # a complete one is not drawn again


@pytest.mark.parametrize("kind", museum._ART)
def test_near_twins_differ_but_less_than_strangers_and_turn(kind):
    def pixels(work_seed: int, detail_seed: int, turn: float = 0.0) -> np.ndarray:
        view = [View(turn, -0.6, (200, 200, 200), (150, 150, 150))] if kind == "vessel" else []
        return np.asarray(museum.Work(kind, (48, 64), work_seed, detail_seed).draw(*view), dtype=float)

    seeds = range(12)
    to_twin = [np.abs(pixels(seed, seed) - pixels(seed, seed + 50)).mean() for seed in seeds]
    to_stranger = [np.abs(pixels(seed, seed) - pixels(seed + 100, seed + 100)).mean() for seed in seeds]
    assert min(to_twin) > 0.1  # equal exhibits would be an error in the annotations
    assert np.mean(to_twin) < 0.6 * np.mean(to_stranger)
    assert kind != "vessel" or min(np.abs(pixels(seed, 0) - pixels(seed, 0, 0.7)).mean() for seed in seeds) > 0.1


def test_demo_of_another_seed_or_version_is_replaced(tmp_path):
    root, fresh = make_demo(tmp_path / "museum", **small(0)), make_demo(tmp_path / "fresh", **small(1))
    before = hashes(root)
    assert hashes(make_demo(root, **small(1))) == hashes(fresh) != before
    write(root / "demo.json", json.dumps({**json.loads((root / "demo.json").read_text()), "version": 1, "counts": {}}))
    assert hashes(make_demo(root, **small(1))) == hashes(fresh)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_interrupted_run_leaves_nothing_and_keeps_what_was_there(tmp_path, monkeypatch, interruption):
    make_demo(tmp_path / "old", **small(0))
    before = hashes(tmp_path)
    monkeypatch.setattr(museum.Work, "draw_photograph", Mock(side_effect=interruption))
    for name in ("new", "old"):
        with pytest.raises(interruption):
            make_demo(tmp_path / name, **small(1))
    assert not (tmp_path / "new").exists() and hashes(tmp_path) == before


def test_two_runs_at_once_leave_one_whole_museum_and_nothing_of_a_killed_one(tmp_path):
    (root := tmp_path / "museum").mkdir()  # an empty folder is filled
    (tmp_path / ".museum.unfinished" / "museum" / "images").mkdir(parents=True)
    with ThreadPoolExecutor(2) as executor:
        assert [*executor.map(lambda _: make_demo(root, **small(0)), range(2))] == [root, root]
    assert {path.name for path in tmp_path.iterdir()} <= {"museum", ".museum.lock"}
    assert hashes(root) == hashes(make_demo(tmp_path / "alone", **small(0)))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda root: write(root / "holiday.jpg", "dear"), r"holiday\.jpg"),
        (lambda root: write(root / "ground_truth" / "testset.json", "[]"), "ground_truth"),
        (lambda root: write(make_demo(root, **small(0)) / "notes.txt", "mine"), r"notes\.txt"),
        (lambda root: write(root / "demo.json", '{"kind": "something else"}'), r"demo\.json"),
    ],
)
def test_foreign_content_is_never_overwritten(tmp_path, make, named):
    make(tmp_path / "museum")
    before = hashes(tmp_path)
    with pytest.raises(UserError, match=f"^[^\n]*museum.*{named}[^\n]*$"):
        make_demo(tmp_path / "museum", **small(1))
    assert hashes(tmp_path) == before


def test_command_takes_root_and_seed_and_says_where_the_demo_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(museum, "make_demo", lambda root, seed: make_demo(root, **small(seed)))
    main(["demo", str(tmp_path / "museum"), "--seed", "4"])
    assert str(tmp_path / "museum") in capsys.readouterr().out
    assert json.loads((tmp_path / "museum" / "demo.json").read_text())["seed"] == 4
    for wrong in (["--size.exhibits", "3"], ["--seed", "-1"], ["--seed", str(2**63)]):
        with pytest.raises(SystemExit):
            main(["demo", str(tmp_path / "other"), *wrong])
        assert wrong[0] in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_what_cannot_be_written_is_named_and_leaves_no_halves(tmp_path):
    with files_of_at_most(4096), pytest.raises(OSError, match=r"museum"):
        make_demo(tmp_path / "museum", **small(0, 160))  # of more bytes than the annotations
    assert {path.name for path in tmp_path.iterdir()} <= {".museum.lock"}
