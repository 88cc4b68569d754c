"""The configurations of ``configs/eval``: each runs, and says with which command."""

import json
from pathlib import Path

import pytest
import yaml

from metilr.models.zoo import BACKBONES
from metilr.report.published import PUBLISHED
from tests.commands.test_evaluate import ON_CPU, REPOSITORY, run

CONFIGS = sorted((REPOSITORY / "configs" / "eval").rglob("*.yaml"))
FOR_FEW_IMAGES = {"best_met": ["--whitening_dim", 3]}


def of_a_published_row(config: Path) -> bool:
    return config.stem in BACKBONES and config.stem != "r18_in"


def test_configurations_name_their_command_and_the_published_rows_differ_in_their_backbone_alone():
    assert {row.backbone for row in PUBLISHED} | {"demo"} <= {config.stem for config in CONFIGS}
    for config in CONFIGS:
        header = [line for line in config.read_text().splitlines() if line.startswith("#")]
        assert any(f"--config {config.relative_to(REPOSITORY)}" in line for line in header), config
        if of_a_published_row(config):
            first = yaml.safe_load(config.with_name("r18_in.yaml").read_text())
            assert yaml.safe_load(config.read_text()) == {**first, "backbone": config.stem}


@pytest.mark.parametrize(
    "config", [config for config in CONFIGS if not of_a_published_row(config)], ids=lambda config: config.stem
)
def test_every_kind_of_configuration_runs(evaluated, tmp_path, monkeypatch, config):
    """With untrained weights and tiny images in place of the official ones."""
    monkeypatch.chdir(tmp_path)
    options = ["--root", evaluated / "museum", *ON_CPU, "--database", "mini", "--report", "false", "--output", "out"]
    run("--config", config, *options, *FOR_FEW_IMAGES.get(config.stem, []))
    results = json.loads(Path("out/results.json").read_text())
    assert results["data"]["database"] == "mini"
    assert results["model"]["backbone"] == yaml.safe_load(config.read_text()).get("backbone", "lite0_in")
