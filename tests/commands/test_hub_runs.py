"""Commands with a checkpoint, weights and a whitening from the Hub: recorded by commit, opened again from the cache."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml

from metilr.cli import main
from metilr.errors import UserError
from metilr.models.embedder import build_embedder
from tests.hub import Hub
from tests.small_runs import TRAIN, evaluate, index

OPTIONS = {"accelerator": "cpu", "num_workers": 0, "report": False}


@pytest.fixture
def commit(hub: Hub, tiny_museum: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of a packed run on the Hub, as ``anna/museum``; the run is ``run``."""
    monkeypatch.chdir(tmp_path)
    evaluate(tiny_museum, output=Path("run"), store=Path("a"), backbone="timm/test_resnet", weights="random", **OPTIONS)
    main(["pack", "run", "model.safetensors"])
    return hub.put("anna/museum", {"model.safetensors": Path("model.safetensors").read_bytes()})


def answers(folder: str) -> str:
    return Path(folder, "predictions/test.csv").read_text()


def test_an_evaluation_names_the_commit_and_is_opened_and_repeated_without_a_network(hub, commit, tiny_museum, capsys):
    address = f"hf://anna/museum@{commit}/model.safetensors"
    given = ["--root", str(tiny_museum), "--ckpt", "hf://anna/museum", "--whitening", "hf://anna/museum"]
    given += ["--accelerator", "cpu", "--num_workers", "0", "--report", "false", "--store", "b", "--output", "again"]
    main(["evaluate", *given])
    assert answers("again") == answers("run")
    results = json.loads(Path("again/results.json").read_text())
    config = yaml.safe_load(Path("again/config.yaml").read_text())
    for options in (results["options"], config):
        assert options["ckpt"] == options["whitening"] == address
    [session] = results["model"]["made_with"]
    assert session["weights_from"]["source"] == f"checkpoint {address}"

    hub.put("anna/museum", {"model.safetensors": b"another"})  # the newest is another one now
    with pytest.raises(SystemExit):
        main(["evaluate", *given])
    assert "is finished, with other options (ckpt: " in capsys.readouterr().err
    hub.stop()
    main(["rerun", "again", "--output", "repeated"])
    assert "the figures agree exactly" in capsys.readouterr().out and answers("repeated") == answers("run")
    photo = next((tiny_museum / "images/test_met").iterdir())
    main(["identify", str(photo), "--run", "again"])
    ours = capsys.readouterr().out
    main(["identify", str(photo), "--run", "run"])
    assert ours == capsys.readouterr().out
    main(["identify", str(photo), "--run", "run", "--ckpt", address])  # the same model by another name
    assert ours == capsys.readouterr().out
    main(["pack", "again", "again.ckpt"])
    assert torch.load("again.ckpt", weights_only=True)["metilr"]["config"]["ckpt"] == address


def test_an_index_names_the_commit_and_is_opened_without_a_network(hub, commit, tiny_museum, capsys):
    index(tiny_museum / "images/MET", Path("index"), ckpt="hf://anna/museum", accelerator="cpu", num_workers=0)
    written = json.loads(Path("index/index.json").read_text())
    assert written["model"]["ckpt"] == written["options"]["ckpt"] == f"hf://anna/museum@{commit}/model.safetensors"
    hub.stop()
    index(tiny_museum / "images/MET", Path("index"), ckpt="hf://anna/museum", accelerator="cpu", num_workers=0)
    assert "finished already" in capsys.readouterr().out
    main(["identify", str(next((tiny_museum / "images/test_met").iterdir())), "--store", "index"])
    assert "similarity" in capsys.readouterr().out


def test_a_training_records_the_commit_of_its_weights(hub, tiny_museum, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = build_embedder("timm/test_resnet", "random", seed=5).backbone.model.state_dict()
    commit = hub.put("anna/net", {"model.safetensors": safetensors.torch.save(state)})
    address = f"hf://anna/net@{commit}/model.safetensors"
    command = [*TRAIN, "--data.root", tiny_museum, "--model.weights", "hf://anna/net", "--trainer.max_epochs", 1]
    main([str(part) for part in command])
    assert yaml.safe_load(Path("out/config.yaml").read_text())["model"]["weights"] == address
    entry = torch.load("out/best.ckpt", weights_only=True)["metilr"]
    assert entry["config"]["model"]["weights"] == entry["provenance"]["source"] == address


def test_an_address_that_leads_nowhere_names_the_option(hub, commit, tiny_museum, capsys):
    for option in ("ckpt", "weights", "whitening"):
        with pytest.raises(SystemExit) as stop:
            main(["evaluate", "--root", str(tiny_museum), f"--{option}", "hf://anna/none"])
        printed = capsys.readouterr().err
        assert stop.value.code == 2 and f"error: --{option} hf://anna/none: no such repository" in printed
    with pytest.raises(UserError, match="ckpt hf://anna/none: no such repository"):
        index(tiny_museum / "images/MET", Path("index"), ckpt="hf://anna/none")
    assert not Path("index").exists() and not Path("runs").exists()
