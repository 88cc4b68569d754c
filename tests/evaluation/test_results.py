"""What an evaluation leaves in its folder, and what is read of it."""

import csv
import dataclasses
import io
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console

from metilr.data.ground_truth import GroundTruth
from metilr.errors import UserError
from metilr.evaluation import runs
from metilr.evaluation.options import MethodOptions, ReportOptions
from metilr.evaluation.read_run import read_run
from metilr.evaluation.recognition import Recognition
from metilr.evaluation.results import read_results
from metilr.evaluation.runs import output_folder, summarise, write_answers
from metilr.extraction.descriptors import Descriptors
from metilr.report.tables import print_table
from metilr.retrieval.knn import Matches, Predictions, Tuning
from metilr.retrieval.whitening import fit_pca_whitening

TRUTH = GroundTruth(
    root=Path("a museum [/]"),  # brackets mean something to rich
    database="full",
    paths={
        "database": ("MET/7/0.jpg", "MET/3/0,1.jpg"),
        "val": ("v/0.jpg", "v/é.jpg"),
        "test": ("t/0.jpg", "t/1.jpg", "t/2.jpg", "t/3.jpg", "t/4.jpg"),
    },
    labels={"database": np.array([1, 0]), "val": np.array([0, -1]), "test": np.array([1, -1, 1, 0, -1])},
    exhibit_ids=np.array([3, 7]),
    digests={"database": "d", "val": "v", "test": "t"},
)
VAL = Predictions(np.array([0, 1]), np.array([-0.25, -2.0]), np.array([0.5, 0.125]), np.array([1, 0]))
# right; a distractor; no neighbour more than 0 similar; skipped; a skipped distractor
TEST = Predictions(
    np.array([1, 1, 0, -1, -1]),
    np.array([-1e-30, -0.5, -0.75, -np.inf, -np.inf]),
    np.array([0.875, 0.5, 0.0, np.nan, np.nan]),
    np.array([0, 0, -1, -1, -1]),
)
ANSWERS = {"val": VAL, "test": TEST}
RANKS = {"val": np.array([1, np.nan]), "test": np.array([1, np.nan, 7, np.inf, np.nan])}
MADE = {"database": np.ones(2, bool), "val": np.ones(2, bool), "test": np.array([1, 1, 1, 0, 1], bool)}
ORIGIN = {
    "store": "runs/x", "model": {"backbone": "r18_in", "weights_sha256": "ab", "pooling": {"kind": "gem"}},
    "image_size": None, "precision": "32", "ground_truth": {"val": "v"},
}  # fmt: skip


def a_recognition(tuned=True):
    tuning = Tuning(1, 5.0, np.array([[0.5, 0.25]]), (1,), (5.0, 10.0)) if tuned else None
    x = np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32)
    whitening = fit_pca_whitening([x], dim=2) if tuned else None
    matches = {split: Matches(of.nearest[:, None], of.similarity[:, None]) for split, of in ANSWERS.items()}
    return Recognition(ANSWERS, whitening, 1, 5.0, tuning, matches, RANKS)


def results(recognition, origins=(ORIGIN,), notes=(), synthetic=False):
    opened = Descriptors({"database": [np.zeros((2, 3))]}, MADE, origins)
    found = summarise(
        TRUTH, recognition, opened, MethodOptions(), None, options={}, synthetic=synthetic, seconds=1.25, n_made=0
    )
    return found.model_copy(update={"notes": list(notes)})


def open_output(output, options=None):
    with output_folder(output, "r18_in", options or {}) as folder:
        return folder


