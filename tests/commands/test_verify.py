import contextlib
import csv
import json
import re
import shutil
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from metilr.cli import main
from metilr.commands.verify import check, find_fault
from tests.hostile import write_hostile_files
from tests.museum import DATABASE_IDS, MINI, make_unreachable

FULL = [f"MET/{id_}/{i}.jpg" for i, id_ in enumerate(DATABASE_IDS)]
VAL = [f"test_met/val{i}.jpg" for i in range(4)] + [f"test_other/val{i}.jpg" for i in range(3)]


def verify(capsys, *arguments: object) -> tuple[int, str]:
    """Run the command; returns its exit status and what it printed."""
    try:
        main(["verify", *map(str, arguments)])
        status = 0
    except SystemExit as end:
        status = int(str(end.code))
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return status, captured.out + captured.err


def row(printed: str, part: str) -> list[int]:
    """Images, fine, missing, empty and unreadable ones of a part."""
    [line] = [line for line in printed.splitlines() if re.match(rf"│ {part} ", line)]
    return [int(n.replace(",", "")) for n in re.findall(r"[\d,]+", line.removeprefix(f"│ {part} "))]


@pytest.mark.parametrize("options", [(), ("--decode", "--num_workers", 0, "--quiet")])
def test_a_whole_museum(tiny_museum, capsys, options):
    status, printed = verify(capsys, tiny_museum, *options)
    assert status == 0 and "nothing is wrong" in printed
    assert row(printed, "full") == [8, 8, 0, 0, 0] and row(printed, "mini") == [6, 6, 0, 0, 0]
    assert row(printed, "val") == row(printed, "test") == [7, 7, 0, 0, 0]


def damage(museum: Path) -> dict[str, str]:
    """Break some images; returns what a whole decoding says of each."""
    images, hostile = museum / "images", write_hostile_files(museum / "hostile")
    (images / FULL[0]).unlink()
    (images / VAL[1]).write_bytes(b"")
    shutil.copy(hostile["text"], images / VAL[2])
    shutil.copy(hostile["truncated"], images / FULL[7])
    shutil.rmtree(images / "MET" / "41")
    (images / "MET" / "41").write_text("a file where a folder should be")
    return {
        FULL[0]: "missing", FULL[4]: "missing", VAL[1]: "empty", VAL[2]: "not an image", FULL[7]: "truncated",
    }  # fmt: skip


def test_one_image_is_singular_in_every_command(tiny_museum, tmp_path, capsys):
    plural = re.compile(r"(?<![\d,.] )\b1 ([a-z]+ )?(images|files|rows|exhibits|queries|photos|answers|dimensions)\b")
    for name in ("a/1.png", "b/1.png", "c/1.png"):
        (tmp_path / "folder" / name).parent.mkdir(parents=True)
        Image.new("RGB", (40, 40), "maroon" if name == "a/1.png" else "teal").save(tmp_path / "folder" / name)
    for file in (tiny_museum / "images" / FULL[0], tmp_path / "folder/c/1.png"):
        file.write_bytes(b"")
    small = ["--backbone", "timm/test_resnet", "--weights", "random", "--accelerator", "cpu", "--num_workers", "0"]
    index, museum = ["index", str(tmp_path / "folder"), str(tmp_path / "index"), *small], ["--root", str(tiny_museum)]
    place = ["--report", "false", "--wandb", "off", "--output", str(tmp_path / "out"), "--store", str(tmp_path / "s")]
    for command, said in (
        (["verify", str(tiny_museum)], "1 image is wrong"),
        (index, "1 image file is missing or empty (database 1)"),
        ([*index, "--bad_images", "skip"], "left out: 1 image:"),
        (["evaluate", *museum, *small, *place], "1 image file is missing or empty (database 1)"),
        (["evaluate", *museum, *small, *place, "--bad_images", "skip", "--whitening_dim", "2"], "1 of 8 in database"),
        (["export-descriptors", str(tmp_path / "s"), str(tmp_path / "d.pkl")], "1 image was left out"),
    ):
        with contextlib.suppress(SystemExit):
            main(command)
        printed = " ".join("".join(capsys.readouterr()).split())
        assert said in printed and not plural.search(printed), command[0]


