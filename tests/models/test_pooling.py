import math

import pytest
import torch
from torch.nn import functional as F

from metilr.errors import UserError
from metilr.models.backbone import Features
from metilr.models.pooling import Pooling, gem, mac, rmac, rmac_regions, spoc


@pytest.fixture
def features() -> torch.Tensor:
    return torch.rand(2, 5, 4, 6, generator=torch.Generator().manual_seed(0)) * 8


def test_gem_is_the_root_of_the_mean_power(features: torch.Tensor) -> None:
    expected = features.double().clamp(min=1e-6).pow(3).mean(dim=(2, 3)).pow(1 / 3)
    torch.testing.assert_close(gem(features), expected.float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(gem(features, 1.0), features.mean(dim=(2, 3)))
    torch.testing.assert_close(gem(-features), torch.full((2, 5), 1e-6))
    torch.testing.assert_close(gem(features - 4), gem((features - 4).clamp(min=1e-6)))


def test_gem_with_large_p_tends_to_the_maximum(features: torch.Tensor) -> None:
    maximum = features.amax(dim=(2, 3))
    for p in (10.0, 100.0, 10_000.0):  # the bound is exact: the mean power is at least the peak's share of it
        pooled = gem(features, p)
        assert (pooled <= maximum).all() and (pooled >= maximum * 24 ** (-1 / p) * (1 - 1e-5)).all()


def test_gem_gradients_are_those_of_the_formula() -> None:
    # Away from ties and from the clamp, where the derivative does not exist.
    values = torch.randperm(2 * 3 * 2 * 2, generator=torch.Generator().manual_seed(0)).double()
    features = (0.5 + values / 8).view(2, 3, 2, 2).requires_grad_()
    p = torch.tensor([2.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gem, (features, p))


def test_gem_gradients_stay_finite_where_everything_is_clamped() -> None:
    features = torch.zeros(1, 2, 3, 3, requires_grad=True)
    pooling = Pooling("gem", learnable=True)
    pooling(Features(features, None)).sum().backward()
    assert features.grad is not None and features.grad.isfinite().all()
    assert pooling.p.grad is not None and pooling.p.grad.isfinite().all()


@pytest.mark.parametrize("pool", [gem, mac, spoc, rmac])
def test_pooling_is_in_float32_whatever_comes(pool, features: torch.Tensor) -> None:
    halves = torch.full((1, 2, 4, 4), 100.0, dtype=torch.float16)  # 100³ overflows float16
    assert pool(halves).dtype == torch.float32
    torch.testing.assert_close(pool(halves), pool(halves.float()))
    expected = pool(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(pool(features), expected, rtol=0, atol=0)


def test_mac_and_spoc(features: torch.Tensor) -> None:
    torch.testing.assert_close(mac(features), features.flatten(2).max(dim=2).values)
    torch.testing.assert_close(spoc(features), features.flatten(2).sum(dim=2) / 24)


def test_rmac_regions_of_a_square_map() -> None:
    # Sides 2·6/2, 2·6/3, 2·6/4; starts spread from edge to edge.
    expected = [(0, 0, 6)]
    expected += [(top, left, 4) for top in (0, 2) for left in (0, 2)]
    expected += [(top, left, 3) for top in (0, 1, 3) for left in (0, 1, 3)]
    assert rmac_regions(6, 6) == expected


def test_rmac_regions_overlap_by_about_40_percent() -> None:
    # 10x16: two squares of side 10 share 4 of 10 columns.
    regions = rmac_regions(10, 16, levels=2)
    assert [region for region in regions if region[2] == 10] == [(0, 0, 10), (0, 6, 10)]
    assert [region for region in regions if region[2] == 6] == [(t, x, 6) for t in (0, 4) for x in (0, 5, 10)]
    turned = sorted((left, top, side) for top, left, side in rmac_regions(16, 10, levels=2))
    assert turned == sorted(regions)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 2), (3, 40), (16, 16), (13, 7)])
def test_rmac_regions_lie_inside_the_map_and_cover_it(size: tuple[int, int]) -> None:
    height, width = size
    covered = torch.zeros(size)
    for top, left, side in rmac_regions(height, width):
        assert top >= 0 and left >= 0 and side > 0 and top + side <= height and left + side <= width
        covered[top : top + side, left : left + side] = 1
    if max(size) <= 4 * min(size):  # 7 squares cannot cover a longer map
        assert covered.all()


def test_rmac_sums_unit_length_regional_maxima(features: torch.Tensor) -> None:
    expected = torch.zeros(2, 5)
    for top, left, side in rmac_regions(4, 6):
        for image in range(2):
            maximum = torch.tensor([features[image, c, top : top + side, left : left + side].max() for c in range(5)])
            expected[image] += maximum / math.sqrt(sum(value**2 for value in maximum.tolist()))
    torch.testing.assert_close(rmac(features), expected)
    one_position = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)
    torch.testing.assert_close(rmac(one_position), F.normalize(one_position[..., 0, 0]))


def test_Pooling_by_name(features: torch.Tensor) -> None:
    batch = Features(features, torch.rand(2, 5), torch.rand(2, 5))
    expected = {
        "gem": gem(features, 2.0), "mac": mac(features), "spoc": spoc(features), "rmac": rmac(features),
        "cls": batch.cls, "attention": batch.attention,
    }  # fmt: skip
    for name, pooled in expected.items():
        pooling = Pooling(name, p=2.0)
        torch.testing.assert_close(pooling(batch), pooled)
        assert pooling.settings()["kind"] == name


def test_learnable_p_is_a_parameter_and_a_fixed_one_travels_with_the_state() -> None:
    assert [tuple(p.shape) for p in Pooling("gem", learnable=True).parameters()] == [(1,)]
    fixed = Pooling("gem", p=2.5)
    assert not list(fixed.parameters()) and fixed.state_dict()["p"].tolist() == [2.5]
    assert fixed.settings() != Pooling("gem").settings()


def test_wrong_options_are_refused() -> None:
    for p in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UserError, match=r"^p "):
            Pooling("gem", p=p)
    with pytest.raises(UserError, match="pooling max: unknown; choose gem, mac"):
        Pooling("max")
    with pytest.raises(UserError, match="pooling mac: has no exponent"):
        Pooling("mac", learnable=True)
