"""A model as one ONNX file: an image in, its descriptor out, by PyTorch's exporter and compared with PyTorch."""

import importlib.util
import json
import math
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from timm.layers import padding
from torch import Tensor, nn
from torch.nn import functional as F

from metilr.data.pixels import MAX_IMAGE_SIZE, ImageSize
from metilr.errors import UserError, one_line
from metilr.files import replaced_file
from metilr.models.embedder import Embedder
from metilr.models.engines import added_padding
from metilr.provenance import library_versions

FORMAT = "metilr.onnx/1"
LEAST_AGREEMENT = 0.9999  # cosine to PyTorch that the descriptor of each probe must have
MOST_BYTES = 2_000_000_000  # of weights: protobuf, which an ONNX file is, ends at 2 GiB
PROBE_SIDE = 320  # px, at most
NETWORK = "metilr::Network"  # what stands for it until ``_joined``
SIDES = np.arange(1, MAX_IMAGE_SIZE + 1)

Whitening = tuple[np.ndarray, np.ndarray]  # mean (D,) and projection (D, dim), float64


def export_onnx(
    embedder: Embedder, path: Path, image_size: ImageSize | None = None, whitening: Whitening | None = None
) -> dict[str, Any]:
    """Write an embedder, with all its scales, and a whitening into one ONNX file; return the notes in it.

    Input ``image``: uint8 RGB ``(1, 3, H, W)``, resized to ``image_size`` before. Output ``descriptor``: float32
    ``(1, dim)`` of unit length. H and W may be any from ``least_side`` to ``most_side`` of the notes; where
    ``image_size`` is a square, they are its own. The notes are JSON, under the key "metilr" of the file's metadata.

    The network computes in float32, the whitening in float64. What is written agrees with PyTorch on images of several
    shapes. The embedder is left on the CPU, in eval mode.

    Raises:
        UserError: If a library is missing, the weights are too many for one file, PyTorch cannot export the network, or
            the file would describe images otherwise than PyTorch.
    """
    for library in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(library) is None:
            raise UserError(f"{library} is not installed; pip install 'metilr[onnx]'")
    import onnx

    name = embedder.backbone.name
    if sum(tensor.nbytes for tensor in embedder.state_dict().values()) > MOST_BYTES:
        raise UserError(f"{name}: has more than 2 GB of weights, too many for one ONNX file; take a smaller backbone")
    embedder.to("cpu").to(memory_format=torch.contiguous_format).eval()
    embedder.check_image_size(image_size)
    least, most = image_size if isinstance(image_size, tuple) else (_least_side(embedder), MAX_IMAGE_SIZE)
    if isinstance(image_size, int) and image_size < least:
        reason = f"{name} takes sides of {least} px or more in ONNX, but for one square size"
        raise UserError(f"{image_size}: {reason}; take more px, or images of a square size", "image_size")
    if least < most and embedder.pooling.kind == "rmac":  # the exporter would keep the regions of its example
        reason = "the regions of rmac cannot be exported for images of any shape"
        raise UserError(f"keep: {reason}; take square, and an image_size", "image_shape")
    model = _model_of(embedder, whitening, least, most)
    [output] = model.graph.output
    versions = {**library_versions(), "onnx": onnx.__version__}
    notes = {
        "format": FORMAT, "image_size": image_size, "interpolation": "bilinear, antialiased", "channels": "RGB",
        "least_side": least, "most_side": most, "dim": output.type.tensor_type.shape.dim[1].dim_value,
        "whitened": whitening is not None, "model": embedder.describe_settings(),
        "opset": next(each.version for each in model.opset_import if not each.domain),
        "versions": {library: versions[library] for library in ("metilr", "torch", "timm", "onnx")},
    }  # fmt: skip
    onnx.helper.set_model_props(model, {"metilr": json.dumps(notes)})
    content = model.SerializeToString()
    _check_agreement(content, embedder, whitening, least, most)
    with replaced_file(path) as stream:
        stream.write(content)
    return notes


class _Network(nn.Module):
    """What ``Embedder`` does at one scale."""

    def __init__(self, embedder: Embedder) -> None:
        super().__init__()
        self.embedder = embedder

    def forward(self, images: Tensor) -> Tensor:
        """Embed normalised images at their own size."""
        features = self.embedder.backbone(images)
        features = features._replace(map=features.map.contiguous())  # strides would bind the graph to some sizes
        return self.embedder.project(F.normalize(self.embedder.backbone.head(self.embedder.pooling(features)), dim=1))


