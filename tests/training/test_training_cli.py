"""What ``metilr train`` says and takes: errors name its own options, classes of one's own are imported by name."""

import errno
import json
import os
import sys
from pathlib import Path

import pytest
import torch
import yaml

from metilr.cli import run_main
from metilr.extraction.module import DescriptorModule
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


def all_zero(monkeypatch):
    def zeros(module, images):
        return torch.zeros(len(images), module.embedder.dim)

    monkeypatch.setattr(DescriptorModule, "describe", zeros)


def unwritable_views(monkeypatch):
    Path("runs").mkdir()
    Path("runs/views").write_text("a file")


def other_weights(monkeypatch):
    torch.save({"a": torch.zeros(1)}, "other.pth")


def image_gone(monkeypatch):
    Path("museum/images/MET/41/4.jpg").unlink()


def two_equal_images(monkeypatch):
    Path("museum/images/MET/41/4.jpg").write_bytes(Path("museum/images/MET/500/5.jpg").read_bytes())
    entries = [{"id": 41, "path": "MET/41/4.jpg"}, {"id": 500, "path": "MET/500/5.jpg"}]
    Path("museum/ground_truth/MET_database.json").write_text(json.dumps(entries))
    Path("museum/ground_truth/valset.json").write_text(json.dumps([{"path": "test_met/val1.jpg", "MET_id": 41}]))


def no_fault(monkeypatch):
    pass


LOSSES = "pytorch_metric_learning.losses"
FROZEN = ("--model.freeze_backbone", "true", "--model.projector_dim", 4)


@pytest.mark.parametrize(
    ("fault", "options", "said"),
    [
        (full_disk, [], "cannot reserve"),
        (all_zero, [], "precision 32, or another"),
        (unwritable_views, [*FROZEN, "--data.cache_views", "true", "--data.n_views", 2], "runs/views"),
        (other_weights, ["--model.weights", "other.pth"], "other.pth"),
        (image_gone, [], "bad_images skip"),
        (two_equal_images, ["--model.projector_dim", 1], "descriptors are the same"),
        (no_fault, ["--model.projector_dim", 8], "projector_dim 8: 8 database descriptors"),
        (no_fault, ["--model.weights", "none.pth"], "none.pth: no such file"),
        (no_fault, ["--model.stage", 9], "--model.stage 9"),
        (no_fault, ["--model.pooling", "cls"], "--model.pooling cls: "),
        (no_fault, ["--model.bakbone", "x"], "unknown option --model.bakbone"),
        (no_fault, ["--model.backbone", "r19"], "--model.backbone r19: unknown"),
        (no_fault, [*FROZEN[:2], "--model.projector_dim", "null"], "--model.freeze_backbone true: nothing is left"),
        (no_fault, ["--model.lr", "-1"], "--model.lr -1.0: must be"),
        (no_fault, ["--model.loss", f"{LOSSES}.NoSuchLoss"], "has no attribute 'NoSuchLoss'"),
        (no_fault, ["--model.loss", f"{LOSSES}.TripletMarginLoss", "--model.loss.marginn", 3], "marginn"),
        (no_fault, ["--model.loss", f"{LOSSES}.ArcFaceLoss"], "needs num_classes"),
        (
            no_fault,
            ["--model.loss", "metilr.training.losses.ContrastiveLoss", "--model.loss.margin", "-1"],
            "margin -1.0:",
        ),
        (no_fault, ["--data.pairing", "real"], "data.pairing"),
        (no_fault, ["--data.first_view.scale", "[0.5]"], "scale [0.5]: give two numbers"),
        (no_fault, ["--trainer.max_epoch", 3], "unknown option --trainer.max_epoch"),
        (no_fault, ["--trainer.max_epochs", 0], "--trainer.max_epochs 0: give a number from 1 up"),
        (no_fault, ["--trainer.fast_dev_run", "true"], "--trainer.fast_dev_run True: is decided by this command"),
        (no_fault, ["--trainer.precision", "bf16-true"], "--trainer.precision bf16-true: choose one of 32"),
        (no_fault, ["--trainer.strategy", "dpp"], "strategy='dpp'"),
        (no_fault, ["--seed_everything", "-1"], "--seed_everything -1"),
        (no_fault, ["--config", "none.yaml"], "--config none.yaml: cannot be read"),
        (no_fault, ["--model.scales", "[0.0]"], "--model.scales"),
        (no_fault, ["--data.max_megapixels", 0], "max_megapixels 0"),
        (no_fault, ["--data.max_megapixels", 1e-5], "max_megapixels"),
        (no_fault, ["--data.database", "mini", "--data.root", "nowhere"], "root nowhere"),
        (no_fault, ["--data.pairing", "syn", "--data.batch_pairs", 0], "--data.batch_pairs 0: must be at least 1"),
        (no_fault, ["--wandb", "online"], "--wandb online"),
        (no_fault, ["--output", "museum"], "--output museum"),
    ],
)
def test_provoked_faults(monkeypatch, capsys, fault, options, said):
    fault(monkeypatch)
    with pytest.raises(SystemExit) as stop:
        train(*options)
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and line.startswith("train.py: error: ") and said in line, line


def test_a_file_may_name_a_class_of_one_s_own(tmp_path, monkeypatch):
    """An options file is the user's own: it is trusted as the command line is (SECURITY.md)."""
    Path("own_losses.py").write_text(
        "from pytorch_metric_learning.losses import NTXentLoss\nclass Loss(NTXentLoss):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    loss = {"class_path": "own_losses.Loss", "init_args": {"temperature": 0.2}}
    Path("c.yaml").write_text(yaml.safe_dump({"model": {"loss": loss}, "trainer": {"max_epochs": 1}}))
    train("--config", "c.yaml", "--output", "out")
    assert yaml.safe_load(Path("out/config.yaml").read_text())["model"]["loss"]["class_path"] == "own_losses.Loss"
    assert Path("out/finished").exists()
    del sys.modules["own_losses"]