def test_an_output_folder_holds_the_options_before_any_work(tmp_path):
    options = {
        "root": Path("museum"), "scales": (1.0, 2**-0.5), "descriptors": [Path("a"), Path("b")], "k": None,
        "output": tmp_path,
    }  # fmt: skip
    output = open_output(tmp_path / "new" / "out", options)
    assert output == tmp_path / "new" / "out"
    assert yaml.safe_load((output / "config.yaml").read_text()) == {
        "root": str(Path.cwd() / "museum"), "scales": [1.0, 2**-0.5],
        "descriptors": [str(Path.cwd() / "a"), str(Path.cwd() / "b")], "k": None,
    }  # fmt: skip
    (output / "results.json").write_text("{}")
    with pytest.raises(UserError, match=f"output {output}: holds results already"):
        open_output(output)
    assert {file.name for file in output.iterdir()} - {".lock"} == {"config.yaml", "results.json"}


def test_default_outputs_are_dated_never_shared_and_gone_after_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "RUNS", tmp_path / "runs")
    outputs = {open_output(None) for _ in range(4)}
    assert len(outputs) == 4 and all("_r18_in" in output.name for output in outputs)
    with pytest.raises(KeyboardInterrupt), output_folder(None, "r18_in", {}):
        raise KeyboardInterrupt
    assert set((tmp_path / "runs").iterdir()) == outputs


