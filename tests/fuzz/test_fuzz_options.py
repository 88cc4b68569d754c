"""YAML files with options, as --config takes them."""

from pathlib import Path
from typing import Literal

import yaml

from metilr.cli import parse_options
from tests.fuzz.guard import refusal
from tests.fuzz.mutations import cases, mutated
from tests.fuzz.test_fuzz_runs import YAML_TOKENS

CONFIG = {"root": "/x", "database": "mini", "scales": [1.0, 0.5], "k": 3, "quiet": True}


def command(
    root: Path | None = None,
    database: Literal["full", "mini"] = "full",
    scales: tuple[float, ...] = (),
    k: int | None = None,
    quiet: bool = False,
) -> None:
    """Do something.

    Args:
        root: A folder.
        database: Which.
        scales: Sizes.
        k: Number.
        quiet: Whether.
    """


def test_changed_configurations_are_read_by_type_or_refused(tmp_path):
    file, whole, n_read = tmp_path / "c.yaml", yaml.safe_dump(CONFIG).encode(), 0
    contents = [b"k: " + token for token in YAML_TOKENS] + [token + b": 1" for token in YAML_TOKENS]
    contents += [mutated(whole, rng, YAML_TOKENS) for rng in cases(100)]
    for content in contents:
        file.write_bytes(content)
        with refusal("") as said:  # a wrong value is named by its option
            options = parse_options(command, ["--config", str(file)], "x")
            assert options["root"] is None or isinstance(options["root"], Path)
            assert options["database"] in ("full", "mini") and isinstance(options["quiet"], bool)
            assert options["k"] is None or isinstance(options["k"], int)
            assert all(isinstance(scale, float) for scale in options["scales"])
        n_read += not said
    assert n_read > 5
