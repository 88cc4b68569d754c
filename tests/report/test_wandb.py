"""What an evaluation logs to W&B, without a key or a network."""

import json
from pathlib import Path

import pytest

from metilr.errors import UserError
from tests.small_runs import evaluate

CHEAP = {"backbone": "r18_in", "weights": "random", "accelerator": "cpu", "num_workers": 0, "report_pictures": 1}


@pytest.fixture(autouse=True)
def without_a_key(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no netrc
    monkeypatch.chdir(tmp_path)


def test_an_offline_run_holds_figures_curves_failures_and_the_report(tiny_museum):
    results = evaluate(tiny_museum, output=Path("out"), **CHEAP)
    assert results is not None
    [folder] = Path("out/wandb").glob("offline-run-*")
    assert list(folder.glob("*.wandb"))
    media = {str(file.relative_to(folder / "files" / "media")) for file in (folder / "files" / "media").rglob("*.*")}
    for part in ("precision_recall", "plots/tuning", "plots/risk_coverage", "tuning", "val/failures", "test/failures"):
        assert any(part in name for name in media), part
    [tuning] = (folder / "files" / "media" / "table").glob("tuning_*.json")
    rows = json.loads(tuning.read_text())["data"]
    best = max(gap for _, _, gap in rows)
    assert best == pytest.approx(results.val.gap)
    [failures] = (folder / "files" / "media" / "table" / "test").glob("failures_*.json")
    wrong = [row for row in json.loads(failures.read_text())["data"] if row[3] == "wrong"]
    assert len(wrong) == round((1 - results.test.acc) * 4)
    staged = [file for file in Path("out/wandb/artifacts").rglob("*") if file.is_file()]
    assert any(b"<title>museum: r18_in" in file.read_bytes() for file in staged)


def test_without_a_service_the_results_are_kept(tiny_museum, monkeypatch, capsys):
    def fail(**_):
        raise RuntimeError("no service here")

    monkeypatch.setattr("wandb.init", fail)
    evaluate(tiny_museum, output=Path("out"), **CHEAP)
    assert "W&B cannot start (no service here)" in capsys.readouterr().err
    assert Path("out/results.json").exists()


def test_a_service_that_dies_in_the_middle_loses_nothing(tiny_museum, monkeypatch, capsys):
    class Dead:
        id, offline = "x", True

        @property
        def summary(self):
            raise BrokenPipeError("the service has gone")

    monkeypatch.setattr("wandb.init", lambda **_: Dead())
    evaluate(tiny_museum, output=Path("out"), **CHEAP)
    assert "the service has gone" in capsys.readouterr().err
    assert Path("out/results.json").exists() and Path("out/report/index.html").exists()


def test_online_without_a_key_is_refused_before_any_work(tiny_museum):
    with pytest.raises(UserError, match="wandb online: no key"):
        evaluate(tiny_museum, wandb="online", **CHEAP)
    assert not Path("runs").exists()
