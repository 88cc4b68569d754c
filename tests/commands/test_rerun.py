"""``metilr rerun``: from results.json alone to the same figures, or to what differs."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from metilr.cli import main
from metilr.commands.rerun import TOLERANCE
from tests.small_runs import evaluate


@pytest.fixture
def recorded(tiny_museum, tmp_path, monkeypatch) -> Path:
    """The results.json of a run whose folder is gone, seen from another folder."""
    monkeypatch.chdir(tmp_path)
    evaluate(
        root=tiny_museum, backbone="timm/test_resnet", weights="random", scales=[1, 0.5], accelerator="cpu",
        num_workers=0, report=False, store=Path("store"), output=Path("first"), whitening_dim=3, seed=5, quiet=True,
    )  # fmt: skip
    Path("first/results.json").rename("recorded.json")
    shutil.rmtree("first")
    Path("elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "recorded.json"


FIRST_EDITION = Path(__file__).parents[1] / "fixtures" / "first_edition_run"  # of the museum that write_museum draws


def test_a_run_of_the_first_edition_comes_out_again(tiny_museum, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, printed = rerun(capsys, FIRST_EDITION, "--root", tiny_museum, "--output", "again")
    assert status == 0 and "the figures agree" in printed
    for split in ("val", "test"):
        before, now = (
            (folder / "predictions" / f"{split}.csv").read_text() for folder in (FIRST_EDITION, Path("again"))
        )
        ids = [[line.split(",")[:3] for line in text.splitlines()] for text in (before, now)]
        assert ids[0] == ids[1]


def test_a_run_with_an_element_that_was_deleted_is_compared_but_not_repeated(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FIRST_EDITION, "run")
    change(Path("run/results.json"), "elements.dba", 2)
    change(Path("run/results.json"), "options.dba", 2)
    status, printed = rerun(capsys, "run")
    assert status == 2 and "its options are not this version's: dba 2: metilr no longer has this" in printed
    main(["compare", "run", str(FIRST_EDITION), "--output", "compared"])
    assert [run["elements"]["dba"] for run in read_json("compared/comparison.json")["runs"]] == [2, 0]


def read_json(file: str) -> Any:
    return json.loads(Path(file).read_text())


def change(file: Path, where: str, value: object) -> None:
    content = json.loads(file.read_text())
    part = content
    *path, last = where.split(".")
    for key in path:
        part = part[key]
    part[last] = value(part[last]) if callable(value) else value
    file.write_text(json.dumps(content))


def rerun(capsys, *options: object) -> tuple[int, str]:
    """Exit status and all that was printed, in one line."""
    status = 0
    try:
        main(["rerun", *map(str, options), "--quiet"])
    except SystemExit as stop:
        status = int(stop.code or 0)
    printed = capsys.readouterr()
    return status, " ".join((printed.out + printed.err).split())


def test_it_needs_nothing_but_the_file(recorded, capsys):
    status, printed = rerun(capsys, recorded, "--output", "again")
    assert status == 0 and "the figures agree exactly" in printed
    before, now = (json.loads(file.read_text()) for file in (recorded, Path("again/results.json")))
    for part in ("data", "model", "whitening", "knn", "val", "test", "options"):
        differs = {"options": {"wandb": "auto"}, "model": {"store": ""}}.get(part, {})
        assert {**now[part], **differs} == {**before[part], **differs}, part
    comparison = json.loads(Path("again/rerun.json").read_text())
    assert comparison["agree"] == "exactly" and comparison["differences"] == []
    assert Path("again/predictions/test.csv").exists()


def test_images_exchanged_for_others_of_the_same_size_show_in_figures_made_anew_alone(recorded, capsys, tiny_museum):
    """Contents are not recorded: the message says so."""
    for file in (tiny_museum / "images/test_met").glob("test*"):
        size = file.stat().st_size
        Image.new("RGB", (8, 8)).save(file, quality=1)
        file.write_bytes(file.read_bytes().ljust(size, b"\0"))
        assert file.stat().st_size == size
    assert "the figures agree exactly" in rerun(capsys, recorded)[1]
    status, printed = rerun(capsys, recorded, "--describe_again")
    assert status == 1 and "of the images' contents only the files' sizes are recorded" in printed


@pytest.mark.parametrize("figure", ["val.gap", "test.n_met"])
def test_another_figure_than_the_recorded_one_is_exit_status_1(recorded, capsys, figure):
    change(recorded, figure, lambda value: value + 1 if figure.endswith("n_met") else value - 2 * TOLERANCE)
    status, printed = rerun(capsys, recorded, "--output", "again")
    assert status == 1 and "the figures do not agree" in printed and "nothing else that is recorded differs" in printed
    assert json.loads(Path("again/rerun.json").read_text())["agree"] == "not"


def test_within_the_tolerance(recorded, capsys):
    change(recorded, "test.gap", lambda value: value - TOLERANCE / 2)
    change(recorded, "options.store", None)  # a default one, which is found again from another folder
    change(recorded, "model.store", "store")
    change(recorded, "versions.torch", "1.0")
    status, printed = rerun(capsys, recorded.rename(recorded.with_name("results.json")).parent)  # a run's folder
    [folder] = Path("runs").glob("*_rerun")
    assert not (folder / "store").exists() and f"wrote {folder}/rerun.json" in printed
    assert status == 0 and "agree within the tolerance (of 0.1 points)" in printed
    assert 'versions: torch: "1.0" there' in printed


@pytest.mark.parametrize(
    ("where", "value"),
    [("data.fingerprint", "x"), ("knn.tau", 3.0), ("model.made_with", [{"device": "1 x NVIDIA H100"}])],
)  # fmt: skip
def test_what_differs_is_named(recorded, capsys, where, value):
    change(recorded, where, value)
    change(recorded, "val.gap", 0.123)
    status, printed = rerun(capsys, recorded)
    named = {"model.made_with": 'device: ["1 x NVIDIA H100"]'}.get(where, f"{where.split('.')[1]}: {json.dumps(value)}")
    assert status == 1 and f"{named} there, " in printed


def test_images_that_were_exchanged_are_seen(recorded, capsys, tiny_museum):
    """The ground truth's fingerprint is the same."""
    for file in (tiny_museum / "images/test_met").glob("test*"):
        Image.effect_noise((30, 30), 90).convert("RGB").save(file)
    change(recorded, "test.gap", 0.123)
    status, printed = rerun(capsys, recorded)
    assert status == 1 and "image_files: " in printed and "fingerprint" not in printed


