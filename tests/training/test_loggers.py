"""Where a training logs to: TensorBoard gets what the CSV file gets, W&B only if it is named."""

import csv
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from metilr.cli import run_main
from metilr.errors import UserError
from metilr.training import RunOptions
from tests.small_runs import TRAIN

WITHOUT_WANDB = [part for part in TRAIN[1:] if part not in ("--wandb", "off")]


@pytest.fixture(autouse=True)
def place(tiny_museum, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def train(*options: object) -> None:
    run_main("metilr.training.cli:train", [*map(str, [*WITHOUT_WANDB, "--data.root", "museum", *options])], "train.py")


def records(file: Path) -> Iterator[bytes]:
    """What an event file holds: each record is its length, a checksum, the content and a checksum."""
    content = file.read_bytes()
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        yield content[12 : 12 + length]
        content = content[16 + length :]


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2", reason="needs metilr[tensorboard]")
    found = {}
    for file in sorted(folder.glob("events.*")):
        for record in records(file):
            event = event_pb2.Event.FromString(record)
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
    return found


def written(folder: Path) -> dict[tuple[str, int], float]:
    found = {}
    for file in folder.glob("csv*/metrics.csv"):
        with file.open(newline="") as stream:
            for row in csv.DictReader(stream):
                step = int(row.pop("step"))
                found |= {(name, step): float(value) for name, value in row.items() if value}
    return found


def test_tensorboard_gets_what_the_csv_file_gets_also_of_a_continued_run(monkeypatch):
    pytest.importorskip("tensorboardX", reason="needs metilr[tensorboard]")
    started = []
    monkeypatch.setattr("metilr.training.run.open_wandb", lambda *of: started.append(of))
    monkeypatch.setattr("time.time", lambda: 1.8e9)  # both within one second, which event files are named after
    train("--logger", "tensorboard", "--trainer.max_epochs", 1)
    config = yaml.safe_load(Path("out/config.yaml").read_text())
    assert config["logger"] == ["tensorboard"] and not started
    Path("out/finished").unlink()
    Path("out/config.yaml").write_text(yaml.safe_dump({**config, "trainer": {**config["trainer"], "max_epochs": 2}}))
    train("--logger", "tensorboard", "--trainer.max_epochs", 2)
    ours, theirs = scalars(Path("out/tensorboard")), written(Path("out"))
    assert {"train/loss", "val/gap"} <= {name for name, _ in ours} and {step for _, step in ours} >= {0, 1}
    assert theirs == {key: pytest.approx(ours[key], rel=1e-5) for key in theirs}
    assert len(list(Path("out").glob("csv*"))) == len(list(Path("out/tensorboard").glob("events.*"))) == 2


def test_several_loggers_and_none_beside_the_file(monkeypatch):
    pytest.importorskip("tensorboardX", reason="needs metilr[tensorboard]")
    started = []
    monkeypatch.setattr("metilr.training.run.open_wandb", lambda *of: started.append(of))
    train("--logger", "wandb", "tensorboard", "--trainer.max_epochs", 1)
    assert len(started) == 1 and list(Path("out/tensorboard").glob("events.*"))
    Path("options.yaml").write_text("logger: [csv]\n")
    train("--config", "options.yaml", "--trainer.max_epochs", 1, "--output", "other")
    assert len(started) == 1 and Path("other/csv/metrics.csv").exists() and not Path("other/tensorboard").exists()


def test_loggers_that_are_none_are_refused_in_one_line(monkeypatch, capsys):
    for options, said in (
        (["--logger", "mlflow"], "--logger mlflow: choose one of wandb, tensorboard, csv"),
        (["--logger", "csv", "--wandb", "online"], "--wandb online: has no effect without wandb as logger"),
    ):
        with pytest.raises(SystemExit) as stop:
            train(*options)
        printed = capsys.readouterr().err
        assert stop.value.code == 2 and printed.count("\n") == 1
        assert f"error: {said}" in printed
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"logger tensorboard: is not installed; pip install 'metilr\[tensorboard\]'"):
        RunOptions(logger="tensorboard")
    assert RunOptions(logger="csv").logger == ("csv",)