def test_what_a_killed_run_left_does_not_pass_for_this_one_s(tmp_path):
    left = ("predictions/val.csv", "whitening.npz", "report/index.html")
    for name in (*left, "report/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("of before")
    open_output(tmp_path)
    assert all((tmp_path / name).exists() for name in left)  # no run has been there: they are somebody's own
    open_output(tmp_path)
    assert not any((tmp_path / name).exists() for name in left) and (tmp_path / "report/notes.txt").exists()


def test_predictions(tmp_path):
    written = write_answers(tmp_path, TRUTH, a_recognition())
    assert all(file.is_file() for file in written if file.name != "config.yaml")
    with (tmp_path / "predictions" / "val.csv").open(encoding="utf-8", newline="") as stream:
        assert list(csv.reader(stream)) == [
            ["path", "exhibit_id", "predicted_id", "log_confidence",
             "confidence", "similarity", "nearest_path", "correct"],
            ["v/0.jpg", "3", "3", "-0.25", repr(math.exp(-0.25)), "0.5", "MET/3/0,1.jpg", "1"],
            ["v/é.jpg", "", "7", "-2.0", repr(math.exp(-2.0)), "0.125", "MET/7/0.jpg", "0"],
        ]  # fmt: skip
    with (tmp_path / "predictions" / "test.csv").open(encoding="utf-8", newline="") as stream:
        assert list(csv.reader(stream))[1:] == [
            ["t/0.jpg", "7", "7", "-1e-30", "1.0", "0.875", "MET/7/0.jpg", "1"],
            ["t/1.jpg", "", "7", "-0.5", repr(math.exp(-0.5)), "0.5", "MET/7/0.jpg", "0"],
            ["t/2.jpg", "7", "3", "-0.75", repr(math.exp(-0.75)), "0.0", "", "0"],
            ["t/3.jpg", "3", "", "-inf", "0.0", "", "", "0"],
            ["t/4.jpg", "", "", "-inf", "0.0", "", "", "0"],
        ]


def test_results_json_is_strict_and_has_what_callers_rely_on(tmp_path):
    written = results(a_recognition(), notes=["a note"])
    written.write(tmp_path)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    read = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert read == written.recorded() and read_results(tmp_path) == written
    assert read["schema_version"] == 2 and read["notes"] == ["a note"] and "torch" in read["versions"]
    data, model, whitening, knn = (read[part] for part in ("data", "model", "whitening", "knn"))
    assert data["root"] == TRUTH.root.resolve().name and data["database"] == "full" and data["synthetic"] is False
    assert data["counts"]["database_images"] == 2 and data["counts"]["test_met"] == 3 and len(data["fingerprint"]) == 64
    assert model["backbone"] == "r18_in" and model["weights_sha256"] == "ab" and model["pooling"] == {"kind": "gem"}
    assert "ground_truth" not in model
    expected = {"dim": 2, "shrinkage": 1.0, "learned_on": 20, "supported_dim": 3, "source": "learned on the database"}
    assert whitening.items() >= expected.items() and len(whitening["sha256"]) == 64
    grid = {"k": [1], "tau": [5.0, 10.0], "val_gap": [[0.5, 0.25]]}
    assert knn == {"k": 1, "tau": 5.0, "tuned_on": "val", "grid": grid}
    assert read["val"].items() >= {"gap": 1.0, "gap_minus": 1.0, "acc": 1.0, "n_queries": 2, "n_met": 1}.items()
    expected = {"gap": 1 / 3, "gap_minus": 1 / 3, "acc": 1 / 3, "n_queries": 5, "n_met": 3, "n_skipped": 2}
    assert read["test"].items() >= expected.items()
    assert read["val"]["ranking"] == {"recall@1": 1.0, "recall@5": 1.0, "recall@10": 1.0, "map": 1.0}
    of_test = {"recall@1": 1 / 3, "recall@5": 1 / 3, "recall@10": 2 / 3, "map": (1 + 1 / 7) / 3}
    assert read["test"]["ranking"] == pytest.approx(of_test)
    assert read["threshold"]["splits"]["test"] == {
        "n_accepted": 3, "precision": 1 / 3, "recall": 1 / 3, "false_alarms": 0.5,
    }  # fmt: skip
    [skipped] = read["skipped_images"]
    assert (skipped["split"], skipped["path"]) == ("test", "t/3.jpg") and "no such file" in skipped["reason"]


def test_what_was_not_done_is_null(tmp_path):
    recognition = a_recognition(tuned=False)
    said = results(recognition, origins=[{"pickle": "a.pkl"}, {"pickle": "b.pkl"}])
    assert said.whitening is None and said.knn.tuned_on is None and said.knn.grid is None
    assert said.model.recorded() == {"concatenated": [{"pickle": "a.pkl"}, {"pickle": "b.pkl"}]}
    written = write_answers(tmp_path, TRUTH, recognition)
    assert not (tmp_path / "whitening.npz").exists() and tmp_path / "whitening.npz" not in written


def table_of(said, width=200, **how):
    stream = io.StringIO()
    print_table(Console(file=stream, width=width), said, **how)
    return stream.getvalue()


def test_table_shows_both_splits_in_percent_and_what_was_tuned():
    said = results(a_recognition(), notes=["see [/this]"])
    printed = table_of(said)
    rows = {line.split()[0]: line for line in printed.splitlines() if line.split()[:1] in (["val"], ["test"])}
    assert "100.00" in rows["val"] and "33.33" in rows["test"]
    assert "k = 1 fixed, τ = 5 tuned by GAP on val; test scored once" in printed
    assert "note: see [/this]" in printed and "SYNTHETIC" not in printed
    assert "33.33" in table_of(said, width=80) and "…" not in table_of(said, width=80)
    printed = table_of(results(a_recognition(tuned=False), synthetic=True))
    assert "k = 1, τ = 5 fixed; test" in printed and "SYNTHETIC" in printed


@pytest.mark.parametrize(
    ("unit", "drawn"),
    [
        ("photographers", "photographers with all their met queries (a query that names none alone)"),
        ("classes", "exhibits with all their met queries"),
        ("queries", "single met queries"),
    ],
)
def test_what_the_intervals_are_is_said_in_words(unit, drawn):
    said = results(a_recognition())
    intervals = {unit: {metric: [0.25, 0.75] for metric in ("gap", "gap_minus", "acc")}}
    figures = {split: of.model_copy(update={"intervals": intervals}) for split, of in said.splits.items()}
    words = " ".join(table_of(said.model_copy(update=figures)).split())
    assert "95% intervals: the same figure of 95 of 100 random resamples of the queries lies within." in words
    assert f"Each of 1,000 resamples draws, with repeats, {drawn}, and single distractors." in words


def test_table_shows_the_metrics_that_are_asked_for_in_their_order():
    said = results(a_recognition())
    asked = ("map", "recall@10", "gap")
    printed = table_of(said, metrics=asked)
    heading, values = (
        next(line for line in printed.splitlines() if line.split()[:1] == [of]) for of in ("split", "test")
    )
    assert heading.split()[-3:] == ["mAP", "recall@10", "GAP"]
    assert [heading.index(name) for name in ("mAP", "recall@10", "GAP")] == sorted(
        map(heading.index, ("mAP", "recall@10", "GAP"))
    )
    assert values.split()[4:7] == [f"{100 * (1 + 1 / 7) / 3:.2f}", f"{200 / 3:.2f}", "33.33"] and "ACC" not in printed
    assert "mAP" not in table_of(said) and "recall" not in table_of(said)
    before = said.model_copy(update={split: of.model_copy(update={"ranking": {}}) for split, of in said.splits.items()})
    assert table_of(before, metrics=asked).count("–") == table_of(said, metrics=asked).count("–") + 4  # not measured


@pytest.mark.parametrize(
    ("metrics", "said"), [(("gap", "mrr"), "metrics mrr: choose one of gap, "), ((), "choose one")]
)
def test_unknown_metrics_are_refused(metrics, said):
    with pytest.raises(UserError, match=said):
        ReportOptions(metrics=metrics)


@pytest.mark.parametrize(
    ("script", "recorded"),
    [
        ("evaluate.py", f"{Path(sys.executable).name} evaluate.py --root 'a b'"),
        ("/env/bin/metilr", "metilr --root 'a b'"),
        ("somebodys.py", None),
    ],
)
def test_the_command_is_recorded_as_it_can_be_typed(monkeypatch, script, recorded):
    monkeypatch.setattr(sys, "argv", [script, "--root", "a b"])
    assert results(a_recognition()).command == recorded


def test_the_unit_shown_is_the_widest_so_that_two_photographers_do_not_hide_the_doubt():
    found = results(a_recognition())

    def with_widths(**widths):
        ends = {unit: {"gap": [0.1, 0.1 + width]} for unit, width in widths.items()}
        figures = {split: found.splits[split].model_copy(update={"intervals": ends}) for split in ("val", "test")}
        return found.model_copy(update=figures)

    assert with_widths(photographers=0.1, classes=0.3, queries=0.2).unit == "classes"
    assert with_widths().unit is None


def test_a_run_of_the_first_edition_is_read_whole():
    folder = Path(__file__).parents[1] / "fixtures" / "first_edition_run"
    content, run = json.loads((folder / "results.json").read_text()), read_run(folder)
    assert run.results.confidence is None and "confidence" not in content
    assert run.results.recorded() == content and run.results.test.gap == content["test"]["gap"]
    assert run.config["seed"] == 5 and len(run.answers["val"].paths) == content["val"]["n_queries"] == 7


@pytest.mark.parametrize(
    ("was", "is_now", "said"),
    [(",", ",,", "line 2: has 9 fields where the first line has 8"), ("\n", '\n"', "line 2: is no CSV")],
)
def test_predictions_with_a_row_out_of_joint_are_refused_by_line(tmp_path, was, is_now, said):
    folder = Path(shutil.copytree(Path(__file__).parents[1] / "fixtures" / "first_edition_run", tmp_path / "run"))
    file = folder / "predictions" / "val.csv"
    header, rest = file.read_text().split("\n", 1)
    file.write_text(header + ("\n" + rest).replace(was, is_now, 1))
    with pytest.raises(UserError, match=rf"predictions/val\.csv: cannot be read \({said}.*run the evaluation again"):
        read_run(folder)


CALIBRATION = {
    "features": ["similarity", "lead"], "mean": [0.5, 0.1], "scale": [0.2, 0.1], "coefficients": [1.0, -1.0],
    "intercept": 0.0, "strength": 0.1,
}  # fmt: skip
CONFIDENCE = {"is_used": True, "plain_gap": 0.4, "calibrated_gap": 0.5, "n_background": 20, "calibration": CALIBRATION}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mean": [0.5]}, "differ in length"),
        ({"features": ["similarity"]}, "differ in length"),
        ({"intercept": math.nan}, "expected value at line 1"),  # NaN is no JSON
        ({"coefficients": [1.0, 1e200]}, "calibration.coefficients.1"),
        ({"scale": [0.2, 0.0]}, "calibration.scale.1"),
        ({"more": 1}, "calibration.more"),
        (None, "contradict"),
    ],
)
def test_a_calibrated_confidence_that_is_none_is_refused_in_a_line(tmp_path, change, said):
    folder = Path(shutil.copytree(Path(__file__).parents[1] / "fixtures" / "first_edition_run", tmp_path / "run"))
    content = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps(content | {"confidence": CONFIDENCE}))
    assert read_results(folder).confidence.calibration.recorded() == CALIBRATION
    changed = CONFIDENCE | {"calibration": None if change is None else CALIBRATION | change}
    (folder / "results.json").write_text(json.dumps(content | {"confidence": changed}))
    with pytest.raises(UserError) as refused:
        read_results(folder)
    assert "results.json: cannot be read" in str(refused.value) and "\n" not in str(refused.value)
    assert said in str(refused.value)


