"""What computes a backbone's features: PyTorch, PyTorch compiled, or OpenVINO."""

import contextlib
import copy
import importlib.util
import queue
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from timm.layers import padding
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

from metilr.errors import UserError, one_line
from metilr.models import Engine
from metilr.models.backbone import TRIED, Backbone, Features
from metilr.models.fused import can_fuse, convolve, unchanged

MOST_GRAPHS = 16  # what is compiled for a backbone comes to less
PROBE_SHAPE = (1, 3, 301, 267)  # odd, and beyond 256: bfloat16 cannot count further in steps of 1
# Cosine to PyTorch in float32 that the probe's map must have: noise is the worst of images for bfloat16.
LEAST_AGREEMENT = {"32": 0.9999, "bf16-mixed": 0.98}


def suits_openvino(backbone: Backbone) -> bool:
    """Whether OpenVINO takes a network: one without patches."""
    return backbone.patch == 1 and not backbone.has_cls


def fastest_engine(backbone: Backbone, device: str, precision: str) -> Engine:
    """Name the engine that is fastest on a device, among those that start at once and round alone differently."""
    fits = device == "cpu" and precision == "32" and suits_openvino(backbone)
    return "openvino" if fits and importlib.util.find_spec("openvino") else "torch"


def start_engine(
    engine: Engine, backbone: Backbone, precision: str, n_streams: int = 1
) -> Callable[[Tensor], Features] | None:
    """Make an engine ready to compute the features of a backbone on its device, for ``Embedder.describe``.

    `metilr.models.check_engine` says whether it runs here; None is the backbone itself. ``n_streams`` threads may call
    OpenVINO's at a time; others take the precision, ``32`` or ``bf16-mixed``, from autocast.
    """
    if engine == "torch":
        network = folded(backbone) if precision == "32" else backbone
        return None if network is backbone else network.forward
    return compiled(backbone) if engine == "compile" else OpenVINOEngine(backbone, precision, n_streams)


def map_of(backbone: Backbone, images: Tensor) -> Tensor:
    """Compute the map alone of normalised images, ``(B, C, h, w)``."""
    features: Features = backbone(images)
    return features.map


