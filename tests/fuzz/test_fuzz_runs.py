"""What an evaluation wrote, read back: results.json, config.yaml, predictions."""

import json

import numpy as np
import yaml
from hypothesis import given, strategies as st

from metilr.evaluation.results import PREDICTION_COLUMNS, read_results, read_run
from metilr.metrics import DISTRACTOR
from tests.fuzz.guard import refusal
from tests.fuzz.mutations import HOSTILE_VALUES, PROPERTIES, cases, each_replaced, mutated, mutated_value

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


def test_changed_results(tmp_path):
    make(tmp_path)
    n_read = 0
    contents = [json.dumps(mutated_value(RESULTS, rng)).encode() for rng in cases(75)]
    contents += [mutated(json.dumps(RESULTS).encode(), rng, JSON_TOKENS) for rng in cases(125)]
    for content in contents:
        (tmp_path / "results.json").write_bytes(content)
        n_read += not read(tmp_path)
    assert n_read > 4


def test_changed_configurations(tmp_path):
    whole = make(tmp_path)["config.yaml"]
    n_read = 0
    for rng in cases(175):
        (tmp_path / "config.yaml").write_bytes(mutated(whole, rng, YAML_TOKENS))
        n_read += not read(tmp_path)
    assert n_read > 10
    for token in YAML_TOKENS:
        (tmp_path / "config.yaml").write_bytes(b"a: " + token)
        read(tmp_path)


def test_aliases_which_can_stand_for_gigabytes_are_refused(tmp_path):
    make(tmp_path)
    lists = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 60)]
    (tmp_path / "config.yaml").write_text("\n".join(["a0: &a0 [x, x]", *lists]))
    assert "it has aliases" in read(tmp_path)[0]


def test_changed_predictions(tmp_path):
    make(tmp_path)
    n_read = 0
    for rng in cases(450):
        (tmp_path / "predictions" / "val.csv").write_bytes(mutated(CSV, rng, CSV_TOKENS))
        n_read += not read(tmp_path)
    assert n_read > 30


@PROPERTIES
@given(st.lists(st.tuples(st.integers(-1, 2**63 - 1), st.integers(-1, 2**63 - 1), st.floats(max_value=0)), min_size=1))
def test_predictions_are_read_as_written(tmp_path, rows):
    folder = tmp_path / "run"
    if not folder.exists():
        folder.mkdir()
        make(folder)
    lines = [f"{i}.jpg,{'' if a < 0 else a},{'' if b < 0 else b},{c!r},0,0,,0" for i, (a, b, c) in enumerate(rows)]
    (folder / "predictions" / "test.csv").write_text("\n".join([",".join(PREDICTION_COLUMNS), *lines]))
    assert not read(folder)
    answers = read_run(folder).answers["test"]
    found = zip(
        *(x.tolist() for x in (answers.exhibit_ids, answers.predicted_ids, answers.log_confidence)), strict=True
    )
    assert [*found] == rows
