"""Large networks with one narrow block in place of their many: everything else of theirs, in a second."""

import pytest
import timm

SMALL = {"depth": 1, "embed_dim": 96, "num_heads": 4}


def make_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let timm build each ViT with ``SMALL`` in place of its own depth, width and heads."""
    build = timm.create_model

    def build_small(name: str, **options: object) -> object:
        return build(name, **({**SMALL, **options} if name.startswith("vit_") else options))

    monkeypatch.setattr(timm, "create_model", build_small)