def test_a_confidence_that_was_not_calibrated_explains_a_difference(recorded, capsys):
    change(recorded, "options.confidence", "calibrated")
    change(recorded, "test.gap", 0.123)
    status, printed = rerun(capsys, recorded, "--output", "again")
    assert read_json("again/results.json")["confidence"]["is_used"] is False  # too small a museum
    assert status == 1 and "calibrated confidence: null there, false now" in printed
    change(recorded, "confidence", read_json("again/results.json")["confidence"])
    assert "nothing else that is recorded differs" in rerun(capsys, recorded)[1]


def test_data_that_has_moved_or_is_missing(recorded, capsys, tiny_museum):
    moved = tiny_museum.rename(recorded.parent / "moved")
    status, printed = rerun(capsys, recorded)
    assert status == 2 and f"metilr rerun: error: --root {tiny_museum}: no such folder" in printed
    assert not list(Path("runs").glob("*"))
    assert rerun(capsys, recorded, "--root", moved)[0] == 0


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("schema_version", 1, "of schema 1, which does not say how to repeat the run; evaluate again"),
        ("options", None, "does not say how to repeat the run"),
        ("options.k", "many", "its options are not this version's: k"),
        ("test.acc", math.nan, "recorded.json: cannot be read"),
    ],
)
def test_a_file_that_cannot_be_repeated(recorded, capsys, where, value, message):
    change(recorded, where, value)
    status, printed = rerun(capsys, recorded)
    assert status == 2 and message in printed and "Traceback" not in printed


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("kind", ["absent", "another file", "unfinished", "images exchanged", "views missing"])
def test_nothing_is_written_where_the_file_says_the_rows_were(recorded, capsys, tiny_museum, kind):
    """The file may be somebody else's."""
    store = recorded.parent / "store"
    if kind in ("absent", "another file"):
        store = recorded.parent / "named"
        change(recorded, "options.store", str(store))
        change(recorded, "model.store", str(store))
    if kind == "another file":
        store.mkdir()
        (store / "precious").write_text("precious")
    if kind == "unfinished":
        change(store / "manifest.json", "complete", False)
    if kind == "images exchanged":
        for file in (tiny_museum / "images/test_met").glob("test*"):
            Image.effect_noise((30, 30), 90).convert("RGB").save(file)
    if kind == "views missing":
        change(recorded, "options.query_crops", [0.7])
    before = files_of(recorded.parent)
    assert rerun(capsys, recorded, "--output", "again")[0] in (0, 1)
    now = {name: content for name, content in files_of(recorded.parent).items() if "/elsewhere/" not in name}
    assert now == before and list(Path("runs/descriptors").glob("*/database.npy"))
    assert store.exists() == (kind != "absent")


def test_descriptors_of_a_dated_folder_are_kept_and_it_is_said_where(recorded, capsys, monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("metilr.commands.evaluate.recognise", fail)
        main(["rerun", str(recorded), "--describe_again"])
    [folder] = Path("runs").glob("*_rerun")
    assert f"describing into {folder}" in capsys.readouterr().out
    made = (folder / "store/database.npy").stat().st_mtime_ns
    status, printed = rerun(capsys, recorded, "--describe_again", "--output", folder)
    assert status == 0 and "the figures agree exactly" in printed
    assert (folder / "store/database.npy").stat().st_mtime_ns == made


def test_files_that_were_moved(recorded, capsys, tiny_museum):
    evaluate(
        root=tiny_museum, backbone="timm/test_resnet", weights="random", scales=[1, 0.5], accelerator="cpu", seed=5,
        num_workers=0, report=False, store=recorded.parent / "store", output=Path("first"), whitening_dim=3, quiet=True,
    )  # fmt: skip
    Path("first/whitening.npz").rename("then.npz")
    evaluate(
        root=tiny_museum, backbone="timm/test_resnet", weights="random", scales=[1, 0.5], accelerator="cpu", seed=5,
        num_workers=0, report=False, store=recorded.parent / "store", output=Path("second"), whitening="then.npz",
        quiet=True,
    )  # fmt: skip
    Path("then.npz").rename("now.npz")
    status, printed = rerun(capsys, "second")
    assert status == 2 and "no such file" in printed
    status, printed = rerun(capsys, "second", "--whitening", "now.npz")
    assert status == 0 and "the figures agree exactly" in printed
    for option in ("ckpt", "weights"):
        status, printed = rerun(capsys, "second", f"--{option}", "now.npz")
        assert status == 2 and f"--{option} now.npz: the recorded run read no such file (" in printed


def test_no_results_and_an_output_that_holds_some(recorded, capsys):
    assert "not a finished evaluation (no such folder)" in rerun(capsys, "nowhere.json")[1]
    assert rerun(capsys, recorded, "--output", "again")[0] == 0
    assert "holds results already" in rerun(capsys, recorded, "--output", "again")[1]
