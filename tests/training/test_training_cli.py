"""What ``metilr train`` says and takes: errors name its own options, classes of one's own are imported by name."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from metilr.cli import run_main
from metilr.training.cli import make_parser
from tests.museum import write_ground_truth
from tests.small_runs import TRAIN


@pytest.fixture(autouse=True)
def place(tiny_museum, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))


def train(*options: object) -> None:
    run_main("metilr.training.cli:train", [*map(str, [*TRAIN[1:], "--data.root", "museum", *options])], "train.py")


def full_disk(monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)


def no_val(monkeypatch):
    Path("museum/ground_truth/valset.json").unlink()


def one_exhibit(monkeypatch):
    entries = [{"id": 9, "path": f"MET/9/{i}.jpg"} for i in (2, 3)]
    write_ground_truth(Path("museum"), entries, [{"path": "test_met/val0.jpg", "MET_id": 9}], None)


def two_equal_images(monkeypatch):
    Path("museum/images/MET/41/4.jpg").write_bytes(Path("museum/images/MET/500/5.jpg").read_bytes())
    entries = [{"id": 41, "path": "MET/41/4.jpg"}, {"id": 500, "path": "MET/500/5.jpg"}]
    write_ground_truth(Path("museum"), entries, [{"path": "test_met/val1.jpg", "MET_id": 41}], None)


LOSSES = "pytorch_metric_learning.losses"
FROZEN = ("--model.freeze_backbone", "true")
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is an NVIDIA GPU")
PARTICULAR = ["--model.backbone", "timm/convnext_atto"]  # its smallest side is 32 px
CACHED = ("--data.cache_views", "true", "--data.n_views", 2)


@pytest.mark.parametrize(
    ("fault", "options", "said"),
    [
        (full_disk, [], "cannot reserve"),
        (no_val, [], "valset.json: no such file"),
        (one_exhibit, [], "--data.pairing syn+neg: negatives need at least two exhibits"),
        (two_equal_images, ["--model.projector_dim", 1], "descriptors are the same"),
        (None, ["--model.projector_dim", 8], "--model.projector_dim 8: 8 database descriptors"),
        (None, ["--model.weights", "none.pth"], "none.pth: no such file"),
        (None, ["--model.bakbone", "x"], "unknown option --model.bakbone"),
        (None, ["--model.backbone", "r19"], "--model.backbone r19: unknown"),
        (None, [*FROZEN, "--model.projector_dim", "null"], "--model.freeze_backbone true: nothing is left"),
        (None, ["--model.lr", "-1"], "--model.lr -1.0: must be"),
        (None, ["--model.loss", f"{LOSSES}.NoSuchLoss"], "has no attribute 'NoSuchLoss'"),
        (None, ["--model.loss", f"{LOSSES}.TripletMarginLoss", "--model.loss.marginn", 3], "marginn"),
        (None, ["--model.loss", f"{LOSSES}.ArcFaceLoss"], "needs num_classes"),
        (None, ["--model.loss", "metilr.training.losses.ContrastiveLoss", "--model.loss.margin", -1], "margin -1.0:"),
        (None, ["--data.pairing", "real"], "data.pairing"),
        (None, ["--data.first_view.scale", "[0.5]"], "scale [0.5]: give two numbers"),
        (None, ["--data.batch_pairs", 0], "--data.batch_pairs 0: must be"),
        (None, ["--data.cache_views", "true"], "--data.cache_views true: needs n_views"),
        (None, [*CACHED], "--data.cache_views true: needs a frozen backbone; give freeze_backbone true"),
        (None, ["--trainer.max_epochs", 0], "--trainer.max_epochs 0: give a number from 1 up"),
        (None, ["--trainer.limit_val_batches", 1], "--trainer.limit_val_batches 1.0: is decided by this command"),
        pytest.param(None, ["--trainer.precision", "16-mixed"], "needs an NVIDIA GPU", marks=NO_GPU),
        (None, ["--trainer.precision", "bf16-true"], "--trainer.precision bf16-true: choose one of 32"),
        (None, ["--trainer.strategy", "dpp"], "strategy='dpp'"),
        (None, ["--seed_everything", "-1"], "--seed_everything -1"),
        (
            None,
            [*PARTICULAR, "--data.second_view.size", 31],
            "second_view.size 31: 31x31 px is too small for timm/conv",
        ),
        (None, [*PARTICULAR, "--data.image_size", 31], "--data.image_size 31: 31x31 px is too small for timm/convnext"),
        (None, PARTICULAR, "MET/70/0.jpg: cannot be described (24x32 px is too small for timm/convnext_atto"),
        (None, ["--config", "none.yaml"], "none.yaml"),
        (None, ["--wandb", "online"], "--wandb online"),
        (None, ["--output", "museum"], "--output museum"),
    ],
)
def test_provoked_faults(monkeypatch, capsys, fault, options, said):
    if fault is not None:
        fault(monkeypatch)
    with pytest.raises(SystemExit) as stop:
        train(*options)
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and line.startswith("train.py: error: ") and said in line, line


def test_help_has_every_option_and_imports_no_library_that_takes_seconds():
    code = "import sys; from metilr.cli import main\ntry: main(['train', '--help'])\nfinally: print(*sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    *text, modules = printed.splitlines()
    assert not {"torch", "torchvision", "timm", "pytorch_lightning", "wandb", "matplotlib", "sklearn"} & set(
        modules.split()
    )
    parser = make_parser("metilr train")
    options = [option for action in parser._actions for option in action.option_strings]
    named = {option for option in options if "trainer" not in option and not option.endswith((".help", "+"))}
    assert named <= set(re.findall(r"--?[\w.]+", "\n".join(text))) | {"--print_config"}


def test_a_file_may_name_a_class_of_one_s_own(tmp_path, monkeypatch):
    """An options file is the user's own: it is trusted as the command line is (SECURITY.md)."""
    Path("own_losses.py").write_text("import pytorch_metric_learning.losses as l\nclass Loss(l.NTXentLoss): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("c.yaml").write_text("model: {loss: {class_path: own_losses.Loss, init_args: {temperature: 0.2}}}")
    train("--config", "c.yaml", "--output", "out")
    assert yaml.safe_load(Path("out/config.yaml").read_text())["model"]["loss"]["class_path"] == "own_losses.Loss"
    assert Path("out/finished").exists()
    del sys.modules["own_losses"]


LIGHTNING = "pytorch_lightning"


@pytest.mark.parametrize(
    ("option", "name", "arguments", "named"),
    [
        ("callbacks", f"{LIGHTNING}.callbacks.ModelCheckpoint", "dirpath: OUT", "dirpath OUT: what"),
        ("callbacks", f"{LIGHTNING}.callbacks.ModelCheckpoint", "dirpath: kept", "dirpath kept: what"),
        ("callbacks", f"{LIGHTNING}.callbacks.ModelCheckpoint", "filename: ../x", "filename ../x: what"),
        ("callbacks", f"{LIGHTNING}.callbacks.ModelCheckpoint", "filename: OUT/x", "filename OUT/x: what"),
        ("callbacks", f"{LIGHTNING}.callbacks.OnExceptionCheckpoint", "dirpath: kept", "dirpath kept: what"),
        ("callbacks", "own.Log", "save_dir: kept", "save_dir kept: what"),
        ("profiler", f"{LIGHTNING}.profilers.SimpleProfiler", "dirpath: kept, filename: x", "dirpath kept: what"),
        ("logger", f"{LIGHTNING}.loggers.CSVLogger", "save_dir: kept", "is decided by this command"),
    ],
)
def test_classes_of_a_file_write_nowhere_else(tmp_path, monkeypatch, capsys, option, name, arguments, named):
    monkeypatch.syspath_prepend(str(tmp_path))
    imports = "from pytorch_lightning.callbacks import Callback"
    Path("own.py").write_text(f"{imports}\nclass Log(Callback):\n  def __init__(self, save_dir: str): pass")
    out = str(tmp_path / "elsewhere")
    built = f"{{class_path: {name}, init_args: {{{arguments.replace('OUT', out)}}}}}"
    Path("c.yaml").write_text(f"trainer: {{{option}: {f'[{built}]' if option == 'callbacks' else built}}}")
    with pytest.raises(SystemExit):
        train("--config", "c.yaml", "--output", "out")
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"--trainer.{option}" in error and named.replace("OUT", out) in error
    assert not Path("out").exists() and not Path("kept").exists() and not Path(out).exists()
    sys.modules.pop("own", None)


def test_a_callback_of_a_file_without_paths_runs():
    stop = (
        f"{{class_path: {LIGHTNING}.callbacks.EarlyStopping, init_args: {{monitor: val/gap, patience: 1, mode: max}}}}"
    )
    best = f"{{class_path: {LIGHTNING}.callbacks.ModelCheckpoint, init_args: {{filename: mine, monitor: val/gap}}}}"
    Path("c.yaml").write_text(f"trainer: {{callbacks: [{stop}, {best}], profiler: simple}}")
    train("--config", "c.yaml", "--output", "out")
    assert Path("out/finished").exists()
    assert [file.parts[0] for file in Path().rglob("mine.ckpt")] == ["out"]


@pytest.mark.parametrize("option", [("--config", "a.yaml"), ("-c", "a.yaml"), ("--config=a.yaml",)])
def test_options_in_a_file_are_read_as_strictly_as_those_of_an_evaluation(capsys, option):
    for text, said in (("output: a\noutput: b\n", "the key 'output' twice"), ("a: &a [1]\nb: *a\n", "it has aliases")):
        Path("a.yaml").write_text(text)
        with pytest.raises(SystemExit):
            train(*option)
        error = capsys.readouterr().err
        assert error.startswith("train.py: error: --config a.yaml: cannot be read as YAML") and said in error
