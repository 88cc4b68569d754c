"""The report page in a real browser: from disk, on made-up and on real-sized data."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metilr.data.ground_truth import QUERY_FILES, load_ground_truth
from metilr.evaluation.options import MethodOptions
from metilr.evaluation.recognition import Recognition
from metilr.evaluation.results import Results
from metilr.evaluation.runs import summarise
from metilr.extraction.descriptors import Descriptors
from metilr.report.page import FEATURES, OUTCOMES, arrange, write_gallery, write_report
from metilr.retrieval.confidence import feature_names
from metilr.retrieval.knn import Matches, Predictions, Tuning
from tests.browser import browser as browser  # a fixture
from tests.museum import write_museum
from tests.small_runs import evaluate, pretend_fit

# The tiny museum's labels by exhibit: 9, 12, 33, 41, 70, 500. Val shows 9, 70, 41, 9 and three distractors.
ANSWERS = Predictions(
    labels=np.array([0, 0, 3, 1, 2, 5, -1]),
    log_confidence=np.array([-0.5, -0.1, -0.01, -2.0, -0.2, -3.0, -np.inf]),
    similarity=np.full(7, 0.5),
    nearest=np.array([2, 2, 4, 6, 7, 5, -1]),
)
ROWS = np.array([[2, 0], [2, 0], [4, 5], [6, 2], [7, 6], [5, -1], [-1, -1]])
SIMILARITIES = [[0.9, 0.5], [0.8, 0.7], [0.9, 0.1], [0.6, 0.55], [0.5, 0.4], [0.3, np.nan], [np.nan, np.nan]]
HOSTILE = "<img src=x onerror=alert(1)>.jpg"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """An evaluation of the tiny museum, one query of which has HTML in its name."""
    folder = tmp_path_factory.mktemp("report")
    root = write_museum(folder / "museum")
    file = root / "ground_truth" / "testset.json"
    entries = json.loads(file.read_text())
    (root / "images" / entries[0]["path"]).rename(root / "images" / "test_met" / HOSTILE)
    entries[0]["path"] = f"test_met/{HOSTILE}"
    file.write_text(json.dumps(entries))
    evaluate(
        root, store=folder / "store", output=folder / "out", backbone="timm/test_resnet", weights="random",
        scales=[1.0], accelerator="cpu", num_workers=0, wandb="off",
    )  # fmt: skip
    return folder / "out"


def open_page(browser, file: Path, width: int = 1400):
    """The page, loaded; what goes wrong in it is collected."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.errors = []
    page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("dialog", lambda dialog: (page.errors.append("dialog"), dialog.dismiss()))
    page.goto(file.as_uri())
    return page


def count(page) -> tuple[int, int]:
    shown, _, total, _ = page.locator("#count").inner_text().replace(",", "").split()
    return int(shown), int(total)


def test_figures_are_those_of_the_results_and_html_in_a_file_name_is_text(browser, run):
    page = open_page(browser, run / "report" / "index.html")
    results = json.loads((run / "results.json").read_text())
    for split in QUERY_FILES:
        for name in ("gap", "gap_minus", "acc"):
            shown = page.locator(f"[data-figure='{split}.{name}']").inner_text()
            assert float(shown) == pytest.approx(100 * results[split][name], abs=0.005)
        for name, value in results[split]["ranking"].items():
            shown = page.locator(f"[data-figure='{split}.{name}']").inner_text()
            assert float(shown) == pytest.approx(100 * value, abs=0.005)
    assert page.locator("[data-figure]").count() == 2 * 7
    knn = results["knn"]
    assert f"k = {knn['k']}, τ = {knn['tau']:g} tuned by GAP on val" in page.locator("#figures").inner_text()
    assert page.locator("figure svg").count() == 5 and page.locator("#confidence, a[href='#confidence']").count() == 0
    assert HOSTILE in page.locator("#cards").inner_text() and page.locator("img[src=x]").count() == 0
    reached = set()
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.name || document.activeElement.hash || ''"))
    assert {"#gallery", "split", "show", "search"} <= reached
    assert page.errors == []


def with_confidence(browser, run, output):
    evaluate(
        run.parent / "museum", descriptors=[run.parent / "store"], output=output, confidence="calibrated", wandb="off"
    )
    page = open_page(browser, output / "report" / "index.html", 360)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360 and page.errors == []
    return page, json.loads((output / "results.json").read_text())["confidence"]


