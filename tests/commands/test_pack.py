"""``metilr pack``: one checkpoint that gives the figures of the run it was made from."""

import json
from pathlib import Path

import pytest
import torch

from metilr.cli import main
from metilr.errors import UserError
from metilr.evaluation.database import load_whitening
from metilr.models.checkpoints import CLASS_WEIGHTS, load_embedder, write_checkpoint
from metilr.retrieval.whitening import LearnedWhitening, PCAWhitening
from tests.small_runs import evaluate

OPTIONS = {"accelerator": "cpu", "num_workers": 0, "report": False}
UNTRAINED = {"backbone": "timm/test_resnet", "weights": "random", **OPTIONS}


@pytest.fixture
def museum(tiny_museum, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tiny_museum


def failure(capsys, *arguments: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    return error


@pytest.mark.parametrize(("whitening", "shape"), [("pca", "keep"), ("learned", "square")])
def test_a_packed_model_gives_the_run_s_answers(museum, whitening, shape):
    evaluate(museum, output=Path("run"), image_size=48, image_shape=shape, whitening=whitening, **UNTRAINED)
    main(["pack", "run", "model.ckpt"])
    evaluate(museum, output=Path("again"), ckpt=Path("model.ckpt"), whitening="model.ckpt", **OPTIONS)
    for split in ("val", "test"):
        first, second = (Path(name, "predictions", f"{split}.csv").read_text() for name in ("run", "again"))
        assert first == second
    kind = LearnedWhitening if whitening == "learned" else PCAWhitening
    assert type(load_whitening("model.ckpt")) is kind
    recorded = json.loads(Path("again/results.json").read_text())["whitening"]
    assert recorded["source"] == "model.ckpt"
    assert recorded["sha256"] == PCAWhitening.load("run/whitening.npz").sha256()
    assert torch.load("model.ckpt", weights_only=True)["metilr"]["whitening"]["mean"].dtype == torch.float64


@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors"])
def test_class_weights_are_packed_where_they_were_searched(museum, capsys, name):
    evaluate(museum, output=Path("plain"), whitening_dim=3, **UNTRAINED)
    main(["pack", "plain", "plain.ckpt"])
    content = torch.load("plain.ckpt", weights_only=True)
    ids = torch.tensor([9, 12, 33, 41, 70, 500])
    dim = load_embedder("plain.ckpt").dim
    content["state_dict"][CLASS_WEIGHTS] = torch.randn(6, dim, generator=torch.Generator().manual_seed(0))
    content["metilr"] = {**content["metilr"], "classifier": {"exhibit_ids": ids}}
    write_checkpoint(Path("trained.ckpt"), content)
    searched = {"whitening": "none", "database_rows": "classifier", **OPTIONS}
    evaluate(museum, output=Path("run"), ckpt="trained.ckpt", **searched)
    main(["pack", "run", name])
    assert f"--ckpt {name} --whitening none --database_rows classifier" in " ".join(capsys.readouterr().out.split())
    evaluate(museum, output=Path("again"), ckpt=name, **searched)
    for split in ("val", "test"):
        first, second = (Path(of, "predictions", f"{split}.csv").read_text() for of in ("run", "again"))
        assert first == second
    write_checkpoint(
        Path("trained.ckpt"), content | {"state_dict": {**content["state_dict"], CLASS_WEIGHTS: torch.ones(6, dim)}}
    )
    assert "its class weights are not those of the evaluation" in failure(capsys, "pack", "run", "b.ckpt")


def test_what_cannot_be_packed_is_refused_in_one_line(museum, capsys):
    evaluate(museum, output=Path("plain"), store=Path("store"), whitening="none", **UNTRAINED)
    assert "evaluated without whitening" in failure(capsys, "pack", "plain", "a.ckpt")
    evaluate(museum, output=Path("descriptors"), descriptors=[Path("store")], report=False)
    assert "made from descriptors" in failure(capsys, "pack", "descriptors", "a.ckpt")
    assert "ends in .ckpt" in failure(capsys, "pack", "plain", "a.npz")
    Path("a.ckpt").touch()
    assert "is there already" in failure(capsys, "pack", "plain", "a.ckpt")


def test_a_checkpoint_without_a_whitening_is_refused(museum):
    torch.save({"state_dict": {}}, "bare.ckpt")
    with pytest.raises(UserError, match=r"bare\.ckpt: this checkpoint holds no whitening"):
        load_whitening("bare.ckpt")
    torch.save({"state_dict": {}, "metilr": {"whitening": {"kind": "odd", "mean": torch.zeros(3)}}}, "odd.ckpt")
    with pytest.raises(UserError, match=r"odd\.ckpt: its whitening cannot be read"):
        load_whitening("odd.ckpt")