def folded(backbone: Backbone, compute: Callable[[Backbone, Tensor], Tensor] = map_of) -> Backbone:
    """Return a copy, on a CPU, whose convolutions do what the BatchNorm behind them does; without any, the backbone.

    In eval mode that is a linear map of each channel: the same features up to rounding, and a map less to make. Joined
    is what hands on the very tensor, and a copy taken if it computes the same of a random image: a network may use a
    convolution twice, or its map elsewhere too. On a GPU the gain is not known.
    """
    has_any = any(isinstance(part, nn.BatchNorm2d) for part in backbone.modules())
    weight = next(backbone.parameters())
    if backbone.patch > 1 or not has_any or weight.device.type != "cpu":
        return backbone
    copied = copy.deepcopy(backbone)
    made: list[tuple[nn.Module, Tensor]] = []
    pairs: list[tuple[Any, Any]] = []

    def note(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            made.append((module, output))
        else:
            pairs.extend((convolution, module) for convolution, maps in made if maps is inputs[0])

    kinds = (nn.Conv2d, Conv2dSame, nn.BatchNorm2d, BatchNormAct2d)
    hooks = [part.register_forward_hook(note) for part in copied.modules() if type(part) in kinds]
    probe = torch.randn(1, 3, *TRIED, generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        expected = compute(copied, probe)
        for hook in hooks:
            hook.remove()
        for convolution, norm in pairs:
            statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            weights = fuse_conv_bn_weights(convolution.weight, convolution.bias, *statistics)
            if can_fuse(convolution, norm):
                convolution.forward, norm.forward = partial(convolve, convolution, norm, *weights), unchanged
                continue
            convolution.weight, convolution.bias = weights
            rest = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
            norm.forward = rest.forward
        is_same = pairs and (compute(copied, probe) - expected).abs().max() <= 1e-3 * expected.abs().max()
    return copied if is_same else backbone


def compiled(backbone: Backbone) -> Callable[[Tensor], Features]:
    """Return ``backbone.forward`` compiled, with heights and widths as unknowns of a graph.

    PyTorch makes another graph for a batch of 1, on CPUs also for one of 16 and more and for small maps, and for a ViT
    at its own image size, when it is first needed. What needs more than ``MOST_GRAPHS``, as where average pooling
    rounds up (``resnet50d``), or cannot be compiled whole is refused: PyTorch's own answer is to go on uncompiled.
    """
    from torch._dynamo import config as compiler_config  # seconds to import
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
    from torch.fx.experimental import _config as shape_config

    forward = torch.compile(backbone.forward, dynamic=True, fullgraph=True)

    def compute(images: Tensor) -> Features:
        with contextlib.ExitStack() as stack:
            stack.enter_context(compiler_config.patch(recompile_limit=MOST_GRAPHS))
            # Or a first image that is square makes a graph of squares.
            stack.enter_context(shape_config.patch(use_duck_shape=False))  # type: ignore[attr-defined]
            stack.enter_context(mock.patch.object(padding, "get_same_padding", added_padding))
            if backbone.patch > 1:  # timm checks the sides, with a message that makes them constants of the graph
                stack.enter_context(mock.patch.object(backbone.model.patch_embed, "img_size", None))
            try:
                features: Features = forward(images)
            except FailOnRecompileLimitHit as error:
                reason = f"{backbone.name} would be compiled anew for most image shapes"
                raise UserError(f"compile: {reason}; take torch", "engine") from error
            except TorchDynamoException as error:
                reason = f"PyTorch cannot compile {backbone.name} ({one_line(error)})"
                raise UserError(f"compile: {reason}; take torch", "engine") from error
        return features

    return compute


def added_padding(side: Any, kernel_size: int, stride: int, dilation: int) -> Any:
    """What timm's ``get_same_padding`` adds to a side, a whole number or a tensor of one.

    timm's own rounding and maximum would nest from layer to layer: minutes of compilation. And it divides
    floating-point numbers, which OpenVINO rounds to bfloat16: a side of 393 px would be padded as 392.
    """
    extent = (kernel_size - 1) * dilation + 1
    added = (side - 1) // stride * stride + extent - side
    if isinstance(added, Tensor):
        return added.clamp(min=0)
    return added if extent >= stride else max(added, 0)


class OpenVINOEngine:
    """Images to features, as ``Backbone.forward``, of convolutional networks on the CPU, ``n_streams`` calls at a time.

    A new image shape takes some tens of milliseconds once. In ``bf16-mixed``, sums are of float32. A backbone with
    which it disagrees with PyTorch about one random image is refused.
    """

    def __init__(self, backbone: Backbone, precision: str, n_streams: int = 1) -> None:
        import openvino

        if not suits_openvino(backbone):
            raise UserError(f"openvino: takes no network of patches ({backbone.name}); take torch", "engine")
        core = openvino.Core()
        if precision == "bf16-mixed" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise UserError("bf16-mixed: this CPU has no bfloat16 arithmetic for engine openvino; take 32", "precision")
        parts: list[tuple[nn.Module, str]] = [(_MapOf(backbone), precision)]
        if precision != "32" and backbone.sensitive is not None:
            parts = [(backbone.sensitive, "32"), (backbone.rest, precision)]
        networks = []
        probe = torch.randn(PROBE_SHAPE, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
            example = probe.clone()
            for part, part_precision in parts:
                options = {
                    "INFERENCE_PRECISION_HINT": "f32" if part_precision == "32" else "bf16",
                    "NUM_STREAMS": n_streams, "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                    "ENABLE_CPU_PINNING": False,  # several processes would be pinned to the same cores
                    "CPU_RUNTIME_CACHE_CAPACITY": 256,  # layers of a shape; of 5,000, the default, gigabytes
                }  # fmt: skip
                networks.append(core.compile_model(_converted(part, example, backbone.name), "CPU", options))
                example = part(example)
        self.free: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()  # a request to each part, for each stream
        for _ in range(n_streams):
            self.free.put([network.create_infer_request() for network in networks])
        features, agreement = self(probe).map, 0.0
        if features.shape == example.shape:
            agreement = F.cosine_similarity(features.flatten(), example.flatten(), dim=0).item()
        if not agreement >= LEAST_AGREEMENT[precision]:
            reason = f"computes {backbone.name} in precision {precision} otherwise than PyTorch"
            raise UserError(f"openvino: {reason} (cosine {agreement:.4f}); take torch", "engine")

    def __call__(self, images: Tensor) -> Features:
        """Compute the features of normalised images ``(B, 3, H, W)``: the map, float32."""
        values: Any = images.contiguous().numpy()
        requests = self.free.get()
        try:
            for request in requests:
                request.infer({0: values})
                values = request.get_output_tensor()
            features = np.array(values.data, dtype=np.float32)  # a copy: the request's own is overwritten
        finally:
            self.free.put(requests)
        return Features(torch.from_numpy(features), None)


class _MapOf(nn.Module):
    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        return map_of(self.backbone, images)


def _converted(module: nn.Module, example: Tensor, name: str) -> Any:
    """Turn a module into an OpenVINO model that takes images of any shape."""
    import openvino
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    def same_padding(side: int | Tensor, *window: int) -> Any:
        return added_padding(torch.as_tensor(side), *window)

    module = copy.deepcopy(module)
    try:
        with warnings.catch_warnings(), mock.patch.object(padding, "get_same_padding", same_padding):
            warnings.simplefilter("ignore")  # tracing is deprecated in PyTorch, and tells of each constant
            decoder = TorchScriptPythonDecoder(module, example_input=example)
            # Not openvino.convert_model, which reports each use to OpenVINO's makers.
            frontend = FrontEndManager().load_by_framework("pytorch")
            model = frontend.convert(frontend.load(decoder))
    except Exception as error:  # whatever the converter meets in an unknown network
        raise UserError(f"openvino: cannot convert {name} ({one_line(error)}); take torch", "engine") from error
    _let_convolutions_pad(model, {path for path, part in module.named_modules() if isinstance(part, Conv2dSame)})
    model.reshape({model.inputs[0]: openvino.PartialShape([-1, example.shape[1], -1, -1])})
    return model


def _let_convolutions_pad(model: Any, padded: set[str]) -> None:
    """Join the "same" padding of some modules to their convolutions: OpenVINO's own padding layer uses one core."""
    from openvino import opset13 as opset

    def module_of(node: Any) -> str:
        return str(node.get_friendly_name()).removeprefix("__module.").partition("/")[0]

    makers = {"Convolution": opset.convolution, "GroupConvolution": opset.group_convolution}
    for node in model.get_ordered_ops():
        if node.get_type_name() not in makers or module_of(node) not in padded:
            continue
        pad = node.input_value(0).get_node()
        if pad.get_type_name() != "Pad" or module_of(pad) != module_of(node):
            continue
        strides, dilations = (node.get_attributes()[name] for name in ("strides", "dilations"))
        inputs = pad.input_value(0), node.input_value(1)
        joined = makers[node.get_type_name()](*inputs, strides, [0, 0], [0, 0], dilations, auto_pad="same_upper")
        joined.set_friendly_name(node.get_friendly_name())
        node.output(0).replace(joined.output(0))
