"""Gradients of a backbone on a CPU, in bounded memory: a few images at a time, by fused convolutions."""

import contextlib
import functools
import itertools
import operator
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from timm.layers import padding
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from timm.models import EfficientNet
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from metilr.distributed import pool_of
from metilr.models.backbone import Backbone
from metilr.models.embedder import Embedder

KEPT = 800_000_000  # bytes of a call's maps: with all else that a training holds, less than 3 GB on two cores
MOST = 1e9  # of a weight: beyond, sums of maps could leave float32, and oneDNN clamps what is not a number to 0


def in_parts(embedder: Embedder, images: Tensor) -> Tensor:
    """Embed normalised images ``(B, 3, H, W)`` on the CPU as the embedder does, ``(B, dim)``, to train an EfficientNet.

    Two at a time by each of PyTorch's threads, which share cores better so than within a convolution, and memory that
    malloc keeps. Maps of as many as ``KEPT`` holds are kept for the backward pass, those of others computed again. Each
    row depends on its image alone, and gradients are added up in the images' order, whatever the number of threads.
    Other networks, for which this takes longer, frozen ones, those that save memory their own way, and weights that a
    training has lost are computed whole. Until the backward pass is done, no other thread may use the embedder.
    """
    backbone, images = embedder.backbone, images.contiguous(memory_format=torch.channels_last)
    pairs, is_trained = pairs_of(backbone), any(parameter.requires_grad for parameter in backbone.parameters())
    in_pairs = {id(parameter) for pair in pairs for layer in pair for parameter in layer.parameters()}
    others = [parameter for parameter in embedder.parameters() if id(parameter) not in in_pairs]
    weights = [*joined_weights(pairs), *others]
    is_plain = bool(pairs) and not backbone.model.grad_checkpointing and not images.requires_grad
    if not (is_trained and is_plain) or not all(bool(weight.detach().abs().max() < MOST) for weight in weights):
        whole: Tensor = embedder(images)
        return whole

    has_gradients, dtype = torch.is_grad_enabled(), torch.get_autocast_dtype("cpu")
    has_autocast = torch.is_autocast_enabled("cpu")

    def embed(part: Tensor) -> Tensor:  # in another thread, which has settings of its own
        with torch.set_grad_enabled(has_gradients), torch.autocast("cpu", dtype, enabled=has_autocast):
            embeddings: Tensor = embedder(part)
        return embeddings

    embeddings: Tensor = SideBySide.apply(embed, images, pairs, *weights)
    return embeddings


