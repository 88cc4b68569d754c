"""What evaluate.py --ckpt takes and what it refuses; the reference code's form is made up here, key by key."""

import json
import lzma
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.nn import functional as F

from metilr.errors import UserError
from metilr.models import ModelOptions
from metilr.models.checkpoints import (
    CLASS_WEIGHTS,
    build_model,
    load,
    load_class_weights,
    load_embedder,
    read_checkpoint,
)
from tests.small_runs import evaluate

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


@pytest.mark.parametrize(("with_projector", "sequential"), [(True, True), (False, False)])
def test_a_reference_checkpoint(tmp_path, with_projector, sequential):
    network, weight, bias = reference_checkpoint(tmp_path / "a.ckpt", projector=with_projector, sequential=sequential)
    embedder = load_embedder(tmp_path / "a.ckpt")
    assert embedder.image_size is None and embedder.scales == (1.0, 2**-0.5, 0.5)
    images = torch.randn(2, 3, 48, 64)
    with torch.no_grad():
        expected = plain_descriptors(network, images, (weight, bias) if with_projector else None)
        torch.testing.assert_close(embedder(images), expected)


@pytest.mark.parametrize("architecture", ["resnet34", "resnext50_32x4d"])
def test_the_architecture_is_read_from_the_shapes(tmp_path, architecture):
    reference_checkpoint(tmp_path / "a.ckpt", architecture)
    assert load_embedder(tmp_path / "a.ckpt").backbone.name == f"timm/{architecture}"


