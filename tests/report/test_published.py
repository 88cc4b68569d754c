"""Published figures against the configurations' headers, which state them too, and against what a run is."""

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import yaml

from metilr.evaluation.results import Results
from metilr.models.zoo import BACKBONES
from metilr.report.published import PUBLISHED, Published, published
from tests.commands.test_evaluate import REPOSITORY
from tests.evaluation.test_results import CONFIDENCE

REPORT_BACKBONES = sorted({row.backbone for row in PUBLISHED if row.pooling == "gem"})
FROZEN = sorted((REPOSITORY / "configs" / "eval" / "foundation").glob("*.yaml"))


COUNTS_OF_ANOTHER = dict.fromkeys(
    ("database_images", "exhibits", "val_queries", "test_queries", "val_met", "test_met"), 8
)
GEOMETRIC_CHECK = {"candidates": 5, "reorder": False, "boost": 0, "gate": {"weight": 1, "enough": 9}, "features": {}}


def results_of(backbone: str = "r18_in", database: str = "full") -> dict:
    """What results.json would say of a published row, reduced to what is read."""
    size = {"full": (397121, 224408), "mini": (38307, 33501)}[database]
    counts = {"database_images": size[0], "exhibits": size[1]}
    counts |= {"val_queries": 2165, "test_queries": 19319, "val_met": 129, "test_met": 1003}
    return {
        "schema_version": 1,
        "data": {"root": "met", "database": database, "synthetic": False, "counts": counts, "fingerprint": "1" * 64},
        "model": {
            "backbone": backbone,
            "stage": None,
            "projector": None,
            "image_size": None,
            "pooling": {"kind": "gem", "p": 3.0, "p_sha256": None, "eps": 1e-6},
            "scales": [1.0, 0.5**0.5, 0.5],
            "made_with": [{"weights_from": {"source": BACKBONES[backbone].url, "file_sha256": "0" * 64}}],
        },
        "whitening": {"source": "learned on the database", "dim": 512, "shrinkage": 1.0},
        "knn": {"k": 1, "tau": 1.0, "tuned_on": "val", "grid": {"k": [1, 2], "tau": [1, 50]}},
        "skipped_images": [],
        "elements": {"visits": 0, "database_views": "none", "query_crops": []},
        **{split: {"gap": 0.5, "gap_minus": 0.5, "acc": 0.5, "n_queries": 2, "n_met": 1} for split in ("val", "test")},
    }


def known(results: dict) -> tuple[Published, ...]:
    return published(Results.model_validate(results))


@pytest.mark.parametrize("backbone", REPORT_BACKBONES)
def test_the_figures_are_those_of_the_configuration_s_header(backbone):
    header = (REPOSITORY / "configs" / "eval" / f"{backbone}.yaml").read_text()
    three = r"GAP +([\d.]+), GAP- +([\d.]+), ACC +([\d.]+)"
    stated = re.findall(rf"#   (full|mini)  k +(\d+), tau +(\d+): {three}", header)
    on_test = re.findall(rf"on test, full .*?: {three}", header)
    assert {database for database, *_ in stated} == {"full", "mini"}
    for database, *numbers in stated:
        rows = {row.split: row for row in known(results_of(backbone, database))}
        on_val = rows["val"]
        assert [on_val.k, on_val.tau, *percents(on_val)] == pytest.approx([*map(float, numbers)])
        assert "report" in on_val.source
        assert ("test" in rows) == (database == "full" and bool(on_test))
        if "test" in rows:
            assert percents(rows["test"]) == pytest.approx([*map(float, on_test[0])]) and "paper" in rows["test"].source


def percents(row) -> list[float]:
    return [100 * row.gap, 100 * row.gap_minus, 100 * row.acc]


def test_val_accuracies_are_multiples_of_a_129th():
    """What betrays that the report's "test" tables were measured on val, whose met queries are 129."""
    on_val = np.array([129 * row.acc for row in PUBLISHED if row.split == "val"])
    assert np.abs(on_val - on_val.round()).max() < 0.013  # 0.01 %, as they cut off rather than round
    assert len(on_val) == 20 and len([row for row in PUBLISHED if row.pooling == "gem"]) == 24


def results_of_frozen(config: Path) -> dict:
    """What results.json would say of the row of a configuration."""
    options = yaml.safe_load(config.read_text())
    results = results_of()
    results["model"] |= {
        "backbone": options["backbone"],
        "pooling": {"kind": options["pooling"]},
        "image_size": [512, 512] if options.get("image_shape") == "square" else options["image_size"],
        "scales": options["scales"],
        "made_with": [{"weights_from": {"source": f"hf-hub:{options['backbone']}"}}],
    }
    if config.stem == "dinov2_s":
        results["whitening"]["dim"] = 384
    return results


frozen_rows = pytest.mark.parametrize("config", FROZEN, ids=lambda file: file.stem)


