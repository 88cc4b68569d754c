"""What an evaluation logs to W&B, without a key or a network."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from metilr.errors import UserError
from tests.small_runs import evaluate, pretend_fit

CHEAP = {
    "backbone": "timm/test_resnet", "weights": "random", "scales": [1.0], "accelerator": "cpu", "num_workers": 0,
    "report_pictures": 1, "output": Path("out"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def without_a_key(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no netrc
    monkeypatch.chdir(tmp_path)


def test_an_offline_run_holds_figures_curves_failures_and_the_report(tiny_museum):
    results = evaluate(tiny_museum, **CHEAP)
    [folder] = Path("out/wandb").glob("offline-run-*")
    assert list(folder.glob("*.wandb"))
    media = folder / "files" / "media"
    names = {str(file.relative_to(media)) for file in media.rglob("*.*")}
    for part in ("precision_recall", "plots/tuning", "plots/risk_coverage", "tuning", "val/failures", "test/failures"):
        assert any(part in name for name in names), part
    [tuning] = (media / "table").glob("tuning_*.json")
    assert max(gap for _, _, gap in json.loads(tuning.read_text())["data"]) == pytest.approx(results.val.gap)
    [failures] = (media / "table" / "test").glob("failures_*.json")
    wrong = [row for row in json.loads(failures.read_text())["data"] if row[3] == "wrong"]
    assert len(wrong) == round((1 - results.test.acc) * 4)
    staged = [file for file in Path("out/wandb/artifacts").rglob("*") if file.is_file()]
    assert any(b"<title>museum: " in file.read_bytes() for file in staged)


def test_a_run_in_another_working_folder_is_whole_too(tiny_museum, tmp_path, monkeypatch):
    for name in ("first", "second"):  # one service writes for both, and stays where it was started
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        evaluate(tiny_museum, report=False, **CHEAP)
        assert list(Path("out/wandb").glob("offline-run-*/*.wandb")), name


def test_a_home_that_cannot_be_written_is_one_line(tiny_museum, tmp_path, forks):
    """Of W&B; and none of matplotlib, as a new process shows, which imports it."""
    (tmp_path / "home").touch()  # no folder, whoever asks
    command = [
        *("evaluate", "--root", tiny_museum, "--backbone", "timm/test_resnet", "--weights", "random", "--scales", 1),
        *("--accelerator", "cpu", "--num_workers", 0, "--output", tmp_path / "out", "--quiet", "true"),
        *("--report_pictures", 1, "--wandb", "offline"),
    ]
    home = {"HOME": str(tmp_path / "home")}
    setup = "import os, sys; del os.environ['WANDB_MODE']; sys.stdout = open('printed', 'w')"
    done = forks.wait(forks.start(tmp_path / "here", command, setup, env=home))
    [line] = done.printed.splitlines()
    assert done.status == 0 and "W&B cannot write" in line and "out/wandb" in line
    assert list(Path("out/wandb").glob("offline-run-*/*.wandb"))

    shutil.copytree("out", "again", ignore=shutil.ignore_patterns("wandb"))
    command = [sys.executable, "-m", "metilr", "compare", "out", "again", "--output", "compared"]
    compared = subprocess.run(command, env={**os.environ, **home}, capture_output=True, text=True, timeout=120)
    assert (compared.returncode, compared.stderr) == (0, "") and Path("compared/comparison.png").exists()


class Kept:
    """A run that keeps what it is told."""

    id, offline = "x", True

    def __init__(self, **_):
        self.summary, self.told = {}, {}
        self.log, self.finish, self.log_artifact = self.told.update, lambda: None, lambda _: None


@pytest.mark.parametrize("confidence", ["softmax", "calibrated"])
def test_a_calibrated_confidence_is_told_from_the_classifiers(tiny_museum, monkeypatch, confidence):
    kept = Kept()
    monkeypatch.setattr("wandb.init", lambda **_: kept)
    pretend_fit(monkeypatch)
    results = evaluate(tiny_museum, confidence=confidence, report=False, **CHEAP)
    told = {name: value for name, value in kept.summary.items() if "calibrat" in name}
    if confidence == "softmax":
        assert told == {} and "plots/reliability" not in kept.told
        return
    errors = results.confidence.calibration_error
    assert told == {
        "is_calibrated": True,
        "val/calibration_error": errors["val"],
        "test/calibration_error": errors["test"],
    }
    assert "plots/reliability" in kept.told


class Dead:
    id, offline = "x", True

    @property
    def summary(self):
        raise BrokenPipeError("the service has gone")


def fail(**_):
    raise RuntimeError("no service here")


@pytest.mark.parametrize(
    ("init", "said"), [(fail, "W&B cannot start (no service here)"), (lambda **_: Dead(), "the service has gone")]
)
def test_without_a_service_and_with_one_that_dies_the_results_are_kept(tiny_museum, monkeypatch, capsys, init, said):
    monkeypatch.setattr("wandb.init", init)
    evaluate(tiny_museum, report=False, **CHEAP)
    assert said in capsys.readouterr().err and Path("out/results.json").exists()


def test_online_without_a_key_is_refused_before_any_work(tiny_museum):
    with pytest.raises(UserError, match="wandb online: no key"):
        evaluate(tiny_museum, wandb="online", **CHEAP)
    assert not Path("out").exists()
