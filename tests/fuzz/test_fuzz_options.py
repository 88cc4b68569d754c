"""YAML files with options, as --config takes them: of both commands."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from metilr.cli import parse_options
from metilr.commands.evaluate import evaluate
from metilr.data.ground_truth import DatabaseName
from metilr.extraction.options import Accelerator, BadImages
from metilr.training.cli import TrainingCLI
from tests.fuzz.guard import refusal
from tests.fuzz.mutations import HOSTILE_VALUES, cases, mutated, mutated_value
from tests.fuzz.test_fuzz_runs import YAML_TOKENS

CONFIGS = Path(__file__).parents[2] / "configs"
YAML_VALUES = tuple(value for value in HOSTILE_VALUES if value != "\ud800")  # which PyYAML does not write
CLASSES = ("none.X", {"class_path": "none.X"}, ["none.X"])


class Parsed(Exception):
    """Holds the options; nothing is built."""


class OnlyParses(TrainingCLI):
    def parse_arguments(self, parser, args):
        super().parse_arguments(parser, args)
        raise Parsed(self.config.as_dict())


def read_evaluation(file: Path) -> bool:
    with refusal("") as said:  # a wrong value is named by its option
        options = parse_options(evaluate, ["--config", str(file)], "x")
        assert options["root"] is None or isinstance(options["root"], Path)
        assert options["database"] in get_args(DatabaseName) and options["bad_images"] in get_args(BadImages)
        assert options["accelerator"] in get_args(Accelerator) and type(options["quiet"]) is bool
        assert options["k"] is None or type(options["k"]) is int
        assert options["tau"] is None or type(options["tau"]) is float
        assert options["scales"] is None or all(type(scale) is float for scale in options["scales"])
    return not said


def read_training(file: Path) -> bool:
    with refusal("") as said:
        parse_training("--config", str(file))
    return not said


def parse_training(*args: str) -> None:
    with contextlib.suppress(Parsed), contextlib.ExitStack() as held:
        OnlyParses(args, "x", held)


@pytest.fixture(autouse=True, scope="module")
def types_are_known():
    """Jsonargparse's search for the types of libraries starts a process, once."""
    parse_training("--model.loss", "pytorch_metric_learning.losses.NTXentLoss")


def write(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(yaml.safe_dump(content, sort_keys=False))


def test_changed_options_of_evaluations(tmp_path):
    file, n_read = tmp_path / "c.yaml", 0
    whole = yaml.safe_load((CONFIGS / "eval/best_small_museum.yaml").read_text()) | {
        "root": "/x", "scales": [1.0, 0.5], "k": 3, "tau": 50.0, "quiet": True, "store": "s", "descriptors": [],
    }  # fmt: skip
    for rng in cases(50):
        write(file, mutated_value(whole, rng, YAML_VALUES))
        n_read += read_evaluation(file)
    for rng in cases(50):
        file.write_bytes(mutated(yaml.safe_dump(whole).encode(), rng, YAML_TOKENS))
        n_read += read_evaluation(file)
    assert n_read > 10


def test_changed_options_of_trainings(tmp_path):
    file, n_read = tmp_path / "c.yaml", 0
    whole = yaml.safe_load((CONFIGS / "train/small_museum.yaml").read_text())
    for rng in cases(20):
        write(file, mutated_value(whole, rng, (*YAML_VALUES, *CLASSES)))
        n_read += read_training(file)
    for rng in cases(10):
        file.write_bytes(mutated(yaml.safe_dump(whole).encode(), rng, YAML_TOKENS))
        n_read += read_training(file)
    assert n_read > 3