@frozen_rows
def test_timm_names_the_place_of_the_weights_as_the_model(config):
    name = yaml.safe_load(config.read_text())["backbone"]
    if not timm.is_model(name[5:].partition(".")[0]):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    assert timm.models.get_pretrained_cfg(name[5:]).hf_hub_id == name


@frozen_rows
def test_the_figures_of_frozen_networks_are_those_of_their_configurations_headers(config):
    number = r"([\d.]+)"
    header = re.findall(rf"#   (.*): GAP {number}(?:, GAP- {number}, ACC {number})?\n", config.read_text())
    stated = {(source, *(float(each) for each in numbers if each)) for source, *numbers in header}
    rows = known(results_of_frozen(config))
    assert {(row.source, *(round(100 * each, 2) for each in figures_of(row) if each)) for row in rows} == stated
    assert stated and all((row.split, row.database) == ("test", "full") for row in rows)


def figures_of(row: Published) -> tuple:
    return row.gap, row.gap_minus, row.acc


@frozen_rows
@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("model", "scales", [1.0, 0.5]),
        ("model", "pooling", {"kind": "spoc"}),
        ("model", "pooling", {"kind": "gem", "p": 3.0}),
        ("model", "made_with", [{"weights_from": {"source": "random"}}]),
        ("model", "made_with", [{"weights_from": {"source": "model.safetensors", "file_sha256": "0" * 64}}]),
        ("model", "backbone", "r18_in"),
        ("data", "database", "mini"),
        ("whitening", "source", "learned from pairs"),
        ("whitening", "dim", 128),
        ("knn", "tuned_on", None),
        ("elements", "query_crops", [0.5]),
        (None, "geometric_check", GEOMETRIC_CHECK),
    ],
)
def test_nothing_is_published_of_another_frozen_row(config, part, key, value):
    results = results_of_frozen(config)
    (results if part is None else results[part])[key] = value
    assert known(results) == ()


def test_a_size_that_is_stated_decides_and_so_do_k_and_tau(tmp_path):
    keep, square, large = (
        results_of_frozen(next(file for file in FROZEN if file.stem == stem))
        for stem in ("dinov3_l", "dinov3_l_square", "dinov3_7b")
    )
    assert [row.image_size for results in (keep, square) for row in known(results)] == [512, (512, 512)]
    keep["model"]["image_size"] = 448
    assert known(keep) == ()
    large["model"]["image_size"] = 448
    large["knn"] = {"k": 5, "tau": 20.0, "tuned_on": None, "grid": None}
    assert [row.source for row in known(large)] == ["public logs"]
    for k, tau in ((5, 50.0), (7, 20.0)):
        assert known(large | {"knn": large["knn"] | {"k": k, "tau": tau}}) == ()


@frozen_rows
def test_the_whitening_is_as_wide_as_the_network_allows(config):
    results = results_of_frozen(config)
    results["whitening"]["dim"] = 512 if config.stem == "dinov2_s" else 384
    assert known(results) == ()


CHANGES = {
    "synthetic": ("data", "synthetic", True),
    "another collection": ("data", "counts", COUNTS_OF_ANOTHER),
    "another backbone": ("model", "backbone", "lite0_in"),
    "a fine-tuned backbone": ("model", "made_with", [{"weights_from": {"source": "checkpoint best.ckpt"}}]),
    "random weights": ("model", "made_with", [{"weights_from": {"source": "random", "file_sha256": None}}]),
    "nothing known of the weights": ("model", "made_with", []),
    "a projector": ("model", "projector", {"dim": 512}),
    "an earlier stage": ("model", "stage", 3),
    "resized images": ("model", "image_size", 224),
    "another pooling": ("model", "pooling", {"kind": "mac"}),
    "single scale": ("model", "scales", [1.0]),
    "no whitening": (None, "whitening", None),
    "plain PCA": ("whitening", "shrinkage", 0.0),
    "k and tau given": ("knn", "tuned_on", None),
    "images left out": (None, "skipped_images", [{"path": "x"}]),
    "visits": ("elements", "visits", 3),
    "prototypes": ("elements", "database_rows", "prototypes"),
    "database-side augmentation": ("elements", "dba", 3),
    "a geometric check": (None, "geometric_check", GEOMETRIC_CHECK),
    "a calibrated confidence": (None, "confidence", CONFIDENCE),
    "several models": (None, "model", {"concatenated": [{}, {}]}),
    "no model known": (None, "model", {"file": "descriptors.pkl"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_is_published_of_another_experiment(change):
    part, key, value = CHANGES[change]
    results = results_of()
    before = copy.deepcopy(results)
    (results if part is None else results[part])[key] = value
    assert known(results) == ()
    assert len(known(before)) == 2


def test_a_local_copy_of_the_official_file_is_official():
    results = results_of()
    results["model"]["made_with"] = [{"weights_from": {"source": "mine.pth", "file_sha256": "f37072fd" + "0" * 56}}]
    assert len(known(results)) == 2
    results["model"]["made_with"].append({"weights_from": {"source": "random"}})
    assert known(results) == ()
