"""Classes that an options file names: none is imported that the user has not named himself, or that could do harm."""

import sys
from pathlib import Path

import pytest
import yaml
from jsonargparse import _common

from metilr.cli import run_main
from tests.small_runs import TRAIN

PML = "pytorch_metric_learning"
PROCESS = "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler.SubprocessHandler"
NO_DATA = ["--data.root", "nowhere", "--model.weights", "random"]  # what is not refused ends soon
STARTS = {"entrypoint": "touch", "args": ["ran"], "env": {}, "stdout": None, "stderr": None, "local_rank_id": 0}


@pytest.fixture(autouse=True)
def own_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    (tmp_path / "modules/own_parts").mkdir(parents=True)
    (tmp_path / "modules/own_parts/__init__.py").write_text(
        "from pathlib import Path\nPath('ran').touch()\nfrom own_parts.defined import Loss\n"
    )
    (tmp_path / "modules/own_parts/defined.py").write_text(
        "from pytorch_metric_learning.losses import NTXentLoss\nclass Loss(NTXentLoss):\n    pass\n"
    )
    yield
    for name in [name for name in sys.modules if name.startswith("own_parts")]:
        del sys.modules[name]


def with_loss(**init_args):
    return {"model": {"loss": {"class_path": f"{PML}.losses.NTXentLoss", "init_args": init_args}}}


def train(capsys, *options: object) -> str:
    """The error that a command line ends in; empty if there is none."""
    capsys.readouterr()
    try:
        run_main("metilr.training.cli:train", [str(option) for option in options], prog="train.py")
    except SystemExit as stop:
        error = capsys.readouterr().err
        assert stop.code == 2 and error.count("\n") == 1, error
        return error
    return ""


@pytest.mark.parametrize(
    ("options", "key", "option"),
    [
        ({"model": {"loss": "own_parts.Loss"}}, "model.loss", "model.loss"),
        ({"model": {"loss": {"class_path": "own_parts.Loss"}}}, "model.loss.class_path", "model.loss"),
        ({"trainer": {"callbacks": ["own_parts.Loss"]}}, "trainer.callbacks.0", "trainer.callbacks"),
        ({"trainer": {"callbacks": [{"class_path": "own_parts.Loss"}]}}, "trainer.callbacks.0.class_path",
         "trainer.callbacks"),
        ({"trainer": {"strategy": {"class_path": "own_parts.Loss"}}}, "trainer.strategy.class_path",
         "trainer.strategy"),
        ({"data": {"first_view": "own_parts.Loss"}}, "data.first_view", "data.first_view"),
        (with_loss(distance={"class_path": "own_parts.Loss"}), "model.loss.init_args.distance.class_path",
         "model.loss.distance"),
    ],
)  # fmt: skip
def test_a_class_that_a_file_names_is_refused_by_file_key_and_value(capsys, options, key, option):
    Path("c.yaml").write_text(yaml.safe_dump(options))
    error = train(capsys, "--config", "c.yaml", *NO_DATA)
    assert f"error: c.yaml: {key}: a file may not name the class own_parts.Loss" in error
    assert f"on the command line: --{option} own_parts.Loss" in error
    assert not Path("ran").exists() and "own_parts" not in sys.modules


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (with_loss(distance={"class_path": PROCESS, "init_args": STARTS}), PROCESS),
        (with_loss(distance={"class_path": "metilr.files.write_atomically", "init_args": {"file": "ran", "text": "x"}}),
         "metilr.files.write_atomically"),
        (with_loss(distance={"class_path": "torch.nn.modules.module.os.system", "init_args": {"command": "touch ran"}}),
         "torch.nn.modules.module.os.system"),
    ],
)  # fmt: skip
def test_what_starts_programs_or_writes_files_is_of_no_trusted_package(capsys, options, named):
    Path("c.yaml").write_text(yaml.safe_dump(options))
    assert named in train(capsys, "--config", "c.yaml", *NO_DATA) and not Path("ran").exists()


def test_a_strategy_s_bare_name_is_a_word_and_not_imported(capsys):
    Path("c.yaml").write_text("trainer: {strategy: own_parts.Loss}")
    assert train(capsys, "--config", "c.yaml", *NO_DATA) and not Path("ran").exists()


@pytest.mark.parametrize("how", ["--config a.yaml", "-ca.yaml", "--model b.yaml", "--model.loss c.yaml"])
def test_files_that_files_or_other_options_name(capsys, how):
    Path("a.yaml").write_text("model: b.yaml")
    Path("b.yaml").write_text("loss: c.yaml")
    Path("c.yaml").write_text("class_path: own_parts.Loss")
    error = train(capsys, *how.split(), *NO_DATA)
    assert "c.yaml: class_path: a file may not name the class own_parts.Loss" in error
    assert "--model.loss own_parts.Loss" in error and not Path("ran").exists()


def test_a_file_has_no_config_key(capsys):
    Path("a.yaml").write_text("config: b.yaml")
    assert "--config a.yaml: config: is no option of a file" in train(capsys, "--config", "a.yaml")


def test_the_command_line_names_what_it_likes_and_its_run_is_continued_by_naming_it_again(tiny_museum, capsys):
    before = dict(_common.parsing_settings)
    command = [*TRAIN[1:], "--data.root", tiny_museum, "--trainer.max_epochs", 1, "--output", "out"]
    assert train(capsys, *command, "--model.loss", "own_parts.Loss", "--model.loss.temperature", 0.1) == ""
    assert Path("ran").exists()
    again = ["--config", "out/config.yaml", "--output", "out"]
    Path("out/finished").unlink()
    assert "--model.loss own_parts.Loss" in train(capsys, *again)
    assert train(capsys, *again, "--model.loss", "own_parts.Loss") == "" and Path("out/finished").exists()
    assert _common.parsing_settings == before


def test_what_is_trusted_may_be_named_with_and_without_its_module(tiny_museum, capsys):
    options = with_loss(temperature=0.2, distance={"class_path": f"{PML}.distances.LpDistance"})
    options["trainer"] = {
        "callbacks": [{"class_path": "ModelSummary"}, {"class_path": "pytorch_lightning.callbacks.ModelSummary"}]
    }
    options["data"] = {"first_view": {"class_path": "RandomCrop", "init_args": {"size": 32}}}
    Path("c.yaml").write_text(yaml.safe_dump(options))
    command = [*TRAIN[1:], "--data.root", tiny_museum, "--trainer.max_epochs", 1, "--output", "out"]
    assert train(capsys, *command, "--config", "c.yaml") == ""
    loss = yaml.safe_load(Path("out/config.yaml").read_text())["model"]["loss"]
    assert loss["init_args"]["distance"]["class_path"] == f"{PML}.distances.LpDistance"