def test_everything_that_is_wrong_is_found_and_listed(tiny_museum, tmp_path, capsys):
    wrong = damage(tiny_museum)
    listed = tmp_path / "wrong.csv"
    status, printed = verify(capsys, tiny_museum, "--decode", "true", "--list", listed, "--num_workers", 2)
    assert status == 1 and f"{len(wrong)} images are wrong" in printed
    assert row(printed, "full") == [8, 5, 2, 0, 1] and row(printed, "mini") == [6, 4, 2, 0, 0]
    assert row(printed, "val") == [7, 5, 0, 1, 1] and row(printed, "test") == [7, 7, 0, 0, 0]
    for path, reason in wrong.items():
        assert f"  {path}: " in printed and reason in printed
    with listed.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(entry["part"], entry["path"]) for entry in rows} == {
        *(("full", path) for path in (FULL[0], FULL[4], FULL[7])),
        *(("mini", path) for path in (FULL[0], FULL[4])),
        *(("val", path) for path in VAL[1:3]),
    }
    assert all(wrong[entry["path"]] in entry["reason"] for entry in rows)


@pytest.mark.parametrize("decode", ["false", "true"])
def test_names_under_which_no_file_can_be_had_are_listed(tiny_museum, capsys, decode):
    unreachable = make_unreachable(tiny_museum)
    status, printed = verify(capsys, tiny_museum, "--decode", decode, "--num_workers", 0)
    assert status == 1 and row(printed, "test") == [7, 5, 2, 0, 0]
    assert all(f"  {path}: missing" in printed for path in unreachable)


def test_a_file_is_found_by_its_name_in_another_unicode_form(tiny_museum, capsys):
    here, there = (unicodedata.normalize(form, "Musée/é.jpg") for form in ("NFC", "NFD"))
    (tiny_museum / "images" / there).parent.mkdir()
    (tiny_museum / "images" / FULL[7]).rename(tiny_museum / "images" / there)
    file = tiny_museum / "ground_truth" / "MET_database.json"
    file.write_text(
        json.dumps([{**each, "path": each["path"].replace(FULL[7], here)} for each in json.loads(file.read_text())])
    )
    status, printed = verify(capsys, tiny_museum)
    assert status == 0 and row(printed, "full") == [8, 8, 0, 0, 0]


def test_the_list_runs_no_formula(tiny_museum, tmp_path, capsys):
    file = tiny_museum / "ground_truth" / "testset.json"
    file.write_text(file.read_text().replace("test_met/test1.jpg", "=1+1.jpg"))
    verify(capsys, tiny_museum, "--list", tmp_path / "all.csv")
    assert (tmp_path / "all.csv").read_text() == "part,path,reason\ntest,'=1+1.jpg,missing\n"


def test_a_path_does_not_steer_the_terminal(tiny_museum, capsys):
    file = tiny_museum / "ground_truth" / "testset.json"
    file.write_text(file.read_text().replace("test_met/test1.jpg", r"test_met/\u001b[31m.jpg"))
    status, printed = verify(capsys, tiny_museum)
    assert status == 1 and "\x1b" not in printed and "test_met/\N{REPLACEMENT CHARACTER}[31m.jpg: missing" in printed


def test_headers_alone_do_not_show_what_is_cut_off(tiny_museum, capsys):
    damage(tiny_museum)
    status, printed = verify(capsys, tiny_museum)
    assert status == 1 and "4 images are wrong" in printed and FULL[7] not in printed


def test_some_are_printed_and_the_file_has_all(tiny_museum, tmp_path, capsys):
    shutil.rmtree(tiny_museum / "images" / "test_met")  # val's and test's
    for i in range(3):
        (tiny_museum / f"images/test_other/val{i}.jpg").unlink()  # then none of val's is there
    status, printed = verify(capsys, tiny_museum)
    assert status == 1 and "and 1 more; --list FILE writes all" in printed
    assert printed.count(": missing") == 10
    status, printed = verify(capsys, tiny_museum, "--list", tmp_path / "all.csv")
    assert len((tmp_path / "all.csv").read_text().splitlines()) == 12 and "all.csv" in printed.replace("\n", "")


