"""The configurations of ``configs/eval``: each runs, and says with which command."""

import json
from pathlib import Path

import pytest
import timm
import yaml

from metilr.models.zoo import BACKBONES, first_timm
from metilr.report.published import PUBLISHED
from tests.commands.test_evaluate import ON_CPU, REPOSITORY, error_of, run
from tests.small_models import SMALL, make_small

CONFIGS = sorted((REPOSITORY / "configs" / "eval").rglob("*.yaml"))
FOR_FEW_IMAGES = {"best_met": ["--whitening_dim", 3]}


def of_a_published_row(config: Path) -> bool:
    return config.stem in BACKBONES and config.stem != "r18_in"


def test_configurations_name_their_command_and_the_published_rows_differ_in_their_backbone_alone():
    rows = {row.backbone for row in PUBLISHED}
    assert {yaml.safe_load(config.read_text()).get("backbone") for config in CONFIGS} >= rows
    assert {name for name in rows if "/" not in name} | {"demo"} <= {config.stem for config in CONFIGS}
    for config in CONFIGS:
        header = [line for line in config.read_text().splitlines() if line.startswith("#")]
        assert any(f"--config {config.relative_to(REPOSITORY)}" in line for line in header), config
        if of_a_published_row(config):
            first = yaml.safe_load(config.with_name("r18_in.yaml").read_text())
            assert yaml.safe_load(config.read_text()) == {**first, "backbone": config.stem}
        if config.parent.name == "foundation":
            first, options = (yaml.safe_load(file.read_text()) for file in (config.with_name("dinov2_s.yaml"), config))
            for name in ("backbone", "pooling", "image_shape"):
                first.pop(name, None), options.pop(name, None)
            assert options == first


@pytest.mark.parametrize(
    "config", [config for config in CONFIGS if not of_a_published_row(config)], ids=lambda config: config.stem
)
def test_every_kind_of_configuration_runs(evaluated, tmp_path, monkeypatch, capsys, config):
    """With untrained weights and tiny images in place of the official ones; of ViTs one block, narrow."""
    monkeypatch.chdir(tmp_path)
    make_small(monkeypatch)
    options = ["--root", evaluated / "museum", *ON_CPU, "--database", "mini", "--report", "false", "--output", "out"]
    options = ["--config", config, *options, *FOR_FEW_IMAGES.get(config.stem, [])]
    wanted = yaml.safe_load(config.read_text())
    name = wanted.get("backbone", "lite0_in")
    if "/" in name and not timm.is_model(name[5:].partition(".")[0]):
        assert f"pip install 'timm>={first_timm(name)}'" in error_of(capsys, *options)
        return
    run(*options)
    results = json.loads(Path("out/results.json").read_text())
    assert results["data"]["database"] == "mini" and results["model"]["backbone"] == name
    if config.parent.name == "foundation":
        size = [512, 512] if "square" in config.stem else 512
        found = results["model"]
        assert (found["image_size"], found["scales"], found["pooling"]["kind"]) == (size, [1.0], wanted["pooling"])
        assert found["patch_rounding"] == "nearest" and found["width"] == SMALL["embed_dim"] and found["made_with"]
