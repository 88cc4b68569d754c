"""Runs of somebody else's, in the commands that take one: identify and serve, compare, pack, rerun."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from metilr.cli import options_of
from metilr.collection.open_collection import open_with_threshold
from metilr.collection.threshold import PhotoOptions, collection_document
from metilr.commands.compare import compare
from metilr.commands.evaluate import evaluate
from metilr.commands.pack import pack
from metilr.commands.rerun import _options, compare_results
from metilr.data.decode import load_image
from metilr.errors import UserError
from metilr.evaluation.results import read_results
from metilr.report import plots
from tests import small_runs
from tests.fuzz.guard import refusal
from tests.fuzz.mutations import HOSTILE_VALUES, cases, mutated_value
from tests.museum import write_museum

YAML_VALUES = tuple(value for value in HOSTILE_VALUES if value != "\ud800")  # which PyYAML does not write


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run with all that a run can have."""
    folder = tmp_path_factory.mktemp("used")
    small_runs.evaluate(
        write_museum(folder / "museum"), backbone="timm/test_resnet", weights="random", scales=[1.0], accelerator="cpu",
        num_workers=0, store=folder / "store", output=folder / "run", report=False, wandb="off", quiet=True,
        whitening="learned", visits=2, database_views="rows", query_crops=[0.8, 0.5],
    )  # fmt: skip
    return folder / "run"


def use(run: Path, whole: Path, output: Path) -> int:
    """How many of the commands take it; the others must say why they do not."""
    n_taken = 0
    with refusal(run) as said:
        collection, _ = open_with_threshold(PhotoOptions(run, accelerator="cpu"))
        answer = collection.answer(load_image(collection.image(0)), 2)
        assert answer.exhibit in collection.exhibits and len(answer.matches) <= 2
        json.dumps(collection_document(collection), allow_nan=False)
    n_taken += not said
    with refusal(run) as said:
        compare([run, whole], output / "compared")
        assert json.loads((output / "compared" / "comparison.json").read_text())
    n_taken += not said
    with refusal(run) as said:
        (output / "packed.ckpt").unlink(missing_ok=True)
        pack(run, output / "packed.ckpt")
    n_taken += not said
    with refusal(run) as said:
        recorded = read_results(run)
        assert options_of(evaluate, _options(run, recorded))
        json.dumps(compare_results(recorded, read_results(whole)), allow_nan=False)
    return n_taken + (not said)


@pytest.fixture
def changed(whole, tmp_path, monkeypatch) -> Path:
    plot, n_drawn = plots.plot_comparison, iter(range(10**9))

    def plot_some(*arguments):
        if next(n_drawn) % 10 == 0:  # it takes most of the time
            plot(*arguments)

    monkeypatch.setattr(plots, "plot_comparison", plot_some)
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(whole, tmp_path / "run"))


@pytest.mark.parametrize(("element", "value"), [("dba", 2), ("crop_similarity", "mean"), ("database_views", "mean")])
def test_elements_that_were_deleted_are_refused_where_photos_are_answered(changed, element, value):
    content = json.loads((changed / "results.json").read_text())
    content["elements"][element] = value
    (changed / "results.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"{changed}: was evaluated with {element} '?{value}'?: "):
        open_with_threshold(PhotoOptions(changed, accelerator="cpu"))


def test_changed_results_in_use(changed, whole, tmp_path):
    content, n_taken = json.loads((whole / "results.json").read_text()), 0
    content["knn"]["grid"] = {"k": [1, 2], "tau": [1, 5], "val_gap": []}  # fewer places of no interest
    for split in ("val", "test"):
        del content[split]["open_set"]
    for rng in cases(25):
        (changed / "results.json").write_text(json.dumps(mutated_value(content, rng)))
        n_taken += use(changed, whole, tmp_path)
    assert n_taken > 10


def test_changed_configurations_in_use(changed, whole, tmp_path):
    content, n_taken = yaml.safe_load((whole / "config.yaml").read_text()), 0
    weights = {"weights": content.pop("weights")}  # without them it would ask the network
    for rng in cases(10):
        (changed / "config.yaml").write_text(yaml.safe_dump(mutated_value(content, rng, YAML_VALUES) | weights))
        n_taken += use(changed, whole, tmp_path)
    assert n_taken > 10