class SideBySide(torch.autograd.Function):
    """Embeddings of images, and their gradients, two images at a time, each pair by one thread."""

    @staticmethod
    def forward(
        ctx: Any, embed: Callable[[Tensor], Tensor], images: Tensor, pairs: list[tuple[Any, Any]], *weights: Tensor
    ) -> Tensor:
        """Embed ``(B, 3, H, W)`` with the joined weights of the pairs, and all other weights: ``(B, dim)``."""
        n, sizes = 2 * len(pairs), {}  # of what the first part keeps, by address
        ctx.weights = [each.detach().requires_grad_(each.requires_grad) for each in weights[:n]] + [*weights[n:]]
        ctx.fused = partial(fused, pairs, ctx.weights[:n])

        def counted(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.nbytes  # not the whole batch behind its images
            return tensor.detach()  # itself would be a ring that nobody breaks without a backward pass

        def embed_first(part: Tensor) -> Tensor:
            with torch.autograd.graph.saved_tensors_hooks(counted, unchanged):
                return embed(part)

        first, *others = images.split(2)
        n_threads = torch.get_num_threads()
        with pool_of(n_threads) as pool, ctx.fused():
            ctx.made = [pool.submit(embed_first, first).result()]
            n_kept = KEPT // max(1, sum(sizes.values())) - n_threads  # beside those at work
            again = partial(checkpoint, embed, use_reentrant=False, preserve_rng_state=False)
            ways = [embed if i < n_kept else again for i in range(len(others))]
            ctx.made += pool.map(operator.call, ways, others)
        return torch.cat([part.detach() for part in ctx.made])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Give the gradients of all weights."""
        trained = [weight for weight in ctx.weights if weight.requires_grad]

        def gradients(embeddings: Tensor, given: Tensor) -> Any:  # None of a weight that is not used
            return torch.autograd.grad(embeddings, trained, given, allow_unused=True)

        def added(some: Any, more: Any) -> Any:
            return [None if one is None else one + other for one, other in zip(some, more, strict=True)]

        with pool_of(torch.get_num_threads()) as pool, ctx.fused():
            sums = iter(functools.reduce(added, pool.map(gradients, ctx.made, gradient.split(2))))
        ctx.made = None
        return None, None, None, *(next(sums) if weight.requires_grad else None for weight in ctx.weights)


@contextlib.contextmanager
def fused(pairs: list[tuple[Any, Any]], joined: list[Tensor]) -> Iterator[None]:
    """While it holds, convolutions apply the BatchNorm and ReLU6 behind them, in one step, by their joined weights."""
    try:
        for (convolution, norm), weight, bias in zip(pairs, joined[::2], joined[1::2], strict=True):
            convolution.forward, norm.forward = partial(convolve, convolution, norm, weight, bias), unchanged
        yield
    finally:
        for layer in itertools.chain(*pairs):
            vars(layer).pop("forward", None)


def joined_weights(pairs: list[tuple[Any, Any]]) -> list[Tensor]:
    """Weights and bias for convolution and BatchNorm of each pair, one behind the other, float32.

    In eval mode BatchNorm is a linear map of each channel, so the convolution with weights w · γ/σ and bias β − μ · γ/σ
    is the same function, of γ and β too, and one map is kept where there were two.
    """
    joined = []
    with torch.autocast("cpu", enabled=False):
        for convolution, norm in pairs:
            scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
            joined += [convolution.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale]
    return joined


def pairs_of(backbone: Backbone) -> list[tuple[Any, Any]]:
    """An EfficientNet's convolutions, plain or depthwise, with the BatchNorm behind each; none of other networks."""
    layers = [each for each in backbone.model.modules() if isinstance(each, (nn.Conv2d, BatchNormAct2d))]
    return [pair for pair in itertools.pairwise(layers) if isinstance(backbone.model, EfficientNet) and can_fuse(*pair)]


def can_fuse(convolution: Any, norm: Any) -> bool:
    """Whether `convolve` can do what a convolution and the BatchNorm behind it do."""
    if type(convolution) not in (nn.Conv2d, Conv2dSame) or not isinstance(norm, BatchNormAct2d) or norm.training:
        return False
    is_depthwise = convolution.groups == convolution.in_channels == convolution.out_channels
    is_plain = convolution.groups == 1 or (is_depthwise and convolution.kernel_size != (1, 1))
    is_followed = convolution.out_channels == norm.num_features  # not one of several that a MixNet's norm joins
    has_more = convolution.dilation != (1, 1) or convolution.bias is not None or not isinstance(norm.drop, nn.Identity)
    return is_plain and is_followed and not has_more and isinstance(norm.act, (nn.ReLU6, nn.Identity))


def unchanged(maps: Tensor) -> Tensor:
    """Return what is given: the step of a norm that was joined to its convolution."""
    return maps


def convolve(convolution: nn.Conv2d, norm: Any, weight: Tensor, bias: Tensor, images: Tensor) -> Tensor:
    """Convolve, normalise and clamp ``(B, C, H, W)``, in autocast's precision."""
    if torch.is_autocast_enabled("cpu"):
        images, weight, bias = (each.to(torch.get_autocast_dtype("cpu")) for each in (images, weight, bias))
    zeros, is_clamped = zeros_around(convolution, images), isinstance(norm.act, nn.ReLU6)
    maps: Tensor = FusedConvolution.apply(
        images, weight, bias, convolution.stride, zeros, convolution.groups, is_clamped
    )
    return maps


def zeros_around(convolution: nn.Conv2d, images: Tensor) -> list[int]:
    """How many zeros a convolution puts around maps, in height and in width: half of them, rounded down, before."""
    if not isinstance(convolution, Conv2dSame):
        return [2 * int(n) for n in convolution.padding]
    sides = zip(images.shape[2:], convolution.kernel_size, convolution.stride, strict=True)
    return [padding.get_same_padding(*side, 1) for side in sides]


def convolved(
    images: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, zeros: list[int], groups: int, is_clamped: bool
) -> Tensor:
    """Convolve ``(B, C, H, W)`` on a CPU and clamp to [0, 6] if asked for, in one step where oneDNN can.

    An odd zero comes behind. A depthwise kernel gets one before instead, which costs less than a larger map.
    """
    before, odd = [n // 2 for n in zeros], [n % 2 for n in zeros]
    if any(odd) and groups > 1:
        weight, before = F.pad(weight, (odd[1], 0, odd[0], 0)), [n + more for n, more in zip(before, odd, strict=True)]
    elif any(odd):
        images = F.pad(images, (0, odd[1], 0, odd[0]))
    if _has_onednn(images.dtype):
        kind, bounds = ("hardtanh", [0.0, 6.0]) if is_clamped else ("none", [])
        maps: Tensor = torch.ops.mkldnn._convolution_pointwise(
            images, weight, bias, before, stride, (1, 1), groups, kind, bounds, ""
        )
        return maps
    maps = F.conv2d(images, weight, bias, stride, before, 1, groups)
    return maps.clamp_(0, 6) if is_clamped else maps


def _has_onednn(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class FusedConvolution(torch.autograd.Function):
    """A plain or depthwise convolution with bias, clamped to [0, 6] if asked for.

    oneDNN takes 10 to 80 times a forward pass for the gradient of a depthwise 5 x 5 convolution's weights, and as long
    for the images' where it is strided, in bfloat16. The first is each image's correlation with its map's gradient:
    a depthwise convolution too, whose dilation is the stride. The second is computed in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, weight: Tensor, bias: Tensor, stride: Any, zeros: list[int], groups: int,
        is_clamped: bool,
    ) -> Tensor:  # fmt: skip
        """Compute the maps ``(B, C', H', W')``, of which the clamped ones are kept instead of what they were before."""
        maps = convolved(images, weight, bias, stride, zeros, groups, is_clamped)
        ctx.save_for_backward(images, weight, maps if is_clamped else None)
        ctx.settings = stride, zeros, groups
        return maps

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Give the gradients of images, weight and bias."""
        images, weight, maps = ctx.saved_tensors
        stride, zeros, groups = ctx.settings
        if maps is not None:
            gradient = torch.ops.aten.hardtanh_backward(gradient, maps, 0, 6)
        if weight.shape[2:] == stride == (1, 1) and not any(
            zeros
        ):  # matrix products, quicker than oneDNN's convolutions
            given, images = (each.permute(0, 2, 3, 1) for each in (gradient, images))  # BxCxHxW to BxHxWxC
            rows = given.flatten(0, 2)
            by_weight = (rows.T @ images.flatten(0, 2))[:, :, None, None]
            return (given @ weight.flatten(1)).permute(0, 3, 1, 2), by_weight, rows.sum(0), *[None] * 4

        before, odd, (_, _, n_rows, n_columns) = [n // 2 for n in zeros], [n % 2 for n in zeros], images.shape
        if any(odd):
            images = F.pad(images, (0, odd[1], 0, odd[0]))

        def gradients(wanted: tuple[bool, bool, bool], dtype: torch.dtype) -> Any:
            inputs = (each.to(dtype) for each in (gradient, images, weight))
            options = [len(weight)], stride, before, (1, 1), False, (0, 0), groups, wanted
            return torch.ops.aten.convolution_backward(*inputs, *options)

        (height, width), dtype = weight.shape[-2:], weight.dtype
        is_correlated = groups > 1 and height * width >= 25
        of_images = torch.float32 if groups > 1 and stride != (1, 1) and dtype == torch.bfloat16 else dtype
        is_one = not is_correlated and of_images == dtype
        by_images, by_weight, by_bias = gradients((ctx.needs_input_grad[0], is_one, is_one), of_images)
        if is_correlated:
            correlated = [
                F.conv2d(image[None], of_image[:, None], None, 1, before, stride, groups)[0, :, None, :height, :width]
                for image, of_image in zip(images, gradient, strict=True)
            ]
            by_weight, by_bias = torch.stack(correlated).sum(0), gradient.sum((0, 2, 3))
        elif not is_one:
            _, by_weight, by_bias = gradients((False, True, True), dtype)
        if by_images is not None:
            by_images = by_images[:, :, :n_rows, :n_columns].to(dtype)
        return by_images, by_weight, by_bias, *[None] * 4
