"""Large networks with one narrow block in place of their many: everything else of theirs, in a second."""

import pytest
import timm
import torch
from torch import nn

SMALL = {"depth": 1, "embed_dim": 96, "num_heads": 4}


def make_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let timm build each ViT with ``SMALL`` in place of its own depth, width and heads."""
    build = timm.create_model

    def build_small(name: str, **options: object) -> object:
        return build(name, **({**SMALL, **options} if name.startswith("vit_") else options))

    monkeypatch.setattr(timm, "create_model", build_small)


def with_statistics(network: nn.Module) -> nn.Module:
    """Give norms statistics such as training leaves: those of a new network change next to nothing."""
    generator = torch.Generator().manual_seed(0)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for values in (norm.weight.data, norm.running_var):
                values.uniform_(0.5, 1.5, generator=generator)
            for values in (norm.bias.data, norm.running_mean):
                values.uniform_(-0.2, 0.2, generator=generator)
    return network.eval()
