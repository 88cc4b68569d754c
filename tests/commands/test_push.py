"""``metilr push``: what arrives on a Hub of this machine gives the run's answers, and its card the run's figures."""

import re
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import yaml

from metilr.cli import main
from metilr.commands.push import push
from metilr.evaluation.read_run import read_run
from tests.hub import TOKEN, Hub
from tests.small_runs import evaluate

OPTIONS = {"accelerator": "cpu", "num_workers": 0, "report": False}
UNTRAINED = {"backbone": "timm/test_resnet", "weights": "random", **OPTIONS}


@pytest.fixture
def museum(tiny_museum: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tiny_museum


def test_a_published_model_gives_the_run_s_answers_and_its_card_the_figures(hub: Hub, museum, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    evaluate(museum, output=Path("run"), whitening_dim=7, k=1, **UNTRAINED)
    address = push(Path("run"), "anna/museum")
    assert hub.repositories["anna/museum"].is_private
    files = hub.files("anna/museum")
    assert files.keys() == {"model.safetensors", "README.md"}
    evaluate(museum, output=Path("again"), ckpt="hf://anna/museum", whitening=address, k=1, **OPTIONS)
    for split in ("val", "test"):
        first, second = (Path(name, "predictions", f"{split}.csv").read_text() for name in ("run", "again"))
        assert first == second

    card, results = files["README.md"].decode(), read_run(Path("run")).results
    told = huggingface_hub.ModelCard(card).data  # as the Hub's own library reads it
    assert told.library_name == "metilr" and "license" not in told.to_dict()
    measured = {(each.dataset_split, each.metric_type): each.metric_value for each in told.eval_results}
    assert measured == {
        (split, name): getattr(figures, name)
        for split, figures in results.splits.items() for name in ("gap", "gap_minus", "acc")
    }  # fmt: skip
    assert len(set(results.test.intervals[results.unit]["gap"])) == 2
    for split, figures in results.splits.items():
        low, high = figures.intervals[results.unit]["gap"]
        cell = f"{100 * figures.gap:.2f} ({100 * low:.0f}–{100 * high:.0f})"
        assert re.search(rf"^\| {split} \| 4 of 7 \| {re.escape(cell)} \|", card, re.M)
    for said in ("k = 1 fixed", "test scored once", "RANDOM WEIGHTS", "95% intervals"):
        assert said in card
    [block] = re.findall(r"^```yaml\n(.*?)^```", card, re.M | re.S)
    made = yaml.safe_load(block)
    assert made["options"]["whitening_dim"] == 7 and made["options"]["root"] == "museum"
    assert made["knn"]["tuned_on"] == "val" and made["whitening"]["dim"] == 7
    assert made["data"]["fingerprint"] == results.data.fingerprint
    assert made["weights"] == {"source": "random", "licence": None}
    here = str(museum.parent).encode()
    assert not [name for name, content in files.items() if here in content]  # no folder of this machine

    capsys.readouterr()
    main(["push", "run", "anna/open", "--public"])
    assert "hf://anna/open@" in capsys.readouterr().out and not hub.repositories["anna/open"].is_private


def test_a_licence_is_handed_on_and_a_run_without_whitening_has_none(hub: Hub, museum, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    evaluate(museum, output=Path("run"), whitening="none", **UNTRAINED)
    monkeypatch.setattr("metilr.commands.push.packed", lambda _: content)
    entry = {"provenance": {"source": "x", "licence": "cc-by-nc-4.0"}, "config": {}, "format": "y"}
    content = {"state_dict": {}, "metilr": entry}
    push(Path("run"), "anna/museum")
    files = hub.files("anna/museum")
    assert huggingface_hub.ModelCard(files["README.md"].decode()).data.license == "cc-by-nc-4.0"
    assert "--whitening none --root DIR" in files["README.md"].decode()
    assert safetensors.torch.load(files["model.safetensors"]) == {}


def failure(capsys, *arguments: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    return error


def test_what_cannot_be_published_is_refused_in_one_line(hub: Hub, museum, monkeypatch, capsys):
    evaluate(museum, output=Path("run"), store=Path("store"), **UNTRAINED)
    evaluate(museum, output=Path("descriptors"), descriptors=[Path("store")], report=False)
    assert "museum: is no name of a repository; write OWNER/NAME" in failure(capsys, "push", "run", "museum")
    assert "anna/net: no token; hf auth login, or set HF_TOKEN" in failure(capsys, "push", "run", "anna/net")
    assert hub.requests == []
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "anna/net: cannot be published (" in failure(capsys, "push", "run", "anna/net")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "made from descriptors" in failure(capsys, "push", "descriptors", "anna/net")
    hub.set_offline(monkeypatch)
    assert "anna/net: cannot be published (" in failure(capsys, "push", "run", "anna/net")
    assert hub.repositories == {}
