"""The soak's own judgement, and a small one from end to end."""

import csv
import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from metilr.data.ground_truth import load_ground_truth
from tests.forks import Popen

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MB, N = 1_000_000, 10_000


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def attempt(values, done=None, status=0):
    """An attempt whose samples are evenly spread over N images."""
    import soaking

    done = np.linspace(0, N, len(values)).round().astype(int) if done is None else done
    at = zip(np.asarray(done).tolist(), np.asarray(values).astype(int).tolist(), strict=True)
    samples = [soaking.Sample(float(i), n, value, value, 7, 3, 3) for i, (n, value) in enumerate(at)]
    return soaking.Attempt(samples, status)


def judged(attempts, capsys):
    """Exit status and record of a report."""
    import soaking

    status = soaking.report("title", N, attempts, [], None)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("{"))
    return status, json.loads(line)


def noise(n=400):
    return 700 * MB + np.random.default_rng(0).normal(0, 20 * MB, n)


def warming(n=400):
    """Grows in the first sixth, and no more."""
    return 400 * MB * np.minimum(1, np.arange(n) / (n / 6))


def test_a_steady_run_is_flat(capsys):
    status, record = judged([attempt(noise() + warming())], capsys)
    assert status == 0
    assert record["command_bytes"]["flat"] and abs(record["command_bytes"]["fitted"]) < 20


def test_a_leak_is_found(capsys):
    bytes_an_image = 10_000
    leak = bytes_an_image * np.linspace(0, N, 400)
    status, record = judged([attempt(noise() + warming() + leak)], capsys)
    assert status == 1
    assert record["command_bytes"]["fitted"] == pytest.approx(bytes_an_image * N / MB, abs=20)
    assert record["faults"][0].startswith("anonymous memory of the command")


def test_growth_is_found_by_the_tenths_or_by_the_slope(capsys):
    late = np.where(np.arange(400) > 370, 65 * MB, 0)
    dropped = np.where(np.arange(400) > 360, 0, np.linspace(0, 400 * MB, 400))
    for grown, by, other in ((late, "tenths", "fitted"), (dropped, "fitted", "tenths")):
        status, record = judged([attempt(noise() + grown)], capsys)
        assert status == 1 and record["command_bytes"][other] < 50 < record["command_bytes"][by]


def test_the_longest_attempt_is_judged(capsys):
    leak = attempt(40_000 * np.linspace(0, N / 3, 200), np.linspace(0, N / 3, 200).astype(int), -9)
    steady = attempt(noise(), np.linspace(N / 3, N, 400).astype(int))
    status, record = judged([leak, steady], capsys)
    assert status == 0 and record["killed_at"] == [N // 3]


def test_a_run_of_few_samples_is_not_judged(capsys):
    status, record = judged([attempt(noise(20))], capsys)
    assert status == 0 and record["command_bytes"] is None


def test_a_command_is_watched_with_its_children_and_killed(tmp_path, monkeypatch):
    import soaking

    monkeypatch.setattr(soaking, "SECONDS_BETWEEN", 0.02)
    ready = tmp_path / "ready"
    child = f"import time; x = bytes([1]) * 50_000_000; open({str(ready)!r}, 'w'); time.sleep(8)"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    lived = soaking.attempt([sys.executable, "-c", code], tmp_path / "log", lambda: int(ready.exists()), 1)
    last = lived.samples[-1]
    assert lived.status == -9 and last.done == 1
    assert last.processes == 2 and last.all_bytes > 50 * MB > last.command_bytes > 0


def test_an_evaluation_from_end_to_end(tmp_path, monkeypatch, forks):
    import soak
    import soaking

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(soaking, "subprocess", SimpleNamespace(Popen=partial(Popen, forks)))
    monkeypatch.setattr(soaking, "SECONDS_BETWEEN", 0.02)
    root = soak.make_museum(tmp_path / "museum", 0.0002)
    truth = load_ground_truth(root, "mini")
    options = ["--backbone", "timm/test_resnet", "--weights", "random", "--scales", "1", "--report", "false"]
    attempts = soak.run_to_the_end(root, tmp_path, truth, 0, options)
    n_images = sum(map(len, truth.paths.values()))
    store, output = tmp_path / "store", tmp_path / "out"
    assert soak.faults(attempts, truth, store, output) == []

    rows = np.load(store / "database.npy", mmap_mode="r+")
    rows[3] = 0
    rows.flush()
    file = output / "predictions/val.csv"
    lines = list(csv.reader(file.open()))
    with file.open("w") as stream:
        csv.writer(stream).writerows(lines[:-1])
    attempts[-1].samples.append(attempts[-1].samples[-1]._replace(done=0))
    attempts[-1].samples[-2] = attempts[-1].samples[-2]._replace(done=1)
    assert [each.split(":")[0] for each in soak.faults(attempts, truth, store, output)] == [
        "described rows were lost", f"the store holds {n_images - 1} of {n_images} rows", "val",
    ]  # fmt: skip
    (output / "results.json").unlink()
    assert (
        soak.faults(attempts, truth, store, output)[-1]
        == f"no results: the last run ended with status {attempts[-1].status}"
    )
