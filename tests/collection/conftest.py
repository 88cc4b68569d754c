"""One evaluation and one index that the tests of photos read."""

import shutil
from pathlib import Path

import pytest

from metilr.cli import main
from tests.hostile import NAME, write_hostile_files
from tests.museum import write_museum
from tests.small_runs import evaluate, index

OPTIONS = {"accelerator": "cpu", "num_workers": 0}
UNTRAINED = {"backbone": "timm/test_resnet", "weights": "random", **OPTIONS}
INDEXED = {**UNTRAINED, "image_size": 40}
AS_OPTIONS = [part for name, value in INDEXED.items() for part in (f"--{name}", str(value))]


@pytest.fixture(scope="session")
def museum(tmp_path_factory) -> Path:
    return write_museum(tmp_path_factory.mktemp("identify") / "museum")


@pytest.fixture(scope="session")
def run(museum) -> Path:
    """An evaluation of it, with its store beside it."""
    folder = museum.parent
    evaluate(museum, store=folder / "store", output=folder / "run", wandb="off", report=False, **UNTRAINED)
    return folder / "run"


def write_images(around: Path) -> Path:
    """8 images of 6 exhibits, one sub-folder each, one with HTML in its name."""
    write_museum(around / "met")
    folder = Path(shutil.move(around / "met" / "images" / "MET", around / "museum"))
    return (folder / "70").rename(folder / NAME).parent


@pytest.fixture(scope="session")
def indexed(tmp_path_factory) -> Path:
    """An index of a folder of images, beside the folder."""
    around = tmp_path_factory.mktemp("indexed")
    index(write_images(around), around / "index", **INDEXED)
    return around


@pytest.fixture(scope="session")
def hostile(tmp_path_factory) -> dict[str, Path]:
    return write_hostile_files(tmp_path_factory.mktemp("hostile"))


@pytest.fixture
def failure(capsys):
    """The one line that a command ends in."""

    def call(*args: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(arg) for arg in args])
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and len(lines) == 1
        return lines[0]

    return call