def test_a_calibrated_confidence_is_shown_with_its_weights_and_what_it_is_worth(browser, run, tmp_path, monkeypatch):
    pretend_fit(monkeypatch)
    page, recorded = with_confidence(browser, run, tmp_path / "out")
    section = page.locator("#confidence")
    said = " ".join(section.inner_text().split())
    assert "Calibrated: GAP 45.67 on parts of val held out, 40.00 without. Background: none, as val has too few" in said
    assert [row.split("\t") for row in section.locator("tbody tr").all_inner_texts()] == [
        ["similarity to the answer", "+1.25"],
        ["lead over the next exhibit", "+0.50"],
        ["mean similarity to the ten nearest images", "−0.75"],
    ]
    for split, error in recorded["calibration_error"].items():
        assert f"{split}: error {100 * error:.1f}" in section.locator("svg").text_content()
    assert "a probability of 90% to be right" in page.locator("#open-set").inner_text()


def test_a_calibrated_confidence_that_is_not_used_is_shown_without_weights(browser, run, tmp_path, monkeypatch):
    page, _ = with_confidence(browser, run, tmp_path / "unfitted")  # too small a museum
    said = page.locator("#confidence").inner_text()
    assert "That of the classifier, as val has too few right or wrong answers" in said and "Background" not in said
    pretend_fit(monkeypatch, gains=False)
    page, _ = with_confidence(browser, run, tmp_path / "no gain")
    assert "Not calibrated, as that gains nothing: GAP 30.00" in page.locator("#confidence").inner_text()
    assert page.locator("#confidence svg").count() == 1 and page.locator("#confidence table").count() == 0


def test_each_feature_of_a_calibrated_confidence_has_words():
    assert [*FEATURES] == feature_names(is_checked=True, n_background=20)


def test_filters_search_and_pages_change_the_gallery(browser, run):
    page = open_page(browser, run / "report" / "index.html")
    assert count(page) == (7, 7) and page.locator("#cards > li").count() == 7
    shown = {}
    for choice in ("wrong", "right", "false alarm", "distractor", "low margin"):
        page.select_option("select[name=show]", choice)
        shown[choice] = count(page)[0]
        assert page.locator("#cards > li").count() == shown[choice]
    assert shown["wrong"] + shown["right"] == 4 and shown["distractor"] == 3
    assert 1 <= shown["low margin"] < 4  # the lower quartile of the margins of four met queries
    page.select_option("select[name=show]", "all")
    page.fill("input[name=search]", "500")
    assert 1 <= count(page)[0] < 7
    assert all("500" in title for title in page.locator("#cards h3").all_inner_texts())
    page.fill("input[name=search]", "no such exhibit")
    assert count(page)[0] == 0
    page.fill("input[name=search]", "")
    page.check("input[value=val]")
    assert "test_met/val0.jpg" in page.locator("#cards").inner_text()
    assert page.errors == []


