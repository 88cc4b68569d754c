"""``metilr compare``: what it writes is read back and compared with the runs' own files."""

import csv
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from metilr.cli import main
from metilr.commands.compare import paired_differences, photographers_of
from metilr.data.ground_truth import load_ground_truth
from metilr.evaluation.read_run import read_run
from metilr.evaluation.results import PREDICTION_COLUMNS
from metilr.metrics import acc, gap, gap_minus
from metilr.metrics.bootstrap import paired_intervals
from tests.museum import write_ground_truth
from tests.report.test_published import FROZEN, results_of, results_of_frozen

METRICS = ("gap", "gap_minus", "acc")


def write_museum_files(root: Path, seed: int = 0, n_met: int = 12, photographers: bool = True) -> Path:
    """Ground truth without images: met queries of six exhibits, and half as many distractors."""
    rng = np.random.default_rng(seed)
    database = [{"id": 10 + i, "path": f"MET/{i}.jpg"} for i in range(6)]
    queries = {}
    for split in ("val", "test"):
        queries[split] = [
            {"path": f"test_met/{split}{seed}_{i}.jpg", "MET_id": int(10 + rng.integers(6))} for i in range(n_met)
        ]
        if photographers:
            for i, query in enumerate(queries[split]):
                query["photographer"] = f"visitor {i % 3}"
        queries[split] += [{"path": f"test_other/{split}{seed}_{i}.jpg"} for i in range(n_met // 2)]
    return write_ground_truth(root, database, queries["val"], queries["test"], database)


def write_run(folder: Path, root: Path, seed: int, right: float = 0.7, **changes: Any) -> Path:
    """What an evaluation would leave behind if it answered by drawing lots."""
    rng = np.random.default_rng(seed)
    ground_truth = load_ground_truth(root, "full")
    results = {
        "schema_version": 1,
        "directory": str(folder.parent),
        "notes": [],
        "data": {
            "root": root.name,
            "database": "full",
            "synthetic": False,
            "counts": ground_truth.counts(),
            "fingerprint": ground_truth.fingerprint(),
        },
        "model": {"backbone": "r18_in"},
        "knn": {"k": 3, "tau": 50.0, "tuned_on": "val", "grid": {"k": [1, 3], "tau": [1, 50]}},
    }
    (folder / "predictions").mkdir(parents=True)
    for split in ("val", "test"):
        ids = np.array([ground_truth.exhibit_ids[label] if label >= 0 else -1 for label in ground_truth.labels[split]])
        answers = np.where((ids >= 0) & (rng.random(len(ids)) < right), ids, 10 + rng.integers(6, size=len(ids)))
        log_confidence = -rng.exponential(size=len(ids))
        arguments = (log_confidence, answers, ids)
        results[split] = {"gap": gap(*arguments), "gap_minus": gap_minus(*arguments), "acc": acc(*arguments)}
        results[split] |= {"n_queries": len(ids), "n_met": int((ids >= 0).sum())}
        with (folder / "predictions" / f"{split}.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, PREDICTION_COLUMNS)
            writer.writeheader()
            for path, id_, answer, confidence in zip(
                ground_truth.paths[split], ids, answers, log_confidence, strict=True
            ):
                row = {"path": path, "exhibit_id": "" if id_ < 0 else id_, "predicted_id": answer}
                writer.writerow({**row, "log_confidence": repr(float(confidence))})
    (folder / "results.json").write_text(json.dumps(results | changes))
    (folder / "config.yaml").write_text(yaml.safe_dump({"root": str(root), "database": "full"}))
    return folder


@pytest.fixture
def museum(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_museum_files(tmp_path / "museum")


def write_two(museum: Path, **changes: Any) -> None:
    for seed, name in enumerate(("first", "second")):
        write_run(Path(name), museum, seed, **changes)


def compare(*arguments: object) -> dict[str, Any]:
    main(["compare", *map(str, arguments), "--output", "out"])
    return json.loads(Path("out/comparison.json").read_text())


def error_of(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["compare", *map(str, arguments)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    return error


def test_what_each_run_took_stands_beside_its_interval(museum):
    interval = {metric: [0.25, 0.75] for metric in METRICS}
    rows = {"a": {"all": 1902, "reused": 902}, "b": {}}  # one of before does not say
    for seed, (name, seconds, memory) in enumerate((("a", 12.4, 1.25), ("b", 1234.0, None))):
        write_run(Path(name), museum, seed, seconds=seconds, peak_memory_gb=memory)
        of_run = results(name) | {"rows": rows[name]}
        of_run |= {split: of_run[split] | {"intervals": {"queries": interval}} for split in ("val", "test")}
        Path(name, "results.json").write_text(json.dumps(of_run))
    compare("a", "b")
    costs = markdown_tables(Path("out/comparison.md").read_text())[-1]
    assert costs[0] == ["run", "GAP val", "GAP test", "seconds", "rows reused", "GB"]
    shown = f"{100 * results('a')['test']['gap']:.2f} (25–75)"
    assert costs[1][2:] == [shown, "12", "902 of 1,902", "1.25"] and costs[2][3:] == ["1,234", "–", "–"]


def results(folder: str) -> dict[str, Any]:
    return json.loads(Path(folder, "results.json").read_text())


def markdown_tables(text: str) -> list[list[list[str]]]:
    tables: list[list[list[str]]] = []
    for block in re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE):
        rows = [[cell.strip().strip("*") for cell in line.strip("|").split(" | ")] for line in block.splitlines()]
        tables.append([rows[0], *rows[2:]])
    return tables


def test_every_format_gives_the_runs_figures(museum, capsys):
    write_two(museum)
    compare("first", "second")

    with Path("out/comparison.csv").open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert [(line["run"], line["kind"], line["split"]) for line in lines] == [
        (name, "measured", split) for name in ("first", "second") for split in ("val", "test")
    ]
    for line in lines:
        for metric in METRICS:
            assert float(line[metric]) == results(line["run"])[line["split"]][metric]

    header, *rows = markdown_tables(Path("out/comparison.md").read_text())[0]
    assert header[3:] == [f"{split} {metric}" for split in ("val", "test") for metric in ("GAP", "GAP⁻", "ACC")]
    latex = Path("out/comparison.tex").read_text()
    printed = capsys.readouterr().out
    for name, row in zip(("first", "second"), rows, strict=True):
        expected = [f"{100 * results(name)[split][metric]:.2f}" for split in ("val", "test") for metric in METRICS]
        assert row == [name, "3", "50", *expected]
        assert f"{name} & 3 & 50 & {' & '.join(expected)} \\\\" in latex
        assert re.search(rf"{name} +3 +50 +{' +'.join(map(re.escape, expected))}", printed)
    with Image.open("out/comparison.png") as picture:
        assert picture.width > 1000
    drawing = Path("out/comparison.svg").read_text()
    assert "first" in drawing and "GAP" in drawing and "published" not in drawing


def test_what_runs_say_does_not_steer_the_terminal(museum, capsys):
    write_run(Path("first"), museum, 0)
    write_run(Path("second"), museum, 1, data=results("first")["data"] | {"root": "a\x1b[31m", "fingerprint": "0"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib's of a missing glyph would hold it
        compare("first", "second")
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "a\N{REPLACEMENT CHARACTER}[31m" in printed


def test_differences_are_second_minus_first_on_the_same_queries(museum):
    write_run(Path("first"), museum, 0, right=0.4)
    write_run(Path("second"), museum, 1, right=0.9)
    comparison = compare("first", "second")
    assert comparison["baseline"] == "first"
    for pair in comparison["differences"]:
        assert list(pair["by_unit"]) == ["photographers", "classes", "queries"]
        for figures in pair["by_unit"].values():
            for metric in METRICS:
                found = figures[metric]
                difference = results("second")[pair["split"]][metric] - results("first")[pair["split"]][metric]
                assert found["difference"] == pytest.approx(difference, abs=1e-12)
                assert found["low"] <= found["high"]
    [_, _, differences] = markdown_tables(Path("out/comparison.md").read_text())
    accuracy = comparison["differences"][1]["by_unit"]["photographers"]["acc"]
    assert differences[1][0] == "second"
    shown = [float(value.replace("−", "-")) for value in re.findall(r"[+−]?\d+\.\d", differences[1][3])]
    assert shown == pytest.approx([100 * accuracy[key] for key in ("difference", "low", "high")], abs=0.051)
    said = "draw, with repeats, photographers with all their met queries (a query that names none alone), and single"
    assert said in Path("out/comparison.md").read_text()


def test_photographers_are_drawn_as_the_ground_truth_names_them(museum):
    first, second = (read_run(write_run(Path(name), museum, seed)) for seed, name in enumerate(("first", "second")))
    [_, on_test] = paired_differences(first, second, photographers_of(first))
    taken_by = np.array([*(i % 3 for i in range(12)), *[-1] * 6])
    answers = [(run.answers["test"].log_confidence, run.answers["test"].predicted_ids) for run in (first, second)]
    expected = paired_intervals(*answers, first.answers["test"].exhibit_ids, taken_by)
    assert on_test.by_unit["photographers"] == expected


def test_without_the_ground_truth_classes_are_drawn_and_it_is_said(museum, capsys):
    write_two(museum)
    museum.rename("elsewhere")
    comparison = compare("first", "second")
    assert list(comparison["differences"][0]["by_unit"]) == ["classes", "queries"]
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "the ground truth of first is not where it was" in printed
        and "draw, with repeats, exhibits with all their" in printed
    )
    write_museum_files(museum, seed=5)  # something else in its place
    assert photographers_of(read_run(Path("first"))) is None


def test_runs_on_other_data_are_in_tables_of_their_own(museum, capsys):
    other = write_museum_files(Path("other"), seed=7)
    write_run(Path("first"), museum, 0)
    write_run(Path("foreign"), other, 1)
    write_run(Path("second"), museum, 2)
    comparison = compare("first", "foreign", "second")
    text = Path("out/comparison.md").read_text()
    here, there, on_val, on_test = markdown_tables(text)
    assert [row[0] for row in here[1:]] == ["first", "second"]
    assert [row[0] for row in there[1:]] == ["foreign"]
    assert [row[0] for row in on_val[1:]] == [row[0] for row in on_test[1:]] == ["second"]
    assert "figures of different tables do not compare" in text
    assert {pair["left_out"] for pair in comparison["differences"] if pair["run"] == "foreign"} == {
        "measured on other queries"
    }
    assert "left out, measured on other queries: foreign" in " ".join(capsys.readouterr().out.split())


def test_runs_without_a_query_in_common_get_a_sentence_and_no_empty_table(museum, tmp_path, capsys):
    other = write_museum_files(tmp_path / "other", seed=5, n_met=9)
    write_run(Path("first"), museum, 0)
    write_run(Path("foreign"), other, 1)
    compare("first", "foreign")
    printed, text = " ".join(capsys.readouterr().out.split()), Path("out/comparison.md").read_text()
    assert all(len(table) > 1 for table in markdown_tables(text)) and len(markdown_tables(text)) == 2
    for split in ("val", "test"):
        said = f"{split}: difference to first: left out, measured on other queries: foreign"
        assert said in printed and said in text


def test_the_same_queries_against_another_database_are_compared_and_it_is_said(museum, capsys):
    write_run(Path("first"), museum, 0)
    data = results("first")["data"] | {"database": "mini", "fingerprint": "0" * 64}
    write_run(Path("second"), museum, 1, data=data)
    comparison = compare("first", "second")
    assert all(pair["left_out"] is None for pair in comparison["differences"])
    assert "of another data set than first" in " ".join(capsys.readouterr().out.split())
    assert len(markdown_tables(Path("out/comparison.md").read_text())) == 4


def test_published_figures_of_a_frozen_network_say_whose_they_are(museum, capsys):
    frozen = next(file for file in FROZEN if file.stem == "dinov2_g")
    write_run(Path("ours"), museum, 0)
    of_row = results_of_frozen(frozen)
    changes = {name: of_row[name] for name in of_row.keys() - {"val", "test"}}
    Path("ours/results.json").write_text(json.dumps(results("ours") | changes))
    comparison = compare("ours")
    rows = markdown_tables(Path("out/comparison.md").read_text())[0][2:]
    assert rows == [
        ["published (test, DINOv2 paper, Table 9)", *[""] * 5, "36.80", "73.60", "76.50"],
        ["published (test, DINOv3 paper, Table 9)", *[""] * 5, "44.60", "", ""],
    ]
    assert [row["gap_minus"] for row in comparison["runs"][0]["published"]] == [pytest.approx(0.736), None]
    printed = capsys.readouterr().out
    assert "each under the split that it was measured on" in printed and "the report's tables" not in printed
    with Path("out/comparison.csv").open(newline="") as stream:
        assert [line["acc"] for line in csv.DictReader(stream) if line["kind"] == "published"][1] == ""


def test_published_figures_stand_under_their_own_split(museum, capsys):
    row = results_of("r50_in")
    changes = {key: row[key] for key in ("model", "whitening", "knn")}
    changes["data"] = row["data"] | {"root": "met", "fingerprint": "1" * 64}
    write_run(Path("r50"), museum, 0, **changes)
    comparison = compare("r50")
    [[_, measured, on_val, on_test]] = markdown_tables(Path("out/comparison.md").read_text())
    assert measured[0] == "r50"
    assert on_val == ["published (val)", "7", "50", "31.58", "51.77", "55.81", "", "", ""]
    assert on_test == ["published (test)", "", "", "", "", "", "22.20", "41.80", "46.40"]
    assert [(row["split"], row["gap"]) for row in comparison["runs"][0]["published"]] == [
        ("val", pytest.approx(0.3158)),
        ("test", pytest.approx(0.222)),
    ]
    with Path("out/comparison.csv").open(newline="") as stream:
        published = [line for line in csv.DictReader(stream) if line["kind"] == "published"]
    assert [(line["split"], float(line["acc"]), line["source"]) for line in published] == [
        ("val", pytest.approx(0.5581), "report, Table 1"),
        ("test", pytest.approx(0.464), "Met paper"),
    ]
    assert r"\textit{published (val)} & \textit{7}" in Path("out/comparison.tex").read_text()
    assert "published, on the same split" in Path("out/comparison.svg").read_text()
    note = "published (val): report, Table 1; published (test): Met paper; each under the split that it was measured on"
    assert f"- {note}" in Path("out/comparison.md").read_text()
    assert "tables say test, but were measured on val" in " ".join(capsys.readouterr().out.split())


def test_notes_of_the_evaluations_are_kept_with_the_runs_they_are_true_of(museum):
    write_run(Path("first"), museum, 0, notes=["RANDOM WEIGHTS"])
    write_run(Path("second"), museum, 1, notes=["RANDOM WEIGHTS"])
    write_run(Path("third"), museum, 2, knn={"k": 1, "tau": 1.0, "tuned_on": None, "grid": None})
    compare("first", "second", "third")
    text = Path("out/comparison.md").read_text()
    assert "- RANDOM WEIGHTS (first, second)" in text and "- k, τ fixed; test scored once (third)" in text


def test_a_run_with_a_calibrated_confidence_is_told_from_one_without(museum):
    calibration = {"features": ["lead"], "mean": [0.1], "scale": [0.1], "coefficients": [1.0], "intercept": 0.0}
    used = {"is_used": True, "plain_gap": 0.4, "calibrated_gap": 0.5, "n_background": 20}
    used["calibration"] = calibration | {"strength": 0.1}
    write_run(Path("first"), museum, 0)
    write_run(Path("second"), museum, 1, confidence=used)
    write_run(Path("third"), museum, 2, confidence={"is_used": False, "plain_gap": None, "calibrated_gap": None})
    recorded = [run["confidence"] for run in compare("first", "second", "third")["runs"]]
    assert [confidence and confidence["is_used"] for confidence in recorded] == [None, True, False]
    text = Path("out/comparison.md").read_text()
    assert "- confidence: calibrated: GAP 50.00 on parts of val held out, 40.00 without (second)" in text
    assert "too few right or wrong answers to fit another (third)" in text


def test_names_that_markup_would_swallow(museum):
    write_run(Path("a_b&50%|[x]"), museum, 0)
    write_run(Path("x/run"), museum, 1)
    write_run(Path("y/run"), museum, 2)
    comparison = compare("a_b&50%|[x]", "x/run", "y/run")
    assert [run["name"] for run in comparison["runs"]][1:] == ["x/run", "y/run"]
    assert r"a\_b\&50\%|[x] & 3" in Path("out/comparison.tex").read_text()
    assert r"a_b&50%\|\[x\]" in Path("out/comparison.md").read_text()


def test_a_comparison_replaces_an_earlier_one_and_has_a_dated_folder_otherwise(museum):
    write_run(Path("first"), museum, 0)
    compare("first")
    compare("first")
    main(["compare", "first"])
    [folder] = Path("runs").glob("20*_compare")
    assert {file.suffix for file in folder.iterdir()} == {".md", ".csv", ".tex", ".json", ".png", ".svg"}


def test_what_cannot_be_compared_ends_in_one_line(museum, capsys):
    write_run(Path("first"), museum, 0)
    assert "nowhere: not a finished evaluation" in error_of(capsys, "first", "nowhere")
    Path("loop").symlink_to("loop")
    assert "loop: not a finished evaluation" in error_of(capsys, "first", "loop")
    assert "named twice" in error_of(capsys, "first", "./first")
    assert "runs" in error_of(capsys)


def test_no_heavy_library_is_imported(museum):
    write_run(Path("first"), museum, 0)
    code = """if True:
        import sys
        from metilr.cli import main
        main(["compare", "first", "--output", "out"])
        print("imported", *({"torch", "torchvision", "timm", "pytorch_lightning", "faiss", "cv2"} & sys.modules.keys()))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].split() == ["imported"]


def test_queries_are_the_same_in_another_unicode_form(museum):
    write_two(museum)
    composed, decomposed = (
        run._replace(answers={split: a._replace(paths=(e, *a.paths[1:])) for split, a in run.answers.items()})
        for run, e in zip(map(read_run, (Path("first"), Path("second"))), ("\u00e9.jpg", "e\u0301.jpg"), strict=True)
    )
    assert [each.left_out for each in paired_differences(composed, decomposed, None)] == [None, None]


def test_a_run_s_name_runs_no_formula_and_breaks_no_line(museum):
    hostile, plain = "=1+1\n\x0c\u2028run", "plain"
    texts = []
    for name in (hostile, plain):
        write_run(Path(name), museum, 0)
        compare(name)
        texts.append({kind: Path(f"out/comparison.{kind}").read_text() for kind in ("md", "tex", "csv")})
    for kind in ("md", "tex"):
        assert len(texts[0][kind].splitlines()) == len(texts[1][kind].splitlines())
    assert "=1+1\ufffd\ufffd\ufffdrun" in texts[0]["md"] and "=1+1???run" in texts[0]["tex"]
    with Path("out/comparison.csv").open("w+", newline="") as stream:
        stream.write(texts[0]["csv"])
        stream.seek(0)
        assert {row["run"] for row in csv.DictReader(stream)} == {f"'{hostile}"}
