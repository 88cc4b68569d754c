"""Gradients of a backbone on a CPU, in bounded memory: a few images at a time, by fused convolutions."""

import contextlib
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from timm.layers import padding
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from timm.models import EfficientNet
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from metilr.models.backbone import Backbone
from metilr.models.embedder import Embedder

KEPT = 1_000_000_000  # bytes of a call's maps: with all else that a training holds, less than 3 GB


def in_parts(embedder: Embedder, images: Tensor) -> Tensor:
    """Embed normalised images ``(B, 3, H, W)`` on the CPU as the embedder does, ``(B, dim)``, to train an EfficientNet.

    A few images at a time, since half of a step's time goes into getting the pages of large maps from the kernel. Maps
    of as many as ``KEPT`` holds are kept for the backward pass, those of others computed again. Each row depends on its
    image alone. Other networks, for which this takes longer, frozen ones, and those that save memory their own way are
    computed whole.
    """
    backbone, images = embedder.backbone, images.contiguous(memory_format=torch.channels_last)
    is_trained = any(parameter.requires_grad for parameter in backbone.parameters())
    if not is_trained or not pairs_of(backbone) or backbone.model.grad_checkpointing:
        whole: Tensor = embedder(images)
        return whole

    joined = joined_weights(backbone)

    def embed(part: Tensor) -> Tensor:
        with fused(joined):
            embeddings: Tensor = embedder(part)
        return embeddings

    sizes: dict[int, int] = {}  # of what the first part keeps, by address

    def counted(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # itself would be a ring that nobody breaks without a backward pass

    n_images = 4 if torch.is_autocast_enabled("cpu") else 2  # of 320 px: no map takes 32 MB, which malloc hands back
    first, *others = images.split(n_images)
    with torch.autograd.graph.saved_tensors_hooks(counted, _unchanged):
        made = [embed(first)]
    n_kept = max(0, KEPT // max(1, sum(sizes.values())) - 1)  # of the others
    made += [embed(part) for part in others[:n_kept]]
    again = partial(checkpoint, embed, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([*made, *map(again, others[n_kept:])])


@contextlib.contextmanager
def fused(joined: list[tuple[Any, Any, Tensor, Tensor]]) -> Iterator[None]:
    """While it holds, convolutions apply the BatchNorm and ReLU6 behind them, in one step, by their joined weights."""
    for convolution, norm, weight, bias in joined:
        convolution.forward, norm.forward = partial(_convolve, convolution, norm, weight, bias), _unchanged
    try:
        yield
    finally:
        for convolution, norm, _, _ in joined:
            del convolution.forward, norm.forward


def joined_weights(backbone: Backbone) -> list[tuple[Any, Any, Tensor, Tensor]]:
    """The pairs of an EfficientNet with weights and bias for both, in float32; none of other networks.

    In eval mode BatchNorm is a linear map of each channel, so the convolution with weights w · γ/σ and bias β − μ · γ/σ
    is the same function, of γ and β too, and one map is kept where there were two.
    """
    joined = []
    with torch.autocast("cpu", enabled=False):
        for convolution, norm in pairs_of(backbone):
            scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
            weight, bias = convolution.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale
            joined.append((convolution, norm, weight, bias))
    return joined


def pairs_of(backbone: Backbone) -> list[tuple[Any, Any]]:
    """An EfficientNet's convolutions, plain or depthwise, with the BatchNorm behind each; none of other networks."""
    layers = [each for each in backbone.model.modules() if isinstance(each, (nn.Conv2d, BatchNormAct2d))]
    return [pair for pair in pairwise(layers) if isinstance(backbone.model, EfficientNet) and _can_fuse(*pair)]


def _can_fuse(convolution: Any, norm: Any) -> bool:
    if type(convolution) not in (nn.Conv2d, Conv2dSame) or not isinstance(norm, BatchNormAct2d) or norm.training:
        return False
    is_depthwise = convolution.groups == convolution.in_channels == convolution.out_channels
    is_plain = convolution.groups == 1 or (is_depthwise and convolution.kernel_size != (1, 1))
    is_followed = convolution.out_channels == norm.num_features  # not one of several that a MixNet's norm joins
    has_more = convolution.dilation != (1, 1) or convolution.bias is not None or not isinstance(norm.drop, nn.Identity)
    return is_plain and is_followed and not has_more and isinstance(norm.act, (nn.ReLU6, nn.Identity))


def _unchanged(maps: Tensor) -> Tensor:
    return maps


def _convolve(convolution: nn.Conv2d, norm: Any, weight: Tensor, bias: Tensor, images: Tensor) -> Tensor:
    """Convolve, normalise and clamp ``(B, C, H, W)``, in autocast's precision."""
    padded: Any = convolution.padding
    if isinstance(convolution, Conv2dSame):
        images, padded = padding.pad_same(images, [*convolution.kernel_size], [*convolution.stride]), (0, 0)
    if torch.is_autocast_enabled("cpu"):
        images, weight, bias = (each.to(torch.get_autocast_dtype("cpu")) for each in (images, weight, bias))
    settings = convolution.stride, padded, convolution.groups, isinstance(norm.act, nn.ReLU6)
    maps: Tensor = FusedConvolution.apply(images, weight, bias, *settings)
    return maps


class FusedConvolution(torch.autograd.Function):
    """A plain or depthwise convolution with bias, clamped to [0, 6] if asked for.

    oneDNN takes 10 to 80 times a forward pass for the gradient of a depthwise 5 x 5 convolution's weights, and as long
    for the images' where it is strided, in bfloat16. The first is each image's correlation with its map's gradient:
    a depthwise convolution too, whose dilation is the stride. The second is computed in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, weight: Tensor, bias: Tensor, stride: Any, padded: Any, groups: int, is_clamped: bool
    ) -> Tensor:
        """Compute the maps ``(B, C', H', W')``, of which the clamped ones are kept instead of what they were before."""
        maps = F.conv2d(images, weight, bias, stride, padded, 1, groups)
        maps = maps.clamp_(0, 6) if is_clamped else maps
        ctx.save_for_backward(images, weight, maps if is_clamped else None)
        ctx.settings = stride, padded, groups
        return maps

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Give the gradients of images, weight and bias."""
        images, weight, maps = ctx.saved_tensors
        stride, padded, groups = ctx.settings
        if maps is not None:
            gradient = torch.ops.aten.hardtanh_backward(gradient, maps, 0, 6)
        if weight.shape[2:] == (1, 1) and stride == (1, 1):  # matrix products, quicker than oneDNN's convolutions
            given, images = (each.permute(0, 2, 3, 1) for each in (gradient, images))  # BxCxHxW to BxHxWxC
            rows = given.flatten(0, 2)
            by_weight = (rows.T @ images.flatten(0, 2))[:, :, None, None]
            return (given @ weight.flatten(1)).permute(0, 3, 1, 2), by_weight, rows.sum(0), *[None] * 4

        def gradients(wanted: tuple[bool, bool, bool], dtype: torch.dtype) -> Any:
            inputs = (each.to(dtype) for each in (gradient, images, weight))
            options = [len(weight)], stride, padded, (1, 1), False, (0, 0), groups, wanted
            return torch.ops.aten.convolution_backward(*inputs, *options)

        (height, width), dtype = weight.shape[-2:], weight.dtype
        is_correlated = groups > 1 and height * width >= 25
        of_images = torch.float32 if groups > 1 and stride != (1, 1) and dtype == torch.bfloat16 else dtype
        is_one = not is_correlated and of_images == dtype
        by_images, by_weight, by_bias = gradients((ctx.needs_input_grad[0], is_one, is_one), of_images)
        if is_correlated:
            correlated = [
                F.conv2d(image[None], of_image[:, None], None, 1, padded, stride, groups)[0, :, None, :height, :width]
                for image, of_image in zip(images, gradient, strict=True)
            ]
            by_weight, by_bias = torch.stack(correlated).sum(0), gradient.sum((0, 2, 3))
        elif not is_one:
            _, by_weight, by_bias = gradients((False, True, True), dtype)
        return None if by_images is None else by_images.to(dtype), by_weight, by_bias, *[None] * 4