@pytest.mark.parametrize("width", [360, 1400])
def test_it_fits_narrow_and_wide_windows_and_loads_its_pictures(browser, run, width):
    page = open_page(browser, run / "report" / "index.html", width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator("#cards > li").last.scroll_into_view_if_needed()
    page.wait_for_function("[...document.querySelectorAll('#cards li:last-child img')].every(i => i.naturalWidth > 0)")
    assert page.locator("#cards img").count() >= 7
    for true_exhibit in page.locator(".picture.true").all():
        box, card = true_exhibit.bounding_box(), true_exhibit.locator("xpath=ancestor::li").bounding_box()
        assert card["x"] <= box["x"] and box["x"] + box["width"] <= card["x"] + card["width"]
    assert page.errors == []


def test_nineteen_thousand_queries(browser, met_root, tmp_path):
    truth = load_ground_truth(met_root, "mini")
    rng = np.random.default_rng(0)
    answers, matches, ranks, database = {}, {}, {}, truth.labels["database"]
    for split in QUERY_FILES:
        labels = truth.labels[split]
        rows = rng.integers(0, len(database), (len(labels), 5))
        predicted = np.where((rng.random(len(labels)) < 0.5) & (labels >= 0), labels, database[rows[:, 0]])
        matches[split] = Matches(rows, -np.sort(-rng.random(rows.shape), axis=1))
        confidence = -rng.exponential(1, len(labels))
        ranks[split] = np.where(labels >= 0, np.where(predicted == labels, 1, 20), np.nan)
        answers[split] = Predictions(predicted, confidence, matches[split].similarities[:, 0], rows[:, 0])
    recognition = Recognition(answers, None, 1, 50.0, Tuning(1, 50.0, np.array([[0.1]]), (1,), (50.0,)), matches, ranks)
    is_made = {split: np.ones(len(paths), bool) for split, paths in truth.paths.items()}
    model = {"backbone": "r18_in", "pooling": {"kind": "gem", "p": 3}, "scales": [1]}
    opened = Descriptors({"database": [np.zeros((1, 2))]}, is_made, [{"model": model}])
    results = summarise(
        truth, recognition, opened, MethodOptions(), None, options={}, synthetic=False, seconds=1.0, n_made=0
    )
    page = open_page(browser, write_report(tmp_path, results, truth, recognition, quiet=True))
    assert count(page) == (19319, 19319) and page.locator("#cards > li").count() == 24
    page.click("#next")
    assert page.locator("#page").inner_text().startswith("page 2 of ")
    page.select_option("select[name=show]", "wrong")
    assert count(page)[0] == 1003 - (answers["test"].labels == truth.labels["test"]).sum()
    assert "photographers" in page.locator("#figures").inner_text()
    assert page.errors == []


@pytest.fixture
def answered(tiny_museum):
    matches, splits = Matches(ROWS, np.array(SIMILARITIES)), ("val", "test")
    recognition = Recognition(dict.fromkeys(splits, ANSWERS), None, 1, 50.0, None, dict.fromkeys(splits, matches), {})
    return load_ground_truth(tiny_museum), recognition


def test_failures_come_first_and_pictures_go_to_the_first_of_each_outcome(answered):
    gallery = arrange(*answered, "val", threshold=-1.0)
    outcomes = [OUTCOMES[outcome] for outcome in gallery.outcomes]
    assert outcomes == ["right", "wrong", "right", "wrong", "false alarm", "passed over", "passed over"]
    assert gallery.order.tolist() == [1, 3, 4, 0, 2, 5, 6]  # wrong: surest first; right: least sure first
    assert gallery.first(1) == [1, 4, 0, 5] and sorted(gallery.first(9)) == list(range(7))
    no_threshold = arrange(*answered, "val", threshold=None)
    assert "false alarm" not in {OUTCOMES[outcome] for outcome in no_threshold.outcomes}


@pytest.mark.parametrize(
    ("size", "turns", "said"),
    [(None, 1, "images at their own size"), (40, 1, "longest side 40 px"), ([40, 40], 8, "squares of 40 px")],
)
def test_the_page_says_what_became_of_the_images(run, answered, tmp_path, size, turns, said):
    results = json.loads((run / "results.json").read_text())
    results["model"]["image_size"] = size
    gate = {"weight": 1, "enough": 9}
    results["geometric_check"] = {"candidates": 5, "reorder": False, "boost": 0, "gate": gate, "features": {}}
    results["geometric_check"]["turns"] = turns
    page = write_report(tmp_path, Results.model_validate(results), *answered, quiet=True).read_text()
    assert f"precision 32, {said}</dd>" in page
    assert ("5 candidates, queries in 8 turns, gate" in page) == (turns == 8)


def test_what_is_written(answered, tmp_path):
    truth, recognition = answered
    (truth.image(truth.paths["val"][3])).write_bytes(b"no image")
    galleries = {split: arrange(truth, recognition, split, -1.0) for split in ("val", "test")}
    assert write_gallery(tmp_path, truth, recognition, galleries, 9, None, quiet=True) == 1  # is missing
    text = (tmp_path / "gallery.js").read_text()
    content = json.loads(text.removeprefix("window.GALLERY = ").removesuffix(";\n"))
    assert set(content["pictures"]) == {file.stem for file in (tmp_path / "pictures").iterdir()}
    assert "val3" not in content["pictures"] and {"val0", "test6", "d2", "d4"} <= set(content["pictures"])
    row, path, kind, label, answer, outcome, log_confidence, margin, *found = content["splits"]["val"][0]
    assert (row, path, kind) == (1, truth.paths["val"][1], "met")
    assert [content["exhibits"][label], content["exhibits"][answer]] == [70, 9]
    assert (content["outcomes"][outcome], log_confidence) == ("wrong", -0.1)
    assert margin == pytest.approx(0.1) and found == [[2, 0], [0.8, 0.7], []]
    assert content["database"]["2"] == [truth.paths["database"][2], 0]
    skipped = content["splits"]["val"][-1]
    assert skipped[4] is None and skipped[6:] == [None, None, [], [], []]
    with Image.open(tmp_path / "pictures" / "d2.jpg") as picture:
        assert max(picture.size) <= 200