def test_evaluation_takes_it_and_refuses_idle_options(tiny_museum, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reference_checkpoint(Path("a.ckpt"))
    results = evaluate(root=tiny_museum, ckpt=Path("a.ckpt"), accelerator="cpu", num_workers=0, output=Path("out"))
    assert results is not None and results.model.backbone == "timm/resnet18"
    assert results.model.pooling.p == 2.5 and results.model.projector["out_dim"] == 16
    assert json.loads(Path("out/results.json").read_text())["model"]["made_with"][0]["weights_from"]["file_sha256"]
    for option in ({"backbone": "r18_in"}, {"p": 2.0}, {"weights": "random"}, {"pooling": "mac"}):
        with pytest.raises(UserError, match="no effect with ckpt"):
            evaluate(root=tiny_museum, ckpt=Path("a.ckpt"), **option)


FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture
def first_edition(tmp_path):
    """What train.py of the first edition wrote: timm/test_resnet with weights of few levels, p = 2.5, a projector."""
    file = tmp_path / "best.ckpt"
    file.write_bytes(lzma.decompress((FIXTURES / "first_edition_training.ckpt.xz").read_bytes()))
    return file


def test_a_checkpoint_of_the_first_edition_describes_as_before(first_edition):
    embedder = load_embedder(first_edition)
    image = (torch.arange(3 * 40 * 56).view(3, 40, 56) * 37 % 251).to(torch.uint8)
    with torch.no_grad():
        descriptor = embedder.describe(embedder.normalise(image[None]))
    before = [-0.47935372591018677, 0.3160717785358429, -0.0867084413766861, 0.8141255378723145]
    torch.testing.assert_close(descriptor, torch.tensor([before]), rtol=0, atol=1e-6)
    settings = embedder.describe_settings()
    assert settings["weights_sha256"] == "fed78b7dcdf56ebcfc61c5bdaafbecf2789da85c9fa9fcb3693a2d5729883d3c"
    assert settings["projector"]["sha256"] == "3da7e6d201da42c13fbfdea5fe10dcd4634906eb7a50e2b35831a1368bbb2a80"
    # In these words they stand in the stores of the first edition, which are reused.
    assert settings["pooling"] == {"kind": "gem", "p": 2.5, "p_sha256": None, "eps": 1e-06}
    assert settings["provenance"]["source"] == "checkpoint best.ckpt"
    assert embedder.image_size is None and not embedder.training


def test_a_model_is_opened_by_options_or_a_name(first_edition):
    by_options = build_model(ModelOptions(ckpt=first_edition, scales=(1,)))
    assert by_options.scales == (1,)
    assert load(first_edition).scales == load(str(first_edition)).scales == (1, 2**-0.5, 0.5)
    named = build_model(ModelOptions(backbone="timm/test_resnet", weights="random", pooling="mac", seed=2))
    assert named.pooling.settings() == {"kind": "mac"} and named.backbone.provenance.seed == 2 and not named.training
    with pytest.raises(UserError, match=r"gone\.ckpt: no such file"):
        load("gone.ckpt")
    with pytest.raises(UserError, match="backbone r18_swls: unknown; did you mean r18_swsl"):
        load("r18_swls")


def test_embed_takes_pictures_and_is_a_plain_composition(first_edition):
    """Of two sizes and modes; the network is timm's, with the file's weights."""
    state = torch.load(first_edition, weights_only=True)["state_dict"]
    network = timm.create_model("test_resnet", num_classes=0).eval()
    prefix = "embedder.backbone.model."
    network.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    weight, bias = (state[f"embedder.projector.linear.{name}"] for name in ("weight", "bias"))
    rng = np.random.default_rng(0)
    pictures = [
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for shape in ((40, 56, 3), (64, 48), (40, 56, 4))
    ]
    descriptors = load(first_edition).embed(pictures)
    assert descriptors.dtype == np.float32 and descriptors.shape == (3, 4)
    for descriptor, picture in zip(descriptors, pictures, strict=True):
        white = Image.new("RGBA", picture.size, "white")
        rgb = Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
        pixels = (torch.from_numpy(np.array(rgb)).permute(2, 0, 1)[None] / 255 - 0.5) / 0.5
        total = 0
        for scale in (1.0, 2**-0.5, 0.5):
            scaled = F.interpolate(pixels, scale_factor=scale, mode="bilinear") if scale < 1 else pixels
            with torch.no_grad():
                features = network.forward_features(scaled).clamp(min=1e-6)
            pooled = F.normalize(features.pow(2.5).mean(dim=(2, 3)).pow(1 / 2.5))
            total = total + F.normalize(pooled @ weight.T + bias)
        np.testing.assert_allclose(descriptor, F.normalize(total)[0], atol=1e-5)


def test_embed_resizes_to_what_the_model_was_trained_with(first_edition):
    content = torch.load(first_edition, weights_only=True)
    content["metilr"]["model"]["image_size"] = 96
    torch.save(content, first_edition)
    resized, plain = load(first_edition), load(first_edition)
    assert resized.image_size == 96
    plain.image_size = None
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 48, 3), dtype=np.uint8))
    larger = picture.resize((77, 96), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(resized.embed([picture]), plain.embed([larger]))


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
    with pytest.raises(UserError, match=r"missing: backbone\.model\.layer4\.1\.conv2\.weight"):
        load_embedder(file)
    content["metilr"] = {"format": "metilr.checkpoint/99"}
    torch.save(content, file)
    with pytest.raises(UserError, match="another version"):
        load_embedder(file)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda content: content["metilr"].pop("classifier"), "holds no classifier"),
        (lambda content: content["state_dict"].pop(CLASS_WEIGHTS), CLASS_WEIGHTS),
        (lambda content: content["metilr"].update(classifier={"exhibit_ids": [1, 2, 3]}), "cannot be read"),
        (lambda content: content["metilr"].update(classifier={"exhibit_ids": torch.arange(4)}), "do not belong"),
        (lambda content: content["metilr"].update(classifier={"exhibit_ids": torch.ones(3)}), "do not belong"),
        (lambda content: content["state_dict"].update({CLASS_WEIGHTS: torch.ones(1).expand(3, 2**20)}), "claims more"),
        (lambda content: content["state_dict"].update({CLASS_WEIGHTS: torch.zeros(3, 2)}), "all of a class are 0"),
        (lambda content: content["state_dict"].update({CLASS_WEIGHTS: torch.full((3, 2), torch.nan)}), "not finite"),
    ],
)
def test_class_weights_are_read_or_refused(tmp_path, damage, said):
    weights, ids = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]]), torch.tensor([12, 5, 9])
    content = {"state_dict": {CLASS_WEIGHTS: weights}, "metilr": {"classifier": {"exhibit_ids": ids}}}
    torch.save(content, tmp_path / "a.ckpt")
    read = load_class_weights(tmp_path / "a.ckpt")
    assert read.rows.tolist() == [[1, 0], [0, 2], [3, 4]] and read.exhibit_ids.tolist() == [12, 5, 9]
    damage(content)
    torch.save(content, tmp_path / "b.ckpt")
    with pytest.raises(UserError, match=said) as caught:
        load_class_weights(tmp_path / "b.ckpt")
    assert "b.ckpt" in str(caught.value) and len(str(caught.value).splitlines()) == 1
