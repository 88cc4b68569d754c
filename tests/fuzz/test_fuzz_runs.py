"""Runs of somebody else's: read back, and used by the commands that take one."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from metilr.cli import options_of
from metilr.collection import PhotoOptions, collection_document
from metilr.collection.open_collection import open_with_threshold
from metilr.commands.compare import compare
from metilr.commands.evaluate import evaluate
from metilr.commands.pack import pack
from metilr.commands.rerun import _options, compare_results
from metilr.data.decode import load_image
from metilr.errors import UserError
from metilr.evaluation.read_run import read_run
from metilr.evaluation.results import PREDICTION_COLUMNS, read_results
from metilr.metrics import DISTRACTOR
from metilr.report import plots
from tests import small_runs
from tests.fuzz.guard import refusal
from tests.fuzz.mutations import HOSTILE_VALUES, cases, each_replaced, mutated, mutated_value
from tests.museum import write_museum

FIGURES = {
    "gap": 0.5, "gap_minus": 0.6, "acc": 0.7, "n_queries": 3, "n_met": 2,
    "intervals": {"queries": {name: [0.1, 0.9] for name in ("gap", "gap_minus", "acc")}},
}  # fmt: skip
COUNTS = {
    "database_images": 1, "exhibits": 1, "val_queries": 3, "val_met": 2, "test_queries": 3, "test_met": 2,
}  # fmt: skip
RESULTS = {
    "schema_version": 2, "directory": "/x", "seconds": 1.5, "notes": ["a"], "versions": {"torch": "2"},
    "data": {"root": "m", "database": "full", "synthetic": False, "counts": COUNTS, "fingerprint": "f"},
    "model": {
        "backbone": "r18_in", "store": "s", "image_size": None, "precision": "32", "pooling": {"kind": "gem"},
        "scales": [1.0], "made_with": [{"weights_from": {"source": "x"}}],
    },
    "knn": {"k": 1, "tau": 50.0, "grid": {"k": [1], "tau": [50]}}, "whitening": {"sha256": "0"},
    "elements": {
        "visits": 2, "database_views": "rows", "query_crops": [0.5], "crop_similarity": "best", "dba": 0,
        "hubness": None,
    },
    "geometric_check": {
        "candidates": 3, "reorder": True, "boost": 0.5, "gate": {"weight": 1.0, "enough": 10.0}, "features": {},
    },
    "confidence": {
        "is_used": True, "plain_gap": 0.4, "calibrated_gap": 0.5, "n_background": 0,
        "calibration": {
            "features": ["similarity", "lead", "mean_10"], "mean": [0.5, 0.1, 0.4], "scale": [0.1, 0.1, 0.1],
            "coefficients": [1.0, 2.0, -1.0], "intercept": -1.0, "strength": 0.1,
        },
        "calibration_error": {"val": 0.1, "test": 0.2},
    },
    "search": {"device": "cpu"}, "val": FIGURES, "test": FIGURES,
}  # fmt: skip
CONFIG = {"root": "/x", "scales": [1.0, 0.5], "whitening": "pca", "seed": 0, "ckpt": None}
ROWS = [
    ["test_met/a.jpg", "7", "7", "-0.25", "0.77", "0.9", "MET/7/0.jpg", "1"],
    ["test_met/b.jpg", "9", "7", "-1.5", "0.2", "0.8", "MET/7/0.jpg", "0"],
    ["test_other/ü.jpg", "", "", "-inf", "0.0", "", "", "0"],
]
CSV = "\r\n".join([",".join(PREDICTION_COLUMNS), *map(",".join, ROWS), ""]).encode()
JSON_TOKENS = (b"[" * 3000, b"}", b"NaN", b"9" * 5000, b"\xff")
CSV_TOKENS = (
    *(b",", b'"', b"\r\n", b"\0", b"nan", b"1e999", b"-2", b"7.5", b"\xff"),
    *(b"9" * 30, b"9" * 5000, b"x" * 140_000),
)
YAML_TOKENS = (
    *(b"[" * 2000, b"{" * 2000, b"9" * 5000, b"&a [*a]", b"*a", b"? [a]\n", b"2024-99-99", b"- ", b"\t", b": "),
    *(b"!!python/object/apply:os.system ['x']", b"!!python/name:os.system", b"!!timestamp x", b"!!int ''", b"!!bool x"),
    *(b"!!float ''", b"!!binary x", b"!!set {a}", b"!!omap x", b"0x", b"1:1:1", b"=", b"---\n", b"<<: 1\n"),
    *(b"\x00", b"\xff"),
)


def make(folder):
    (folder / "predictions").mkdir()
    files = {
        "results.json": json.dumps(RESULTS).encode(), "config.yaml": yaml.safe_dump(CONFIG).encode(),
        "predictions/val.csv": CSV, "predictions/test.csv": CSV,
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return files


def read(folder):
    with refusal(folder) as said:
        run = read_run(folder)
        for split in ("val", "test"):
            answers, figures = run.answers[split], run.results.splits[split]
            n = len(answers.paths)
            assert n and all(type(path) is str and path for path in answers.paths)
            assert answers.exhibit_ids.shape == answers.predicted_ids.shape == answers.log_confidence.shape == (n,)
            assert answers.exhibit_ids.dtype == answers.predicted_ids.dtype == np.int64
            assert min(answers.exhibit_ids.min(), answers.predicted_ids.min()) >= DISTRACTOR
            assert answers.log_confidence.dtype == np.float64 and not np.isnan(answers.log_confidence).any()
            assert min(figures.gap, figures.gap_minus, figures.acc) >= 0 and figures.n_met >= 0
        assert type(run.config) is dict and all(type(key) is str for key in run.config)
    return said


def test_each_part_of_the_results_replaced(tmp_path):
    n_read, file = 0, tmp_path / "results.json"
    for changed in each_replaced(RESULTS, HOSTILE_VALUES[::2]):
        file.write_text(json.dumps(changed))
        with refusal(file) as said:
            assert json.dumps(read_results(file).recorded(), allow_nan=False, ensure_ascii=False).encode()
        n_read += not said
    assert n_read > 100


@pytest.mark.parametrize(("name", "least"), [("results.json", 4), ("config.yaml", 10), ("predictions/val.csv", 20)])
def test_changed_files_of_a_run(tmp_path, name, least):
    files, n_read = make(tmp_path), 0
    tokens = {"results.json": JSON_TOKENS, "config.yaml": YAML_TOKENS, "predictions/val.csv": CSV_TOKENS}[name]
    contents = [mutated(files[name], rng, tokens) for rng in cases(125 if name != "predictions/val.csv" else 300)]
    if name == "results.json":
        contents += [json.dumps(mutated_value(RESULTS, rng)).encode() for rng in cases(75)]
    if name == "config.yaml":
        contents += [b"a: " + token for token in YAML_TOKENS]
    for content in contents:
        (tmp_path / name).write_bytes(content)
        n_read += not read(tmp_path)
    assert n_read > least


def test_aliases_which_can_stand_for_gigabytes_are_refused(tmp_path):
    make(tmp_path)
    lists = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 60)]
    (tmp_path / "config.yaml").write_text("\n".join(["a0: &a0 [x, x]", *lists]))
    assert "it has aliases" in read(tmp_path)[0]


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
        assert answer.exhibit in collection.exhibits and len(answer.matches) <= 2 and answer.log_confidence <= 0
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
    content["confidence"] = RESULTS["confidence"]
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
