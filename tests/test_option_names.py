"""Errors of ``train.py`` name options that it has: its options are not called as those of ``evaluate.py``."""

import ast
import errno
import json
import os
import re
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from metilr.cli import run_main
from metilr.extraction.module import DescriptorModule
from metilr.training import train as train_command
from metilr.training.cli import TrainingCLI
from metilr.training.train import _as_typed
from tests.small_runs import TRAIN

REPOSITORY = Path(train_command.__file__).parents[1]
# Training imports them, but nothing of them that fails, or names their option before it calls them.
NOT_REACHED = {
    f"metilr.{name}" for name in (
        "cli", "collection", "compiled_engine", "engines", "extraction", "knn", "method",
        "openvino_engine", "search", "sources", "whitening_files",
    )
}  # fmt: skip
OF_OTHERS = {
    ("weights", "--force-reinstall"),  # of pip
    ("checkpoints", "--ckpt"), ("training_run", "--ckpt"),  # of evaluate.py; training takes the word out
    ("train_command", "--ckpt"), ("train_command", "--whitening"),  # in the command that evaluates
    ("fit_whitening", "--whitening_shrinkage"), ("fit_whitening", "--pair_shrinkage"),  # training leaves the defaults
    *(("versions", option) for option in ("--always", "--dirty", "--abbrev", "--exclude")),  # of git
}  # fmt: skip


@pytest.fixture(scope="module")
def known() -> set[str]:
    """All options of train.py."""
    found: list[str] = []

    class Stopped(Exception):
        pass

    def stop(cli, parser, args):
        found.extend(parser._option_names())
        raise Stopped

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(TrainingCLI, "parse_arguments", stop)
        TrainingCLI([], "train.py", ExitStack())
    assert {"--data.root", "--trainer.precision", "--output"} <= set(found)
    return set(found)


def names_in(message: str) -> set[str]:
    return set(re.findall(r"--[a-z][\w.-]*\w|--p\b", message))


def messages_of(file: Path) -> list[tuple[int, str]]:
    """Texts in a module that name an option, without docstrings, with their lines."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    places = (node for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)))
    docstrings = {id(node.body[0].value) for node in places if isinstance(node.body[0], ast.Expr)}
    texts = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return [(text.lineno, text.value) for text in texts if id(text) not in docstrings and "--" in text.value]


def file_of(module: str) -> Path | None:
    """Where a module of metilr lies; None for names that are none."""
    place = REPOSITORY / module.replace(".", "/")
    return next((file for file in (place.with_suffix(".py"), place / "__init__.py") if file.exists()), None)


def imported_by(module: str, found: set[str]) -> set[str]:
    """A module of metilr and all others that come with it."""
    file = file_of(module)
    if file is not None and module not in found:
        found.add(module)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("metilr"):
                for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
                    imported_by(str(name), found)
    return found


def test_every_message_of_the_modules_that_train(known):
    n_names, unknown = 0, []
    for module in sorted(imported_by("metilr.training.train", set()) - NOT_REACHED):
        for line, text in messages_of(file_of(module)):
            for name in names_in(_as_typed(text)):
                n_names += 1
                if name not in known and (module.rpartition(".")[2], name) not in OF_OTHERS:
                    unknown.append(f"{module} line {line}: {name}")
    assert n_names > 80 and not unknown


def full_disk(monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)


def all_zero(monkeypatch):
    def zeros(module, batch):
        return torch.zeros(len(batch.images), module.embedder.dim)

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


FROZEN = ("--model.freeze_backbone", "true", "--model.projector_dim", 4)


@pytest.mark.parametrize(
    ("fault", "options", "said"),
    [
        (full_disk, [], "cannot reserve"),
        (all_zero, [], "try --trainer.precision 32, or another --model.pooling"),
        (unwritable_views, [*FROZEN, "--data.cache_views", "true", "--data.n_views", 2], "runs/views"),
        (other_weights, ["--model.weights", "other.pth"], "check --model.backbone and --model.weights"),
        (image_gone, [], "leave them out with --data.bad_images skip"),
        (two_equal_images, ["--model.projector_dim", 1], "descriptors are the same"),
        (no_fault, ["--model.projector_dim", 8], "--model.projector_dim 8"),
        (no_fault, ["--model.weights", "none.pth"], "check --model.weights"),
        (no_fault, ["--model.stage", 9], "--model.stage 9"),
        (no_fault, ["--model.pooling", "cls"], "use --model.pooling gem"),
        (no_fault, ["--model.scales", "[0.0]"], "--model.scales [0.0]"),
        (no_fault, ["--data.max_megapixels", 0], "--data.max_megapixels 0"),
        (no_fault, ["--data.max_megapixels", 1e-5], "raise --data.max_megapixels"),
        (no_fault, ["--data.database", "mini", "--data.root", "nowhere"], "--data.root nowhere"),
        (no_fault, ["--wandb", "online"], "--wandb online"),
        (no_fault, ["--output", "museum"], "--output museum"),
    ],
)  # fmt: skip
def test_provoked_faults(known, tiny_museum, tmp_path, monkeypatch, capsys, fault, options, said):
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    fault(monkeypatch)
    with pytest.raises(SystemExit) as stop:
        run_main("metilr.training.cli:train", [*map(str, [*TRAIN[1:], "--data.root", "museum", *options])], "train.py")
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and said in line and names_in(line) <= known, line
