"""What evaluate.py --ckpt takes and what it refuses; the reference code's form is made up here, key by key."""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch.nn import functional as F

from metilr.commands.evaluate import evaluate
from metilr.errors import UserError
from metilr.models.checkpoints import load_embedder, read_checkpoint

CHILDREN = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}


def reference_checkpoint(file: Path, architecture: str = "resnet18", projector: bool = True, sequential: bool = True):
    """A checkpoint as the reference code saves it, and the ResNet, p, weight and bias that it holds."""
    torch.manual_seed(0)
    network = timm.create_model(architecture, pretrained=False, num_classes=0).eval()
    width = network.num_features
    state = {}
    for key, value in network.state_dict().items():
        child, _, rest = key.partition(".")
        state[f"backbone.backbone.{CHILDREN[child] if sequential else child}.{rest}"] = value
    state["backbone.pool.p"] = torch.tensor([2.5])
    weight, bias = torch.randn(16, width, 1, 1), torch.randn(1, 16)
    if projector:
        state |= {"backbone.projector.weight": weight, "backbone.projector.bias": bias}
    torch.save({"epoch": 3, "state_dict": state, "val_gap": np.float64(0.25), "optimizer": {}}, file)
    return network, weight, bias


def plain_descriptors(network, images, projector=None):
    features = network.forward_features(images).clamp(min=1e-6)
    x = F.normalize(features.pow(2.5).mean(dim=(2, 3)).pow(1 / 2.5), dim=1)
    if projector is not None:
        weight, bias = projector
        x = F.normalize(x @ weight[:, :, 0, 0].T + bias, dim=1)
    return x


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("with_projector", [True, False])
def test_a_reference_checkpoint(tmp_path, with_projector, sequential):
    network, weight, bias = reference_checkpoint(tmp_path / "a.ckpt", projector=with_projector, sequential=sequential)
    embedder = load_embedder(tmp_path / "a.ckpt")
    assert embedder.image_size is None and embedder.scales == (1.0, 2**-0.5, 0.5)
    images = torch.randn(2, 3, 48, 64)
    with torch.no_grad():
        expected = plain_descriptors(network, images, (weight, bias) if with_projector else None)
        torch.testing.assert_close(embedder(images), expected)


@pytest.mark.parametrize("architecture", ["resnet34", "resnet50", "resnext50_32x4d"])
def test_the_architecture_is_read_from_the_shapes(tmp_path, architecture):
    reference_checkpoint(tmp_path / "a.ckpt", architecture)
    assert load_embedder(tmp_path / "a.ckpt").backbone.name == f"timm/{architecture}"


def test_evaluation_takes_it_and_refuses_idle_options(tiny_museum, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reference_checkpoint(Path("a.ckpt"))
    results = evaluate(root=tiny_museum, ckpt=Path("a.ckpt"), accelerator="cpu", num_workers=0, output=Path("out"))
    assert results is not None and results["model"]["backbone"] == "timm/resnet18"
    assert results["model"]["pooling"]["p"] == 2.5 and results["model"]["projector"]["out_dim"] == 16
    assert json.loads(Path("out/results.json").read_text())["model"]["made_with"][0]["weights_from"]["file_sha256"]
    for option in ({"backbone": "r18_in"}, {"p": 2.0}, {"weights": "random"}, {"pooling": "mac"}):
        with pytest.raises(UserError, match="no effect with --ckpt"):
            evaluate(root=tiny_museum, ckpt=Path("a.ckpt"), **option)


def test_files_that_are_no_checkpoint(tmp_path):
    file = tmp_path / "a.ckpt"
    with pytest.raises(UserError, match="no such file"):
        read_checkpoint(file)
    reference_checkpoint(file)
    content = file.read_bytes()
    for damaged in (b"", b"text", content[:1000], content[: len(content) // 2], content[:-200]):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=re.escape(str(file))):
            read_checkpoint(file)
    torch.save({"weights": torch.zeros(2)}, file)
    with pytest.raises(UserError, match="no 'state_dict'"):
        read_checkpoint(file)
    torch.save({"state_dict": {"a": torch.zeros(2)}}, file)
    with pytest.raises(UserError, match="no ResNet known"):
        load_embedder(file)


def test_another_architecture_and_missing_keys(tmp_path):
    file = tmp_path / "a.ckpt"
    reference_checkpoint(file)
    content = torch.load(file, weights_only=False)
    del content["state_dict"]["backbone.backbone.7.1.conv2.weight"]
    torch.save(content, file)
    with pytest.raises(UserError, match=r"missing: layer4\.1\.conv2\.weight"):
        load_embedder(file)
    content["metilr"] = {"format": "metilr.checkpoint/99"}
    torch.save(content, file)
    with pytest.raises(UserError, match="another version"):
        load_embedder(file)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_pickle_code_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"a": torch.zeros(1)}, "extra": Evil()}, "a.ckpt")
    with pytest.raises(UserError, match="cannot be read"):
        read_checkpoint(Path("a.ckpt"))
    Path("b.ckpt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError):
        read_checkpoint(Path("b.ckpt"))
    assert not Path("executed").exists()
