"""A museum with one fault of each kind, audited: each is found, and nothing else."""

import contextlib
import csv
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

import metilr
from metilr.auditing import groups
from metilr.auditing.copies import Likeness
from metilr.auditing.labels import leakage_of
from metilr.auditing.looks import Facts
from metilr.auditing.schema import KINDS, Audit
from metilr.auditing.subject import Found, Subject
from metilr.cli import main
from metilr.data.ground_truth import GroundTruth
from metilr.errors import UserError
from metilr.extraction.descriptors import Descriptors
from metilr.extraction.store import DescriptorStore
from metilr.metrics import gap
from tests.audit.pictures import picture
from tests.audit.test_copies import seen_from_the_side
from tests.browser import browser as browser  # a fixture
from tests.museum import write_ground_truth
from tests.small_runs import evaluate, index

MODEL = ["--backbone", "timm/test_resnet", "--weights", "random", "--accelerator", "cpu", "--num_workers", "0"]
MODEL += ["--scales", "1", "--quiet", "true"]
NEAR = ["--copy_similarity", "0.5", "--copy_neighbours", "2"]
N = 10  # exhibits, of one image each but for what is planted


def write_faulty_museum(root: Path) -> Path:
    """Exhibits 0 to 9 with photos of each in val and in test, and what is wrong below."""
    database, val, test = [], [], []

    def save(image: Image.Image, path: str) -> None:
        file = root / "images" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        image.convert("RGB").save(file, quality=92)

    def add(to: list, image: Image.Image, path: str, label: int | None, **more: object) -> None:
        save(image, path)
        name = "id" if to is database else "MET_id"
        to.append({"path": path, **({} if label is None else {name: label}), **more})

    for i in range(N):
        add(database, picture(i), f"MET/{i}/0.jpg", i)
        photo = seen_from_the_side(picture(i))
        add(val, photo.rotate(5), f"test_met/val{i}.jpg", i, photographer="anna")
        add(test, photo.rotate(-5), f"test_met/test{i}.jpg", i, photographer="zoe")
    for i, split in enumerate((val, test)):
        add(split, picture(100 + i), f"test_other/{100 + i}.jpg", None)
    add(database, picture(0), "MET/0/again.jpg", 0)  # the same bytes: saved alike
    add(database, picture(1).resize((240, 200)), "MET/1/small.jpg", 1)
    add(database, ImageOps.mirror(picture(2)), "MET/3/mirrored.jpg", 3)
    add(database, picture(4).rotate(90, expand=True), "MET/4/turned.jpg", 4)
    for i in (5, 6, 7):
        add(database, picture(200), f"MET/{i}/none.jpg", i)
    add(test, picture(8).resize((300, 250)), "test_met/leak.jpg", 8, photographer="anna")
    add(val, picture(300), "test_other/both.jpg", None)
    add(test, picture(300).crop((20, 20, 360, 300)), "test_other/cropped.jpg", None)
    test[0]["MET_id"], test[1]["MET_id"] = 1, 0
    test.append({"path": "test_other/exhibit.jpg"})
    save(seen_from_the_side(picture(9)).rotate(3), "test_other/exhibit.jpg")
    add(database, Image.new("RGB", (200, 200), (90, 90, 90)), "MET/8/blank.jpg", 8)
    add(database, picture(400).resize((50, 40)), "MET/8/tiny.jpg", 8)
    add(database, picture(401).point(lambda level: level // 7), "MET/8/dark.jpg", 8)
    add(database, picture(402, 600, 100), "MET/8/long.jpg", 8)
    uniform = Image.new("RGB", (300, 300), (200, 200, 200))
    uniform.paste(picture(403).resize((50, 50)), (20, 20))
    add(database, uniform, "MET/8/uniform.jpg", 8)
    add(database, picture(404), "MET/8/broken.jpg", 8)
    (root / "images" / "MET/8/broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no image")
    return write_ground_truth(root, database, val, test, database)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory) -> Path:
    return write_faulty_museum(tmp_path_factory.mktemp("faulty") / "museum")


@pytest.fixture(scope="module")
def made(faulty) -> Path:
    """The folder that the command writes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(faulty.parent)
        with pytest.raises(SystemExit) as stop:
            main(["audit", str(faulty), *MODEL, *NEAR, "--output", "out"])
    assert stop.value.code == 1
    return faulty.parent / "out"


@pytest.fixture(scope="module")
def found(made) -> Audit:
    return Audit.model_validate_json((made / "audit.json").read_text())


def test_each_copy_is_found_and_said_how(found):
    assert sorted((copies.kind, copies.same, *(image.path for image in copies.images)) for copies in found.copies) == [
        ("duplicate", "bytes", "MET/0/0.jpg", "MET/0/again.jpg"),
        ("duplicate", "picture", "MET/1/0.jpg", "MET/1/small.jpg"),
        ("duplicate", "picture", "MET/4/0.jpg", "MET/4/turned.jpg"),
        ("leak", "picture", "MET/8/0.jpg", "test_met/leak.jpg"),
        ("leak", "picture", "test_other/both.jpg", "test_other/cropped.jpg"),
        ("placeholder", "bytes", "MET/5/none.jpg", "MET/6/none.jpg", "MET/7/none.jpg"),
        ("two_exhibits", "picture", "MET/2/0.jpg", "MET/3/mirrored.jpg"),
    ]
    of = {image.path: image for copies in found.copies for image in copies.images}
    assert of["MET/3/mirrored.jpg"].mirrored and of["MET/4/turned.jpg"].quarter_turns == 1
    assert sum(image.mirrored or image.quarter_turns > 0 for image in of.values()) == 2


def test_each_doubt_is_found(found):
    looks = {(look.kind, look.image.path) for look in found.looks}
    assert looks == {
        *((kind, f"MET/8/{kind}.jpg") for kind in ("blank", "tiny", "dark", "uniform")),
        ("shape", "MET/8/long.jpg"),
        ("unreadable", "MET/8/broken.jpg"),
        ("turned", "MET/4/turned.jpg"),
    }
    labels = {(doubt.kind, doubt.image.path, doubt.seen) for doubt in found.labels if doubt.kind != "unlike"}
    assert labels == {
        ("label", "test_met/test0.jpg", "0"),
        ("label", "test_met/test1.jpg", "1"),
        ("unlabelled", "test_other/exhibit.jpg", "9"),
    }
    assert found.counts["photographer"] == 1 and found.photographers == ["anna"]
    assert found.errors == {"leak": 2, "two_exhibits": 1, "placeholder": 1, "unreadable": 1}
    assert found.single_image == 2  # exhibits 2 and 9
    confused = {each.exhibit: each for each in found.coverage}
    assert {"2", "5", "6", "7"} <= confused.keys() and confused["2"].nearest_exhibit == "3"


def test_what_leaks_are_worth(found):
    leak = found.leakage["test"]
    assert leak.n_leaked == 2 and found.leakage["val"].n_leaked == 1
    assert leak.difference is not None and leak.without is not None
    value, low, high = leak.difference["gap"]
    assert value == pytest.approx(leak.with_leaked.gap - leak.without.gap) and low <= high


def test_figures_without_leaks_are_those_of_the_other_queries():
    rng = np.random.default_rng(0)
    target = np.array([0, 1, 2, 3, -1, -1, 4, 5])
    case = (rng.random(8), np.array([0, 1, 9, 3, 2, 2, 4, 9]), target)
    is_leaked = np.array([True, False, False, True, True, False, False, False])
    leak = leakage_of(case, is_leaked)
    assert leak.with_leaked.gap == pytest.approx(gap(*case))
    assert leak.without.gap == pytest.approx(gap(*(each[~is_leaked] for each in case)))
    assert leakage_of(case, np.zeros(8, bool)).difference is None
    assert leakage_of(case, target >= 0).without is None


def test_lists_and_page_hold_it(made, found):
    with (made / "copies.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == sum(len(copies.images) for copies in found.copies)
    for name in ("labels", "images", "coverage"):
        assert (made / f"{name}.csv").read_text().count("\n") > 1
    page = (made / "audit.html").read_text()
    assert all(f"<h3>{kind}: {n}</h3>" in page for kind, n in found.counts.items() if n and kind != "photographer")
    assert len(list((made / "pictures").iterdir())) > 20


@pytest.mark.parametrize("width", [360, 1400])
def test_the_page_is_filtered_and_fits_the_window(made, found, browser, width):
    page = browser.new_page(viewport={"width": width, "height": 800})
    errors = []
    page.on("pageerror", lambda error: errors.append(error))
    page.goto((made / "audit.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    shown = "section.kind:not([hidden]) li.card:not([hidden])"
    n_all = page.locator(shown).count()
    assert page.locator("#count").inner_text() == f"{n_all} shown" and n_all > 10
    page.select_option("#kind", "leak")
    assert page.locator(shown).count() == 2
    page.fill("#text", "leak.jpg")
    assert page.locator(shown).count() == 1 and page.locator("#count").inner_text() == "1 shown"
    pictures = page.locator(f"{shown} img")
    assert pictures.count() == 2 and pictures.first.evaluate("image => image.naturalWidth") > 0
    assert not errors
    page.close()


def test_an_interrupted_audit_continues_and_says_the_same(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    database = [{"path": f"MET/{i}/0.jpg", "id": i} for i in range(4)]
    photos = {split: [{"path": f"test_met/{split}{i}.jpg", "MET_id": i} for i in range(2)] for split in ("val", "test")}
    for row in [*database, *photos["val"], *photos["test"]]:
        file = tmp_path / "museum/images" / row["path"]
        file.parent.mkdir(parents=True, exist_ok=True)
        of = row.get("id", row.get("MET_id"))
        picture(of).resize((360 - 40 * ("MET_id" in row), 300)).save(file)
    root = write_ground_truth(tmp_path / "museum", database, photos["val"], photos["test"], database)
    compared, likeness = [], groups.likeness

    def audited(output: str, compare) -> dict:
        monkeypatch.setattr(groups, "likeness", compare)
        with pytest.raises(SystemExit):
            main(["audit", str(root), *MODEL, "--copy_similarity", "0.3", "--output", output])
        file = Path(output) / "audit.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def interrupted(*pair):
        if len(compared) == 4:
            raise KeyboardInterrupt
        return noted(*pair)

    def noted(*pair):
        compared.append(pair)
        return likeness(*pair)

    assert audited("out", interrupted) == {} and len(compared) == 4
    continued, n_compared = audited("out", noted), len(compared)
    assert continued["counts"]["leak"] == 2  # each a photo in val, one in test and their exhibit
    assert audited("whole", noted) == continued and len(compared) == 2 * n_compared > 8


def test_a_line_that_a_kill_cut_off_is_found_anew(tmp_path):
    found = Found(tmp_path / "a.jsonl")
    found.add("1", [1])
    found.add("2", [2])
    file = tmp_path / "a.jsonl"
    file.write_text(file.read_text()[:-3])
    again = Found(file)
    assert again.known == {"1": [1]}
    again.add("2", [2])
    assert Found(file).known == {"1": [1], "2": [2]}


def test_what_changes_is_looked_at_again_and_what_is_gone_is_no_copy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(4):
        (tmp_path / f"museum/{i}").mkdir(parents=True)
        picture(i).save(tmp_path / f"museum/{i}/0.jpg")
    picture(0).resize((240, 200)).save(tmp_path / "museum/1/1.jpg")
    model = {"backbone": "timm/test_resnet", "weights": "random", "accelerator": "cpu", "num_workers": 0}
    index(tmp_path / "museum", tmp_path / "INDEX", quiet=True, **model)
    audit = partial(metilr.audit, tmp_path / "INDEX", output=tmp_path / "out")
    assert audit(copies=groups.CopyOptions(copy_similarity=0.3)).counts["two_exhibits"] == 1
    few = audit(copies=groups.CopyOptions(copy_similarity=0.3, copy_neighbours=1))
    many = audit(copies=groups.CopyOptions(copy_similarity=0.3, copy_neighbours=4))
    assert few.thresholds[0].pairs <= many.thresholds[0].pairs == 1
    picture(77).save(tmp_path / "museum/1/1.jpg")
    assert audit(copies=groups.CopyOptions(copy_similarity=0.3)).counts["two_exhibits"] == 0
    for file in (tmp_path / "museum").rglob("*.jpg"):
        file.unlink()
    found = audit()
    assert found.counts["unreadable"] == 5 and not found.copies
    for place, said in (
        (tmp_path / "museum", "holds other files"),
        (tmp_path / "out/copies.csv", "is a file; name a f"),
    ):
        (place / "0/a" if place.is_dir() else place).touch()
        with pytest.raises(UserError, match=said):
            audit(output=place)


def test_one_database_image_is_refused_in_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    queries = []
    for i, entry in enumerate([{"id": 1}, {"MET_id": 1}, {}, {"MET_id": 1}, {}]):
        queries.append({"path": f"{i}.jpg", **entry})
        (tmp_path / "museum/images").mkdir(parents=True, exist_ok=True)
        picture(i, 120, 100).save(tmp_path / f"museum/images/{i}.jpg")
    write_ground_truth(tmp_path / "museum", queries[:1], queries[1:3], queries[3:])
    with pytest.raises(SystemExit) as stop:
        main(["audit", "museum", *MODEL])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "museum: has one database image, and so nothing to compare" in error


def test_a_data_root_is_described_at_the_size_that_a_checkpoint_was_trained_with(tiny_museum, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = {"backbone": "timm/test_resnet", "weights": "random", "accelerator": "cpu", "num_workers": 0}
    evaluate(tiny_museum, output=Path("run"), store=Path("store"), image_size=48, report=False, **model)
    main(["pack", "run", "model.ckpt"])
    with contextlib.suppress(SystemExit):  # of what the audit finds
        main(["audit", str(tiny_museum), "--ckpt", "model.ckpt", *MODEL[4:], "--copy_neighbours", "1"])
    [store] = Path("runs/descriptors").iterdir()
    assert DescriptorStore(store).manifest().settings["image_size"] == 48


def test_a_leak_under_two_exhibits_is_both():
    labels = {"database": np.array([0, 1, 1]), "val": np.array([0]), "test": np.array([-1, 1])}
    paths = {split: tuple(f"{split}{i}" for i in range(len(of))) for split, of in labels.items()}
    truth = GroundTruth(Path("x"), "full", paths, labels, np.arange(2), {})
    subject = Subject("x", truth, ["0", "1"], Descriptors({}, {}, []))
    facts = [Facts(pixels=name, sha256=name) for name in ("a", "b", "c", "a", "d", "e")]
    links = {(0, 1): Likeness(0.95), (0, 3): Likeness(0.99), (4, 5): Likeness(1.0)}
    found = [(copies.kind, images) for copies, images in groups.group(subject, facts, links, 0.9)]
    assert found == [("leak", [0, 1, 3]), ("two_exhibits", [0, 1]), ("two_exhibits", [4, 5])]
    assert groups.leaked(subject, [images for _, images in found]).tolist() == [False, False, False, True, False, False]


def test_an_index_is_audited_as_it_is(faulty, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(faulty / "images" / "MET", tmp_path / "museum")
    shutil.rmtree(tmp_path / "museum" / "8")
    model = {"backbone": "timm/test_resnet", "weights": "random", "accelerator": "cpu", "num_workers": 0}
    index(tmp_path / "museum", tmp_path / "INDEX", quiet=True, **model)
    found = metilr.audit(tmp_path / "INDEX")
    assert found.counts["two_exhibits"] == 1 and found.counts["placeholder"] == 1 and found.counts["duplicate"] == 3
    assert (
        not found.leakage and found.images == {"database": 16} and list((tmp_path / "runs/audits").glob("*/audit.html"))
    )
    main(["audit", "INDEX", "--fail_on", "unreadable"])
    assert "no errors" in capsys.readouterr().out
    for options, said in (
        (["--backbone", "r18_in"], "--backbone has no effect on the index INDEX"),
        (["--copy_score", "2"], "--copy_score 2.0: choose a number above 0, at most 1"),
        (["--fail_on", "leeks"], f"expected a list of one of {', '.join(KINDS)}"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["audit", "INDEX", *options])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and said in error and error.count("\n") == 1