class _Described(nn.Module):
    """What ``Embedder.describe`` does around the network, and a whitening behind it."""

    mean: Tensor
    projection: Tensor

    def __init__(self, embedder: Embedder, whitening: Whitening | None, network: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embedder, self.network, self.is_whitened = embedder, network, whitening is not None
        for name, values in zip(("mean", "projection"), whitening or (), strict=False):
            self.register_buffer(name, torch.from_numpy(np.array(values, dtype=np.float64)))

    def forward(self, image: Tensor) -> Tensor:
        """Describe an image, uint8 ``(1, 3, H, W)``: ``(1, dim)``."""
        images = self.embedder.normalise(image)
        embeddings = [self.network(self._resize(images, scale)) for scale in self.embedder.scales]
        descriptor = F.normalize(torch.stack(embeddings).sum(dim=0), dim=1)
        if not self.is_whitened:
            return descriptor
        return F.normalize(((descriptor.double() - self.mean) @ self.projection).float(), dim=1)

    def _resize(self, images: Tensor, scale: float) -> Tensor:
        """``Embedder._resize``, with sizes in whole numbers: ONNX keeps a scale in float32, which rounds some wrongly.

        Rounded up, a scale gives at most a row and a column too many, which are cut off.
        """
        how: dict[str, Any] = {"mode": "bilinear", "align_corners": False, "antialias": False}
        backbone = self.embedder.backbone
        height, width = (_scaled(side, scale) for side in images.shape[-2:])
        if backbone.patch > 1:
            return F.interpolate(images, size=backbone.fit_size(height, width), **how)
        if scale == 1:
            return images
        rounded = np.float32(scale)
        rounded = rounded if rounded >= scale else np.nextafter(rounded, np.float32(np.inf))
        images = F.interpolate(images, scale_factor=float(rounded), **how)
        return images.index_select(2, torch.arange(height)).index_select(3, torch.arange(width))


def _scaled(side: Any, scale: float) -> Any:
    """⌊side · scale⌋ of a whole number, or of an unknown of the graph."""
    if isinstance(side, int):
        return math.floor(side * scale)
    ratio = Fraction(scale).limit_denominator(2**20)
    if (SIDES * ratio.numerator // ratio.denominator != np.floor(SIDES * scale)).any():
        reason = "is a scale at which sizes round otherwise in ONNX"
        raise UserError(f"{scale:g}: {reason}; take another one, or images of one square size", "scales")
    return side * ratio.numerator // ratio.denominator


def _least_side(embedder: Embedder) -> int:
    """A side in px, in steps of 32, from which on no map is a single row or column: the exporter tells those apart."""
    backbone, scale = embedder.backbone, min(embedder.scales)
    for least in range(32, MAX_IMAGE_SIZE, 32):
        side, _ = backbone.fit_size(*2 * (max(1, math.floor(least * scale)),))
        if side >= backbone.least_side:
            with torch.no_grad():
                if min(backbone(torch.zeros(1, 3, side, side)).map.shape[-2:]) > 1:
                    return least
    raise UserError(f"{scale:g}: is too small for {backbone.name}; take a larger one", "scales")


def _model_of(embedder: Embedder, whitening: Whitening | None, least: int, most: int) -> Any:
    """Make the ONNX model for images with sides from least to most px; of equal ones, for that square alone.

    For many sizes the network is exported once, not anew for each scale, which would take minutes.
    """
    name, network, patch = embedder.backbone.name, _Network(embedder), embedder.backbone.patch
    try:
        if least == most:
            return _exported(_Described(embedder, whitening, network), torch.uint8, least, most)

        def stand_in(images: Tensor) -> Tensor:
            return torch.onnx.ops.symbolic(NETWORK, (images,), dtype=torch.float32, shape=(1, embedder.dim), version=1)

        described = _exported(_Described(embedder, whitening, stand_in), torch.uint8, least, most)
        smallest, _ = embedder.backbone.fit_size(*2 * (math.floor(least * min(embedder.scales)),))
        largest = math.ceil(most * max(embedder.scales)) + patch
        return _joined(described, _exported(network, torch.float32, smallest // patch, largest // patch, patch))
    except UserError:
        raise
    except Exception as error:  # whatever the exporter meets in an unknown network
        if least == most:
            raise UserError(f"{name}: PyTorch cannot export it ({one_line(error)}); take another backbone") from error
        reason = f"PyTorch cannot export {name} for images of any shape ({one_line(error)})"
        raise UserError(f"keep: {reason}; take square, and an image_size", "image_shape") from error


def _exported(module: nn.Module, dtype: torch.dtype, least: int, most: int, step: int = 1) -> Any:
    """Turn a module into an ONNX model, for images ``(1, 3, H, W)`` with sides from least to most steps of px."""
    shapes: Any = None
    example = torch.zeros(1, 3, step * least, step * least, dtype=dtype)
    if least < most:  # by way of ``Dim``: a graph that would not hold for all of them is an error
        dims = [torch.export.Dim(name, min=least, max=most) for name in ("height", "width")]
        shapes = ({i + 2: step * dim if step > 1 else dim for i, dim in enumerate(dims)},)
        example = torch.zeros(1, 3, step * (least + 5), step * (least + 8), dtype=dtype)
    with (
        torch.no_grad(), warnings.catch_warnings(), mock.patch.object(padding, "get_same_padding", added_padding),
        # PyTorch takes ReLU6 apart into comparisons of shapes, which takes most of a minute.
        mock.patch.object(F, "hardtanh", lambda x, low=-1.0, high=1.0, inplace=False: x.clamp(low, high)),
    ):  # fmt: skip
        warnings.simplefilter("ignore")  # of PyTorch's own deprecations
        program = torch.export.export(module.eval(), (example,), dynamic_shapes=shapes)
        names: dict[str, Any] = {"input_names": ["image"], "output_names": ["descriptor"]}
        exported: Any = torch.onnx.export(program, (), dynamo=True, verbose=False, **names)
    model = exported.model_proto
    model.graph.ClearField("value_info")
    for node in model.graph.node:  # which lines made it, and where they lie on this machine
        node.ClearField("metadata_props")
    if shapes is not None:
        for dim, side in zip(dims, model.graph.input[0].type.tensor_type.shape.dim[2:], strict=True):
            side.dim_param = dim.__name__
    return model


def _joined(described: Any, network: Any) -> Any:
    """Put a network in the place of each node that stands for it; its weights are there once."""
    domain, _, kind = NETWORK.partition("::")
    nodes, weights = list(described.graph.node), {each.name for each in network.graph.initializer}
    described.graph.ClearField("node")
    for i, node in enumerate(nodes):
        if (node.domain, node.op_type) != (domain, kind):
            described.graph.node.append(node)
            continue
        outer = {"": "", network.graph.input[0].name: node.input[0], network.graph.output[0].name: node.output[0]}
        outer |= {name: f"network/{name}" for name in weights}
        for part in network.graph.node:
            copied = described.graph.node.add()
            copied.CopyFrom(part)
            copied.name = f"{i}/{part.name}"
            copied.input[:] = [outer.get(name, f"{i}/{name}") for name in part.input]
            copied.output[:] = [outer.get(name, f"{i}/{name}") for name in part.output]
    for weight in network.graph.initializer:
        copied = described.graph.initializer.add()
        copied.CopyFrom(weight)
        copied.name = f"network/{weight.name}"
    for unknown in [each for each in described.opset_import if each.domain == domain]:
        described.opset_import.remove(unknown)
    return described


def _check_agreement(content: bytes, embedder: Embedder, whitening: Whitening | None, least: int, most: int) -> None:
    """Refuse an ONNX model that describes images otherwise than PyTorch."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    long, middle = max(least, min(PROBE_SIDE, most)), (least + min(PROBE_SIDE, most)) // 2 + 1
    shapes = (
        (long, long), (least, least), (least, long - 23), (long - 10, middle), (middle, long - 61), (long - 1, least),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    # ``Dim`` tells what would not hold for all heights or all widths, not what depends on both.
    for shape in {(min(max(height, least), most), min(max(width, least), most)) for height, width in shapes}:
        coarse = torch.rand(1, 3, 6, 5, generator=generator) * 255
        image = F.interpolate(coarse, size=shape, mode="bilinear").byte()
        with torch.inference_mode():
            expected = embedder.describe(embedder.normalise(image)).double().numpy()
        if whitening is not None:
            expected = (expected - whitening[0]) @ whitening[1]
        try:
            [[found]] = session.run(None, {"image": image.numpy()})
            agreement = float(found @ expected[0] / np.linalg.norm(found) / np.linalg.norm(expected))
            what = f"describes an image of {shape[0]}x{shape[1]} px otherwise than PyTorch (cosine {agreement:.6f})"
        except Exception as error:  # of a graph that holds for the example's shape alone
            agreement, what = 0.0, f"fails at an image of {shape[0]}x{shape[1]} px ({one_line(error)})"
        if not agreement >= LEAST_AGREEMENT:
            other = "another backbone" if least == most else "images of one square size"
            raise UserError(f"{embedder.backbone.name}: its ONNX file {what}; take {other}")