def test_a_name_that_a_spreadsheet_would_run_comes_back_as_it_is(tmp_path):
    paths = {**TRUTH.paths, "val": ("=cmd|' /C calc'!A0.jpg", "v/1\n@SUM(A1).jpg")}
    write_answers(tmp_path, dataclasses.replace(TRUTH, paths=paths), a_recognition())
    with (tmp_path / "predictions" / "val.csv").open(newline="", encoding="utf-8") as stream:
        assert [row["path"] for row in csv.DictReader(stream)] == [f"'{path}" for path in paths["val"]]
    shutil.copytree(Path(__file__).parents[1] / "fixtures" / "first_edition_run", tmp_path / "run")
    shutil.copy(tmp_path / "predictions" / "val.csv", tmp_path / "run" / "predictions" / "val.csv")
    assert read_run(tmp_path / "run").answers["val"].paths == paths["val"]


def test_table_of_all_metrics_fits_eighty_columns_with_every_digit():
    found = read_results(Path(__file__).parents[1] / "fixtures" / "first_edition_run")
    ranking = {"recall@1": 0.91, "recall@5": 0.92, "recall@10": 1.0, "map": 1.0}
    figures = {split: of.model_copy(update={"ranking": ranking}) for split, of in found.splits.items()}
    printed = table_of(found.model_copy(update=figures), 80, metrics=("gap", "gap_minus", "acc", *ranking))
    [values] = [line for line in printed.splitlines() if line.split()[:1] == ["test"]]
    assert values.split()[-7:] == ["100.00", "100.00", "100.00", "91.00", "92.00", "100.00", "100.00"]
    assert "…" not in printed and ["(100–100)"] * 3 in [line.split()[-3:] for line in printed.splitlines()]


@pytest.mark.parametrize("turns", [0, 37, 1.5])
def test_a_run_s_number_of_turns_is_one_that_the_option_takes(tmp_path, turns):
    folder = Path(shutil.copytree(Path(__file__).parents[1] / "fixtures" / "first_edition_run", tmp_path / "run"))
    content = json.loads((folder / "results.json").read_text())
    check = {"candidates": 5, "reorder": False, "boost": 0, "gate": {"weight": 1, "enough": 9}, "features": {}}
    for changed in (check, check | {"turns": 36}):
        (folder / "results.json").write_text(json.dumps(content | {"geometric_check": changed}))
        assert read_results(folder).geometric_check.turns == changed.get("turns", 1)
    (folder / "results.json").write_text(json.dumps(content | {"geometric_check": check | {"turns": turns}}))
    with pytest.raises(UserError, match=r"results\.json: cannot be read .*geometric_check\.turns"):
        read_results(folder)
