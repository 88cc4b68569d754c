import pytest
import torch
from timm.layers.hybrid_embed import HybridEmbed
from torch import nn

from metilr.errors import UserError
from metilr.models.backbone import FLOAT32_STAGES, Backbone, Features, build_backbone


@pytest.fixture
def quick_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw transformers' initial weights without truncation, which takes seconds for the smallest of them."""
    monkeypatch.setattr(
        "timm.layers.weight_init._trunc_normal_", lambda tensor, mean, std, a, b: tensor.normal_(mean, std)
    )


def images(height: int, width: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def run(backbone: nn.Module, batch: torch.Tensor) -> Features:
    with torch.no_grad():
        return backbone(batch)


def test_swins_map_has_channels_first(quick_start: None) -> None:
    backbone = build_backbone("timm/swin_tiny_patch4_window7_224", weights="random")
    batch = images(68, 96)
    with torch.no_grad():
        expected = backbone.model.forward_features(batch)  # BxHxWxC
    features = run(backbone, batch)
    assert features.map.shape == (2, 768, 3, 3)
    assert features.cls is None
    torch.testing.assert_close(features.map[:, :, 1, 2], expected[:, 1, 2])


def test_efficientnets_last_map_includes_the_head_convolution() -> None:
    backbone = build_backbone("lite0_in", weights="random")
    batch = images(64, 96)
    features = run(backbone, batch)
    assert features.map.shape == (2, 1280, 2, 3)
    with torch.no_grad():
        torch.testing.assert_close(features.map, backbone.model.forward_features(batch))
    assert run(build_backbone("lite0_in", weights="random", stage=5), batch).map.shape == (2, 320, 2, 3)


@pytest.mark.parametrize("name", ["test_vit", "deit_tiny_distilled_patch16_224"])
def test_a_vits_tokens_are_laid_out_row_by_row_after_the_prefix(name: str, quick_start: None) -> None:
    backbone = build_backbone(f"timm/{name}", weights="random")
    batch = images(32, 48)
    with torch.no_grad():
        tokens = backbone.model.forward_features(batch)
    prefix = 2 if "distilled" in name else 1
    features = run(backbone, batch)
    assert features.map.shape == (2, backbone.width, 2, 3)
    torch.testing.assert_close(features.cls, tokens[:, 0])
    for row in range(2):
        for column in range(3):
            token = tokens[:, prefix + 3 * row + column]
            torch.testing.assert_close(features.map[:, :, row, column], token)


def test_register_tokens_are_no_class_token() -> None:
    backbone = build_backbone("timm/test_vit2", weights="random")
    assert backbone.model.num_prefix_tokens == 1
    features = run(backbone, images(32, 48))
    assert features.map.shape == (2, backbone.width, 2, 3)
    assert features.cls is None and not backbone.has_cls


@pytest.mark.parametrize(("stage", "shape"), [(1, (64, 16, 24)), (3, (256, 4, 6)), (4, (512, 2, 3))])
def test_a_resnets_stages_are_its_layers(stage: int, shape: tuple[int, int, int]) -> None:
    backbone = build_backbone("r18_in", weights="random", stage=stage)
    net, batch = backbone.model, images(64, 96)
    layers = [net.conv1, net.bn1, net.act1, net.maxpool, net.layer1, net.layer2, net.layer3, net.layer4]
    with torch.no_grad():
        expected = nn.Sequential(*layers[: 4 + stage])(batch)
    features = run(backbone, batch)
    assert backbone.width == shape[0]
    assert features.map.shape == (2, *shape)
    torch.testing.assert_close(features.map, expected)


def test_what_comes_after_the_stage_is_not_computed() -> None:
    def fail(*args: object) -> None:
        raise AssertionError("computed")

    resnet = build_backbone("r18_in", weights="random", stage=3)
    resnet.model.layer4.register_forward_hook(fail)
    run(resnet, images(64, 64))
    vit = build_backbone("timm/test_vit", weights="random", stage=2)
    vit.model.blocks[2].register_forward_hook(fail)
    run(vit, images(64, 64))


def test_a_vits_stages_are_its_blocks_with_the_class_token() -> None:
    backbone = build_backbone("timm/test_vit", weights="random", stage=2)
    outputs: list[torch.Tensor] = []
    backbone.model.blocks[1].register_forward_hook(lambda module, args, output: outputs.append(output))
    features = run(backbone, images(32, 48))
    torch.testing.assert_close(features.cls, outputs[0][:, 0])
    torch.testing.assert_close(features.map[:, :, 1, 0], outputs[0][:, 1 + 3])


@pytest.mark.parametrize(
    ("name", "last"), [("r18_in", 4), ("lite0_in", 5), ("timm/test_vit", 6), ("timm/regnetx_002", 4)]
)
def test_stages_out_of_range_are_refused_with_the_range(name: str, last: int) -> None:
    build_backbone(name, weights="random", stage=last)
    for stage in (0, last + 1, -1):
        with pytest.raises(UserError, match=f"stage {stage}: {name} has stages 1 to {last}"):
            build_backbone(name, weights="random", stage=stage)


def test_sizes_are_fitted_to_the_patch() -> None:
    nearest = build_backbone("timm/test_vit", weights="random")
    assert nearest.patch == 16
    assert nearest.fit_size(500, 333) == (496, 336)
    assert nearest.fit_size(24, 23) == (32, 16)  # half-way goes up
    assert nearest.fit_size(1, 7) == (16, 16)
    down = build_backbone("timm/test_vit", weights="random", patch_rounding="down")
    assert down.fit_size(500, 351) == (496, 336)
    assert down.fit_size(15, 16) == (16, 16)
    off = build_backbone("timm/test_vit", weights="random", patch_rounding="off")
    assert off.fit_size(32, 48) == (32, 48)
    with pytest.raises(UserError, match=r"patch_rounding off: .*50 px.*16 px; take nearest"):
        off.fit_size(32, 50)
    any_size = build_backbone("r18_in", weights="random", patch_rounding="off")
    assert any_size.patch == 1 and any_size.fit_size(37, 501) == (37, 501)
    nearest.patch = 7
    assert nearest.fit_size(10, 11) == (7, 14)
    assert nearest.fit_size(3, 500) == (7, 497)


def test_a_family_without_intermediates_still_gives_its_last_map() -> None:
    # As in timm's lower bound, where several convolutional families lack forward_intermediates.
    backbone = build_backbone("r18_in", weights="random")
    with torch.no_grad():
        expected = backbone(images(64, 64)).map

    class Older(nn.Module):
        num_features = 512

        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.forward_features = model.forward_features

    older = type(backbone)(Older(backbone.model), "old", (0.0,) * 3, (1.0,) * 3, backbone.provenance)
    torch.testing.assert_close(run(older, images(64, 64)).map, expected)
    with pytest.raises(UserError, match="stage 2: timm gives only the last stage of old"):
        type(backbone)(Older(backbone.model), "old", (0.0,) * 3, (1.0,) * 3, backbone.provenance, stage=2)


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("r18_in", 1),
        ("timm/convnext_atto", 4 * 2**3),  # a stem of 4x4 patches, then three halvings by 2x2 kernels
        ("timm/densenet121", 29),  # 29, 15, 8 px by two padded halvings, then 4, 2, 1 by three that are not
        ("timm/swin_tiny_patch4_window7_224", 4),
        ("timm/test_vit", 16),
    ],
)
def test_the_smallest_side_is_where_the_network_begins_to_work(name: str, least: int, quick_start: None) -> None:
    backbone = build_backbone(name, weights="random")
    assert backbone.least_side == least
    assert run(backbone, images(least, least)).map.shape == (2, backbone.width, 1, 1)
    if least > 1:
        with pytest.raises((AssertionError, RuntimeError)):
            run(backbone, images(least - 1, least - 1))


