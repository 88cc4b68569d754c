from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metilr.cli import main
from metilr.commands.dataset import write_contact_sheet
from metilr.errors import UserError


def write_images(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")


def test_contact_sheet_has_a_row_per_image_and_a_column_per_visit(tmp_path):
    write_images(tmp_path / "in" / "deep", 3)
    Image.new("LA", (5, 5), (80, 200)).save(tmp_path / "in" / "grey.png")
    output = write_contact_sheet(tmp_path / "in", tmp_path / "new" / "sheet.png", visits=2)
    first = output.read_bytes()
    with Image.open(output) as sheet:
        assert sheet.size == (6 + 3 * 206, 6 + 4 * 206)
    write_contact_sheet(tmp_path / "in", output, visits=2)
    assert output.read_bytes() == first
    write_contact_sheet(tmp_path / "in", output, visits=2, seed=1)
    assert output.read_bytes() != first
    with Image.open(write_contact_sheet(tmp_path / "in", tmp_path / "two.jpg", visits=1, images=2)) as sheet:
        assert sheet.size == (6 + 2 * 206, 6 + 2 * 206)


def test_images_are_read_as_for_recognition(tmp_path):
    (tmp_path / "in").mkdir()
    clear = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    clear.putpixel((0, 0), (0, 0, 0, 255))  # else nothing of it would show, and it would be refused
    clear.save(tmp_path / "in" / "clear.png")
    Image.fromarray(np.full((20, 20), 40000, np.uint16)).save(tmp_path / "in" / "deep.png")
    Image.new("RGB", (1200, 30), (0, 200, 0)).save(tmp_path / "in" / "wide.png")
    with Image.open(write_contact_sheet(tmp_path / "in", tmp_path / "sheet.png", visits=1)) as sheet:
        middles = [sheet.getpixel((6 + 100, 6 + 206 * row + 100)) for row in range(3)]
    assert middles == [(255, 255, 255), (156, 156, 156), (0, 200, 0)]  # alpha on white, 40000 / 257, shrunk


def test_command_says_what_it_wrote(tmp_path, capsys):
    write_images(tmp_path / "in", 1)
    main(["visits", str(tmp_path / "in"), str(tmp_path / "sheet.png"), "--visits", "1"])
    assert capsys.readouterr().out == f"wrote {tmp_path / 'sheet.png'}\n"
    (tmp_path / "in" / "phone.heic").touch()
    main(["visits", str(tmp_path / "in"), str(tmp_path / "sheet.png"), "--visits", "1"])
    assert capsys.readouterr().out == f"wrote {tmp_path / 'sheet.png'}; left aside: 1 .heic\n"


def test_contact_sheet_mistakes_are_one_line_that_names_the_cause(tmp_path):
    write_images(tmp_path / "images", 1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "bad.jpg").write_bytes(b"no image")
    good, sheet = tmp_path / "images", tmp_path / "sheet.png"
    mistakes = [
        (dict(folder=tmp_path / "missing", output=sheet), "missing"),
        (dict(folder=tmp_path / "empty", output=sheet), "empty"),
        (
            dict(folder=tmp_path / "broken", output=sheet),
            r"bad\.jpg: cannot be decoded \(not an image\); .* out of .*broken$",
        ),
        (dict(folder=good, output=sheet, visits=0), "visits 0"),
        (dict(folder=good, output=sheet, seed=-1), "seed -1"),
        (dict(folder=good, output=tmp_path / "sheet.gif"), r"sheet\.gif"),
    ]
    for arguments, named in mistakes:
        with pytest.raises(UserError, match=named) as caught:
            write_contact_sheet(**arguments)
        assert "\n" not in str(caught.value)
    assert not sheet.exists()
