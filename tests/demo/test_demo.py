import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metilr.cli import main
from metilr.demo import MuseumSize, exhibits, make_demo, museum, plan
from metilr.errors import UserError
from tests.full_disk import files_of_at_most

TINY = MuseumSize(exhibits=14, mini_exhibits=9, val=(3, 2, 2), test=(5, 2, 3), longest_side=48)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_demo(tmp_path_factory.mktemp("demo") / "museum", seed=3, size=TINY, progress=False)


def read(root: Path, name: str) -> list[dict]:
    return json.loads((root / "ground_truth" / f"{name}.json").read_text())


def hashes(root: Path) -> dict[str, str]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def hidden(folder: Path) -> list[Path]:
    return list(folder.glob(".*"))


def test_annotations_have_the_published_form(root):
    database = read(root, "MET_database")
    assert all(set(row) == {"id", "path"} and isinstance(row["id"], int) for row in database)
    for row in database:
        assert row["path"].rsplit("/", 1)[0] == f"MET/{row['id']}"
    for split in ("valset", "testset"):
        for row in read(root, split):
            if row["path"].startswith("test_met/"):
                assert set(row) == {"MET_id", "path", "photographer", "url"}
            else:
                assert set(row) == {"path", "url", "category"}
                assert row["path"].split("/")[0] in {"test_other", "test_noart"}


def test_counts_are_as_asked(root):
    database = read(root, "MET_database")
    ids = {row["id"] for row in database}
    assert len(ids) == TINY.exhibits <= len(database)
    assert max(ids) - min(ids) >= 2 * len(ids)  # a museum's numbers have gaps
    assert len({row["id"] for row in read(root, "mini_MET_database")}) == TINY.mini_exhibits
    for name, counts in (("valset", TINY.val), ("testset", TINY.test)):
        kinds = [row["path"].split("/")[0] for row in read(root, name)]
        assert tuple(kinds.count(kind) for kind in ("test_met", "test_other", "test_noart")) == counts


def test_every_image_is_named_once_and_is_a_jpeg_of_the_right_size(root):
    rows = [row for name in ("MET_database", "valset", "testset") for row in read(root, name)]
    paths = [row["path"] for row in rows]
    assert len(paths) == len(set(paths))
    images = root / "images"
    assert {path.relative_to(images).as_posix() for path in images.rglob("*.jpg")} == set(paths)
    for path in paths:
        with Image.open(images / path) as image:
            image.load()
            assert (image.format, image.mode) == ("JPEG", "RGB")
            assert max(image.size) <= TINY.longest_side
            assert np.asarray(image).std() > 1


def test_no_two_images_are_equal(root):
    found = [digest for name, digest in hashes(root).items() if name.startswith("images/")]
    assert len(found) == len(set(found))


def test_splits_share_neither_class_nor_photographer_and_mini_holds_both(root):
    val, test = ([row for row in read(root, name) if "MET_id" in row] for name in ("valset", "testset"))
    val_ids, test_ids = {row["MET_id"] for row in val}, {row["MET_id"] for row in test}
    assert val_ids and test_ids and not val_ids & test_ids
    assert not {row["photographer"] for row in val} & {row["photographer"] for row in test}
    database, mini = read(root, "MET_database"), read(root, "mini_MET_database")
    assert val_ids | test_ids <= {row["id"] for row in mini}
    assert [row for row in database if row["id"] in {other["id"] for other in mini}] == mini


def test_same_seed_gives_the_same_bytes_and_another_seed_another_museum(root, tmp_path):
    again = make_demo(tmp_path / "again", seed=3, size=TINY, progress=False)
    assert hashes(again) == hashes(root)
    other = hashes(make_demo(tmp_path / "other", seed=4, size=TINY, progress=False))
    assert not set(other.values()) & set(hashes(root).values())


def test_marker_says_that_it_is_synthetic(root):
    marker = json.loads((root / "demo.json").read_text())
    assert "synthetic" in marker["kind"] and marker["seed"] == 3
    assert marker["counts"]["valset"] == 7 and marker["counts"]["testset"] == 10


def test_complete_demo_is_not_drawn_again(root, monkeypatch):
    monkeypatch.setattr(museum, "plan_museum", None)
    assert make_demo(root, seed=3, size=TINY) == root


@pytest.mark.parametrize("kind", exhibits._KINDS)
def test_near_twins_differ_but_less_than_strangers(kind):
    def pixels(work: exhibits.Work) -> np.ndarray:
        return np.asarray(exhibits._draw(work, exhibits.View()), dtype=float)

    to_twin, to_stranger = [], []
    for seed in range(12):
        work = exhibits.Work(kind, (48, 64), seed, seed)
        twin, stranger = exhibits.invent_twin(work, 0), exhibits.Work(kind, (48, 64), seed + 100, seed + 100)
        to_twin.append(np.abs(pixels(work) - pixels(twin)).mean())
        to_stranger.append(np.abs(pixels(work) - pixels(stranger)).mean())
    # Equal exhibits would be an error in the annotations, and a zero eigenvalue in the whitening.
    assert min(to_twin) > 0.1
    assert np.mean(to_twin) < 0.6 * np.mean(to_stranger)