def test_what_is_verified_follows_what_is_there_and_is_said(tiny_museum, capsys):
    for path in FULL[MINI:]:
        (tiny_museum / "images" / path).unlink()
    status, printed = verify(capsys, tiny_museum)
    assert status == 0 and row(printed, "mini") == [6, 6, 0, 0, 0]
    assert "full: not verified, MET_database.json is there and none of its own images" in printed
    status, printed = verify(capsys, tiny_museum, "--parts", "full", "val")
    assert status == 1 and row(printed, "full") == [8, 6, 2, 0, 0] and not re.search("│ (mini|test) ", printed)

    shutil.rmtree(tiny_museum / "images" / "MET")
    status, printed = verify(capsys, tiny_museum)
    assert status == 0 and "mini: not verified" in printed and "full: not verified" in printed
    assert row(printed, "val") == [7, 7, 0, 0, 0]


@pytest.mark.parametrize(("gone", "kept"), [("mini_MET_database", "full"), ("MET_database", "mini")])
def test_one_database_alone(tiny_museum, capsys, gone, kept):
    (tiny_museum / "ground_truth" / f"{gone}.json").unlink()
    status, printed = verify(capsys, tiny_museum)
    assert status == 0 and row(printed, kept)[0] == row(printed, kept)[1] > 0 and row(printed, "val")
    assert verify(capsys, tiny_museum, "--parts", "test")[0] == 0


def test_the_published_files_without_images(met_root, capsys):
    status, printed = verify(capsys, met_root)
    assert status == 2 and re.search(r"images: none of the images that .*ground_truth names is there", printed)
    assert len(printed.splitlines()) == 1
    found = check(met_root, ["test"], quiet=True)
    assert len(found.faults) == 19_319 and set(found.faults.values()) == {"missing"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["DIR", "--parts", "fall"], "--parts"),
        (["DIR", "--list", "nowhere/x.csv"], "--list nowhere/x.csv: there is no folder nowhere"),
        ([], "root"),
    ],
)
def test_mistakes_are_named(tiny_museum, tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    status, printed = verify(capsys, *(tiny_museum if each == "DIR" else each for each in arguments))
    assert status == 2 and printed.startswith("metilr verify: error: ") and said in printed


def test_a_failing_disk_is_not_taken_for_a_bad_image(tiny_museum, monkeypatch):
    def failing(path: Path, limit: int | None = None) -> None:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr("metilr.commands.verify.image_shape", failing)
    with pytest.raises(OSError, match="Input/output"):
        check(tiny_museum, quiet=True)


def test_every_kind_of_bad_file_has_a_reason(tmp_path):
    for kind, file in write_hostile_files(tmp_path).items():
        if kind not in ("large", "program"):  # what a photo from elsewhere may not be; a database image may be large
            assert find_fault(file, decode=True), kind


def test_images_that_are_too_small_for_a_model_are_wrong_if_it_is_named(tiny_museum, capsys):
    Image.new("RGB", (96, 63)).save(tiny_museum / "images" / VAL[0])
    options = ("--backbone", "timm/convnext_atto", "--image_size", 96)  # all others have 3:4 or more
    for decode in ("false", "true"):
        status, printed = verify(capsys, tiny_museum, *options, "--decode", decode)
        assert status == 1 and row(printed, "val") == [7, 6, 0, 0, 1] and row(printed, "full") == [8, 8, 0, 0, 0]
        assert f"  {VAL[0]}: 63x96 px is too small for timm/convnext_atto: it needs sides of 64 px or more" in printed
    for enough in (("--scales", 1, 0.6), ("--image_shape", "square"), ("--image_shape", "square", "--decode", "true")):
        status, printed = verify(capsys, tiny_museum, *options, *enough)
        assert status == 0 and "nothing is wrong" in printed
    status, printed = verify(capsys, tiny_museum, "--backbone", "timm/convnext_atto")
    assert status == 1 and row(printed, "full") == [8, 0, 0, 0, 8]
    for option, said in (
        (("--image_size", 96), "--image_size has no effect without backbone"),
        (("--image_shape", "square"), "--image_shape square: needs image_size, such as 512"),
        (("--scales", 1), "--scales has no effect without backbone"),
        ((*options, "--image_size", 60), "--image_size 60: 60x60 px is too small for timm/convnext_atto"),
        (("--backbone", "convnext_atto"), "--backbone convnext_atto: unknown; did you mean timm/convnext_atto?"),
    ):
        status, printed = verify(capsys, tiny_museum, *option)
        assert status == 2 and said in printed
