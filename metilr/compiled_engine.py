"""A backbone compiled by PyTorch: a few graphs serve all image shapes and batch sizes."""

import contextlib
from unittest import mock

import torch
from timm.layers import padding
from torch import Tensor
from torch._dynamo import config as compiler_config
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch.fx.experimental import _config as shape_config

from metilr.errors import UserError
from metilr.models.features import Backbone, Features

MOST_GRAPHS = 16  # see CompiledEngine


class CompiledEngine:
    """Images to features, as ``Backbone.forward``.

    Heights and widths are unknowns of a graph; PyTorch makes another where a layer would be computed by other means:
    for a batch of 1 and for one of more, on CPUs also for one of 16 and more and for small maps in a batch of 1, and
    for a ViT at its own image size. ``MOST_GRAPHS`` is above what these make together, except where average pooling
    rounds up, as in timm's ``resnet50d``: generated code tells odd from even maps at each such layer. A graph is
    compiled when it is first needed.

    What cannot be compiled whole, or needs more graphs, is refused: PyTorch's own answer is to go on uncompiled.

    Args:
        backbone: In its place on its device, in eval mode.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.compiled = torch.compile(backbone.forward, dynamic=True, fullgraph=True)

    def __call__(self, images: Tensor) -> Features:
        """Compute the features of normalised images ``(B, 3, H, W)``, for a ViT of sides that fit its patches.

        Raises:
            UserError: If PyTorch cannot compile the backbone, or not for all shapes at once.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(compiler_config.patch(recompile_limit=MOST_GRAPHS))
            # Or a first image that is square makes a graph of squares.
            stack.enter_context(shape_config.patch(use_duck_shape=False))  # type: ignore[attr-defined]
            stack.enter_context(mock.patch.object(padding, "get_same_padding", _same_padding))
            if self.backbone.patch > 1:  # timm checks the sides, with a message that makes them constants of the graph
                stack.enter_context(mock.patch.object(self.backbone.model.patch_embed, "img_size", None))
            try:
                features: Features = self.compiled(images)
            except FailOnRecompileLimitHit as error:
                raise UserError(
                    f"--engine compile: {self.backbone.name} would be compiled anew for most image shapes; "
                    "take --engine torch"
                ) from error
            except TorchDynamoException as error:
                reason = (str(error) or type(error).__name__).splitlines()[0]
                raise UserError(
                    f"--engine compile: PyTorch cannot compile {self.backbone.name} ({reason}); take --engine torch"
                ) from error
        return features


def _same_padding(side: int, kernel_size: int, stride: int, dilation: int) -> int:
    """What timm's layers add to a side, as its ``get_same_padding``, so that an unknown side stays a short formula.

    The side and what is added cancel out, and the next layer's side is 1 + (side − 1) // stride. timm's own rounding
    and maximum would stay, and nest from layer to layer: minutes of compilation.
    """
    extent = (kernel_size - 1) * dilation + 1
    added = (side - 1) // stride * stride + extent - side
    return added if extent >= stride else max(added, 0)