def small(seed: int) -> dict:
    return {"seed": seed, "size": MuseumSize(3, 2, (1, 0, 0), (1, 0, 1), 16), "progress": False}


def test_demo_of_another_seed_is_replaced(tmp_path):
    root = make_demo(tmp_path / "museum", **small(0))
    before = hashes(root)
    make_demo(root, **small(1))
    assert hashes(root) == hashes(make_demo(tmp_path / "fresh", **small(1))) != before
    assert not hidden(tmp_path)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_interrupted_run_leaves_nothing_and_keeps_what_was_there(tmp_path, monkeypatch, interruption):
    old = make_demo(tmp_path / "old", **small(0))
    before = hashes(old)

    def fail(*arguments):
        raise interruption

    monkeypatch.setattr(plan, "draw_scene_visit", fail)
    for root in (tmp_path / "new", old):
        with pytest.raises(interruption):
            make_demo(root, **small(1))
    assert not (tmp_path / "new").exists()
    assert hashes(old) == before
    assert not hidden(tmp_path)


def test_killed_run_is_no_museum_and_is_swept_up_when_old(tmp_path, monkeypatch):
    killed = tmp_path / ".museum.partial-x" / "museum" / "images"
    killed.mkdir(parents=True)
    make_demo(tmp_path / "museum", **small(0))
    assert killed.exists()  # it might be another process at work
    monkeypatch.setattr(museum, "_SECONDS_UNTIL_ABANDONED", -1)
    make_demo(tmp_path / "museum", **small(1))
    assert not hidden(tmp_path)


def test_two_runs_at_once_leave_one_whole_museum(tmp_path):
    root = tmp_path / "museum"
    with ThreadPoolExecutor(2) as executor:
        for made in [executor.submit(make_demo, root, **small(0)) for _ in range(2)]:
            assert made.result() == root
    assert hashes(root) == hashes(make_demo(tmp_path / "alone", **small(0)))
    assert not hidden(tmp_path)


def test_empty_folder_is_filled(tmp_path):
    (tmp_path / "museum").mkdir()
    assert (make_demo(tmp_path / "museum", **small(0)) / "demo.json").exists()


def make_photos(root: Path) -> None:
    root.mkdir()
    (root / "holiday.jpg").write_bytes(b"dear")


def make_real_museum(root: Path) -> None:
    (root / "ground_truth").mkdir(parents=True)


def make_demo_with_notes(root: Path) -> None:
    make_demo(root, **small(0))
    (root / "notes.txt").write_text("mine")


def make_other_marker(root: Path) -> None:
    root.mkdir()
    (root / "demo.json").write_text('{"kind": "something else"}')


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (make_photos, r"holiday\.jpg"),
        (make_real_museum, "ground_truth"),
        (make_demo_with_notes, r"notes\.txt"),
        (make_other_marker, r"demo\.json"),
        (lambda root: root.write_text("a file"), "not a folder"),
    ],
)
def test_foreign_content_is_never_overwritten(tmp_path, make, named):
    root = tmp_path / "museum"
    make(root)
    before = hashes(tmp_path)
    with pytest.raises(UserError, match=f"museum.*{named}") as caught:
        make_demo(root, **small(1))
    assert "\n" not in str(caught.value)
    assert hashes(tmp_path) == before


def test_command_takes_root_and_seed_and_says_where_the_demo_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(museum, "make_demo", lambda root, seed: make_demo(root, **small(seed)))
    root = tmp_path / "museum"
    main(["demo", str(root), "--seed", "4"])
    assert str(root) in capsys.readouterr().out
    assert json.loads((root / "demo.json").read_text())["seed"] == 4
    with pytest.raises(SystemExit):
        main(["demo", str(root), "--size.exhibits", "3"])
    assert "--size.exhibits" in capsys.readouterr().err


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seed_out_of_range_is_refused(tmp_path, seed):
    with pytest.raises(UserError, match=f"--seed {seed}"):
        make_demo(tmp_path / "museum", **small(seed))
    assert not (tmp_path / "museum").exists()


def test_a_full_disk_leaves_no_demo_with_halves_of_images(tmp_path):
    larger = {**small(0), "size": MuseumSize(3, 2, (1, 0, 0), (1, 0, 1), 160)}  # of more bytes than the annotations
    with (
        files_of_at_most(4096),
        pytest.raises(UserError, match=r"museum: .* \(File too large\); choose another folder"),
    ):
        make_demo(tmp_path / "museum", **larger)
    assert [*tmp_path.iterdir()] == []


def test_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/museum"):
        make_demo(tmp_path / "file" / "museum", **small(0))