def test_a_hybrid_s_sides_are_rounded_to_what_its_stem_and_patches_take_together(quick_start: None) -> None:
    backbone = build_backbone("timm/vit_tiny_r_s16_p8_224", weights="random")
    assert backbone.patch == 4 * 8  # a ResNet's stem, then patches
    assert backbone.fit_size(63, 500) == (64, 512)
    batch = images(64, 96)
    with torch.no_grad():
        tokens = backbone.model.forward_features(batch)
    assert tokens.shape[1] == 1 + 2 * 3
    torch.testing.assert_close(run(backbone, batch).map[:, :, 1, 0], tokens[:, 1 + 3])


@pytest.mark.parametrize(("padding", "patch"), [(0, 1), (1, 4)])
def test_a_hybrid_whose_stem_rounds_down_as_timm_counts_takes_any_size(padding: int, patch: int) -> None:
    stem = nn.Conv2d(3, 8, kernel_size=4 - padding, stride=4, padding=padding)
    vit = build_backbone("timm/test_vit", weights="random")
    vit.model.patch_embed = HybridEmbed(stem, img_size=32, embed_dim=8, proj=False)
    assert Backbone(vit.model, "hybrid", vit.mean, vit.std, vit.provenance).patch == patch


def test_a_network_that_takes_no_long_image_is_refused(quick_start: None) -> None:
    with pytest.raises(UserError, match=r"timm/mvitv2_tiny: it gives no .* for a 1x777 image \(IndexError.*; choose a"):
        build_backbone("timm/mvitv2_tiny", weights="random")


def test_first_stages_keep_float32_unless_they_are_trained() -> None:
    """What a frozen network's maps train is then compared with maps that were computed without gradients."""
    backbone = build_backbone("timm/test_efficientnet", "random").eval()
    batch = images(97, 130)

    def early() -> torch.Tensor:
        seen: list[torch.Tensor] = []
        hook = backbone.model.blocks[FLOAT32_STAGES - 1].register_forward_hook(lambda *made: seen.append(made[2]))
        with torch.autocast("cpu", torch.bfloat16):
            backbone(batch)
        hook.remove()
        return seen[0]

    trained = early()
    with torch.no_grad():
        described = early()
    backbone.requires_grad_(False)
    frozen = early()
    assert (described.dtype, trained.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(frozen, described)
