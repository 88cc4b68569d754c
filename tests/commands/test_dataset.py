"""``metilr dataset``: counts against the JSON files themselves, pictures looked at by their pixels."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metilr.cli import main
from metilr.commands.dataset import _size_edges, count
from metilr.data.ground_truth import load_ground_truth
from tests.museum import make_unreachable, write_ground_truth


def count_of(*arguments: object) -> dict:
    main(["dataset", *map(str, arguments), "--output", "out"])
    return json.loads(Path("out/counts.json").read_text())


def test_a_small_museum(tiny_museum, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    counts = count_of(tiny_museum)
    assert counts["database"] == {
        "name": "full",
        "images": 8,
        "exhibits": 6,
        "class_sizes": {"1": 4, "2-3": 2, "4-10": 0, "11+": 0},
        "share_with_one_image": pytest.approx(4 / 6),
        "largest": {"exhibit_id": 9, "images": 2},
    }
    assert counts["val"] == {
        "queries": 7,
        "kinds": {"met": 4, "other-artwork": 3},
        "exhibits": 3,
        "photographers": None,
    }
    assert counts["synthetic"] is False
    printed = capsys.readouterr().out
    assert re.search(r"images +8 +7 +7 ", printed) and re.search(r"photographers of met .* not named", printed)
    assert re.search(r"1 +4 +66.7% ", printed)
    with Image.open("out/class_sizes.png") as picture:
        assert picture.width > picture.height > 300


def test_the_old_name_still_answers_with_a_hint(tiny_museum, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["describe", str(tiny_museum), "--output", "out"])
    assert "metilr dataset" in capsys.readouterr().err and Path("out/counts.json").exists()


def test_one_image_an_exhibit_makes_no_plot_of_a_single_bar(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    entries = [{"id": i, "path": f"{i}.jpg"} for i in range(3)]
    val, test = ([{"path": f"{name}.jpg", "MET_id": 1}] for name in ("v", "t"))
    count_of(write_ground_truth(tmp_path / "museum", entries, val, test))
    assert not Path("out/class_sizes.png").exists() and "each exhibit has one image" in capsys.readouterr().out


def test_the_published_files(met_root, tmp_path, monkeypatch, capsys):
    """At the real size and without images; the counts are the published ones."""
    monkeypatch.chdir(tmp_path)
    counts = count_of(met_root, "--database", "mini")
    assert (counts["database"]["images"], counts["database"]["exhibits"]) == (38307, 33501)
    assert counts["val"]["kinds"] == {"met": 129, "other-artwork": 1168, "non-art": 868}
    assert counts["test"]["kinds"] == {"met": 1003, "other-artwork": 10352, "non-art": 7964}
    assert (counts["val"]["exhibits"], counts["test"]["exhibits"]) == (111, 734)
    assert (counts["val"]["photographers"], counts["test"]["photographers"]) == (14, 25)

    entries = json.loads((met_root / "ground_truth" / "mini_MET_database.json").read_text())
    sizes = Counter(Counter(entry["id"] for entry in entries).values())
    assert counts["database"]["class_sizes"] == {
        "1": sizes[1],
        "2-3": sizes[2] + sizes[3],
        "4-10": sum(n for size, n in sizes.items() if 4 <= size <= 10),
        "11+": sum(n for size, n in sizes.items() if size > 10),
    }
    assert counts["database"]["largest"]["images"] == max(sizes)
    assert "no sheet of samples" in capsys.readouterr().out and not Path("out/samples.jpg").exists()
    assert Path("out/class_sizes.png").stat().st_size > 5000


def colour_museum(root: Path) -> Path:
    """Every kind of image has a colour of its own; exhibit 1 is photographed light, exhibit 2 dark."""
    colours = {
        "MET/1.jpg": "#ff0000",
        "MET/2.jpg": "#800000",
        "test_other/o.jpg": "#00ff00",
        "test_noart/n.jpg": "blue",
    }
    colours |= {"test_met/1.jpg": "#ffff00", "test_met/2.jpg": "#808000"}
    for path, colour in colours.items():
        file = root / "images" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (200, 200), colour).save(file, quality=95)
    database = [{"id": i, "path": f"MET/{i}.jpg"} for i in (1, 2)]
    queries = [{"path": f"test_met/{i}.jpg", "MET_id": i, "photographer": "A"} for i in (1, 2)]
    distractors = [{"path": "test_other/o.jpg"}, {"path": "test_noart/n.jpg"}]
    return write_ground_truth(root, database, [queries[0], distractors[0]], [queries[1], distractors[1]])


def test_queries_stand_over_their_exhibits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    counts = count_of(colour_museum(tmp_path / "museum"))
    assert counts["val"]["photographers"] == counts["test"]["photographers"] == 1
    sheet = np.asarray(Image.open("out/samples.jpg")).astype(int)
    step, caption = 230, 30  # a row: margin 6, caption 24, image 200
    middles = [[sheet[caption + row * step + 100, 106 + 206 * column] for column in range(2)] for row in range(4)]
    expected = [
        [(255, 255, 0), (128, 128, 0)],
        [(255, 0, 0), (128, 0, 0)],
        [(0, 255, 0), (255, 255, 255)],
        [(0, 0, 255), (255, 255, 255)],
    ]
    assert np.abs(np.array(middles) - np.array(expected)).max() < 12
    captions = sheet[6 + np.arange(4)[:, None] * step + np.arange(20)]
    assert (captions.min(axis=(1, 2, 3)) < 100).all()  # something is written over each row


def test_a_sheet_has_as_many_columns_as_asked_for_and_bad_images_are_left_out_by_name(
    tiny_museum, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tiny_museum / "images/test_other/val0.jpg").write_bytes(b"no image")
    (tiny_museum / "images/test_met/val0.jpg").unlink()
    make_unreachable(tiny_museum)
    count_of(tiny_museum, "--images", 3)
    with Image.open("out/samples.jpg") as sheet:
        assert sheet.size == (6 + 3 * 206, 6 + 3 * 230)
    printed = " ".join(capsys.readouterr().out.split())
    assert "left out of the sheet" in printed and "val0.jpg" in printed.replace(" ", "")


def test_names_of_folders_do_not_steer_the_terminal(tiny_museum, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = tiny_museum / "ground_truth" / "testset.json"
    file.write_text(file.read_text().replace("test_other/", r"a\u001b[31m/"))
    count_of(tiny_museum)
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "a\N{REPLACEMENT CHARACTER}[31m" in printed


def test_bars_never_get_narrower_and_hold_every_size():
    for largest in (1, 2, 10, 40, 41, 900):
        edges = _size_edges(largest)
        assert edges[0] == 0.5 and edges[-1] > largest
        assert (np.diff(edges, 2) >= 0).all() and len(edges) < 60
    assert np.array_equal(_size_edges(3), [0.5, 1.5, 2.5, 3.5])


def test_every_image_is_counted_once(tmp_path):
    root = write_ground_truth(
        tmp_path,
        [{"id": i % 5, "path": f"MET/{i}.jpg"} for i in range(32)] + [{"id": 9, "path": "MET/x.jpg"}],
        [{"path": "a/1.jpg", "MET_id": 1}, {"path": "2.jpg"}, {"path": "3.jpg"}],
        [{"path": "a/4.jpg", "MET_id": 9}, {"path": "b/5.jpg"}, {"path": "b/6.jpg"}, {"path": "met/7.jpg"}],
    )
    counts = count(load_ground_truth(root, "full"))
    assert counts["database"]["class_sizes"] == {"1": 1, "2-3": 0, "4-10": 5, "11+": 0}
    assert sum(counts["database"]["class_sizes"].values()) == counts["database"]["exhibits"]
    for split in ("val", "test"):
        assert sum(counts[split]["kinds"].values()) == counts[split]["queries"]
    assert counts["val"]["kinds"] == {"met": 1, "distractor": 2}  # in no folder of their own
    assert counts["test"]["kinds"] == {"met": 1, "b": 2, "distractor": 1}  # the folder's name is no kind


def test_what_cannot_be_described_ends_in_one_line(tiny_museum, capsys):
    for arguments, message in (
        (["nowhere"], "nowhere: no such folder"),
        ([tiny_museum, "--images", 0], "--images 0: choose 1 or more"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["dataset", *map(str, arguments)])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and message in error
