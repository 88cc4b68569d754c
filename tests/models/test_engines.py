import io
import itertools
import logging
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from timm.layers import Conv2dSame, ScaledStdConv2dSame, StdConv2dSame, padding
from timm.layers.pool2d_same import AvgPool2dSame, MaxPool2dSame
from torch import nn
from torch.nn import functional as F

from metilr.data.ground_truth import load_ground_truth
from metilr.errors import UserError
from metilr.extraction.describe import describe_images, store_settings
from metilr.extraction.module import DescriptorModule
from metilr.extraction.options import ExtractionOptions
from metilr.models import check_engine, engines
from metilr.models.backbone import Features, build_backbone
from metilr.models.embedder import build_embedder
from metilr.models.engines import start_engine
from tests.small_models import with_statistics

NEW_TORCH = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)  # 2.10 makes more graphs; between is untried
openvino = pytest.importorskip("openvino", reason="needs metilr[openvino]")
HAS_BFLOAT16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
needs_bfloat16 = pytest.mark.skipif(not HAS_BFLOAT16, reason="this CPU has no bfloat16 arithmetic")

SHAPES = [(393, 258), (301, 333), (128, 200)]  # odd sides beyond 256 among them


def images(height, width, n=2):
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(height))


def enlarged(museum):
    """Images of sizes that the engine is used for."""
    for file in museum.glob("images/**/*.jpg"):
        with Image.open(file) as image:
            larger = image.resize((9 * image.width, 9 * image.height))
        larger.save(file)
    return museum


@pytest.fixture(scope="module", params=["timm/test_resnet", "timm/test_efficientnet"])
def backbone(request):
    return build_backbone(request.param, "random")


class Twice(nn.Module):
    """A convolution in two places, with a norm at each: no pair of it can be joined."""

    def __init__(self):
        super().__init__()
        self.conv, self.norms = nn.Conv2d(64, 64, 3, padding=1), nn.ModuleList([nn.BatchNorm2d(64), nn.BatchNorm2d(64)])

    def forward(self, maps):
        for norm in self.norms:
            maps = norm(self.conv(maps))
        return maps


class Elsewhere(nn.Module):
    """A convolution whose map is wanted before its norm, too."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(64, 64, 1), nn.BatchNorm2d(64)

    def forward(self, maps):
        maps = self.conv(maps)
        return maps + self.norm(maps)


@pytest.mark.parametrize(
    ("name", "has_others"),  # norms that are not behind a single convolution
    [("timm/test_resnet", False), ("timm/test_efficientnet", False), ("r18_in", False), ("timm/mixnet_s", True)],
)
@torch.inference_mode()
def test_what_is_folded_has_the_same_features_with_fewer_norms_at_work(name, has_others):
    backbone = with_statistics(build_backbone(name, "random"))
    folded = engines.folded(backbone)
    for shape in SHAPES:
        expected = backbone(images(*shape)).map
        n_norms = sum(isinstance(part, nn.BatchNorm2d) for part in backbone.modules())
        with mock.patch.object(F, "batch_norm", wraps=F.batch_norm) as norm:
            found = folded(images(*shape)).map
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
        assert norm.call_count < n_norms and (norm.call_count > 0) == has_others


def test_what_is_folded_is_for_float32_alone_and_leaves_its_backbone_as_it_is():
    backbone = build_backbone("timm/test_efficientnet", "random")
    before = {name: values.clone() for name, values in backbone.state_dict().items()}
    assert start_engine("torch", backbone, "32") and start_engine("torch", backbone, "bf16-mixed") is None
    assert engines.folded(backbone.double()).model.conv_stem.bias.dtype == torch.float64
    after = backbone.float().state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("part", [Twice, Elsewhere])
@torch.inference_mode()
def test_what_cannot_be_folded_stays_as_it_is(part):
    backbone = build_backbone("r18_in", "random")
    backbone.model.layer1 = part()
    backbone = with_statistics(backbone)
    assert engines.folded(backbone) is backbone
    no_norms = build_backbone("timm/test_convnext", "random")
    assert engines.folded(no_norms) is no_norms


@torch.inference_mode()
def test_openvino_computes_what_pytorch_does(backbone):
    engine = start_engine("openvino", backbone, "32")
    found = [engine(images(*shape)) for shape in SHAPES]  # none is overwritten by the next
    for shape, features in zip(SHAPES, found, strict=True):
        expected = backbone(images(*shape)).map
        assert features.cls is None
        torch.testing.assert_close(features.map, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@needs_bfloat16
@torch.inference_mode()
def test_openvino_in_bfloat16_is_near_and_is_bfloat16(backbone):
    engine = start_engine("openvino", backbone, "bf16-mixed")
    for shape in SHAPES:
        found, expected = engine(images(*shape)).map, backbone(images(*shape)).map
        assert found.shape == expected.shape and found.dtype == torch.float32
        pooled = [F.normalize(m.clamp(min=1e-6).pow(3).mean(dim=(2, 3)).pow(1 / 3), dim=1) for m in (found, expected)]
        cosine = (pooled[0] * pooled[1]).sum(dim=1)
        assert (cosine > 0.999).all()
        assert (cosine < 1 - 1e-7).all()  # or the precision was not what was asked for


class Padded(nn.Module):
    """A network with a layer of timm's in its middle, where the probe's sides are below 256."""

    name, patch, has_cls, sensitive = "padded", 1, False, None

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.last = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.layer = layer

    def forward(self, images):
        return Features(self.last(F.relu(self.layer(F.relu(self.first(images))))), None)


def layer_kinds(module, example):
    return [node.get_type_name() for node in engines._converted(module, example, "network").get_ops()]


@needs_bfloat16
@pytest.mark.parametrize(
    "layer",
    [
        lambda: Conv2dSame(8, 8, 3, 2), lambda: StdConv2dSame(8, 8, 3, 2), lambda: ScaledStdConv2dSame(8, 8, 3, 2),
        lambda: MaxPool2dSame(3, 2), lambda: AvgPool2dSame(3, 2),
    ],
    ids=["Conv2dSame", "StdConv2dSame", "ScaledStdConv2dSame", "MaxPool2dSame", "AvgPool2dSame"],
)  # fmt: skip
@torch.inference_mode()
def test_layers_that_pad_by_the_image_s_side_in_bfloat16(layer):
    """OpenVINO rounds what timm computes of a side; the probe at 301 px does not meet it here."""
    padded = Padded(layer()).eval()
    engine = engines.OpenVINOEngine(padded, "bf16-mixed")
    for side in (517, 601):
        found, expected = engine(images(side, side, 1)).map, padded(images(side, side, 1)).map
        assert found.shape == expected.shape
        assert F.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.999


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "groups"), [(3, 2, 1, 1), (5, 2, 1, 8), (3, 1, 2, 1), (5, 3, 1, 8), (1, 2, 1, 1)]
)
@torch.inference_mode()
def test_convolutions_pad_as_timm_s_do(kernel, stride, dilation, groups):
    padded = Padded(Conv2dSame(8, 8, kernel, stride, dilation=dilation, groups=groups, bias=True)).eval()
    with torch.inference_mode(False), torch.no_grad():
        assert "Pad" not in layer_kinds(engines._MapOf(padded), images(60, 80, 1))
    engine = engines.OpenVINOEngine(padded, "32")
    for height in range(33, 46, 3):
        shape = height, 50 - height // 3
        found, expected = engine(images(*shape)).map, padded(images(*shape)).map
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_conversion_reports_nothing_to_anybody(monkeypatch):
    telemetry = pytest.importorskip("openvino_telemetry.main", reason="this OpenVINO comes without its telemetry")

    def refuse(*arguments, **options):
        raise AssertionError("usage was to be reported")

    for name in ("__init__", "send_event", "start_session"):
        monkeypatch.setattr(telemetry.Telemetry, name, refuse)
    start_engine("openvino", build_backbone("timm/test_resnet", "random"), "32")


@pytest.mark.parametrize("fault", ["shape", "values"])
def test_an_engine_that_computes_something_else_is_refused(monkeypatch, fault):
    class Wrong(engines._MapOf):
        def forward(self, images):
            found = super().forward(images)
            return found[..., 1:, :] if fault == "shape" else found.flip(1)

    backbone, converted = build_backbone("timm/test_resnet", "random"), engines._converted
    monkeypatch.setattr(engines, "_converted", lambda part, *others: converted(Wrong(backbone), *others))
    with pytest.raises(UserError, match=r"otherwise than PyTorch \(cosine"):
        start_engine("openvino", backbone, "32")


def test_what_cannot_run_is_refused_and_leaves_no_store_behind(monkeypatch, tiny_museum, tmp_path):
    vit = build_embedder("timm/test_vit", "random")
    options = ExtractionOptions(accelerator="cpu", engine="openvino", num_workers=0, quiet=True)
    with pytest.raises(UserError, match="no network of patches"):
        describe_images(vit, load_ground_truth(tiny_museum), tmp_path / "store", options, Console(quiet=True))
    assert not (tmp_path / "store").exists()
    with pytest.raises(UserError, match="runs on the CPU"):
        check_engine("openvino", "cuda")
    with pytest.raises(UserError, match="engine fast: unknown"):
        check_engine("fast", "cpu")
    monkeypatch.setattr(openvino, "Core", lambda: type("", (), {"get_property": lambda *a: ["FP32"]})())
    with pytest.raises(UserError, match="no bfloat16 arithmetic"):
        start_engine("openvino", build_backbone("timm/test_resnet", "random"), "bf16-mixed")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UserError, match="not installed; pip install openvino"):
        check_engine("openvino", "cpu")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_store_is_that_of_its_engine(tiny_museum, tmp_path, two_threads):
    truth = load_ground_truth(enlarged(tiny_museum))
    embedder = build_embedder("timm/test_resnet", "random")
    rows, console = {}, Console(quiet=True)
    for engine in ("torch", "openvino"):
        options = ExtractionOptions(accelerator="cpu", engine=engine, batch_size=2, num_workers=0, quiet=True)
        assert options.n_streams == (2 if engine == "openvino" else 1)
        rows[engine] = np.array(
            describe_images(embedder, truth, tmp_path / engine, options, console).descriptors("database")
        )
        assert torch.get_num_threads() == 2  # not left divided
    np.testing.assert_allclose(rows["openvino"], rows["torch"], rtol=0, atol=2e-6)
    with pytest.raises(UserError, match="engine"):
        describe_images(embedder, truth, tmp_path / "torch", options, console)
    assert "engine" not in store_settings(embedder, truth, None, "32")["model"]


def test_auto_takes_the_fastest_engine_that_is_installed_and_says_so(tiny_museum, tmp_path, monkeypatch):
    truth, options = load_ground_truth(enlarged(tiny_museum)), ExtractionOptions(accelerator="cpu", engine="auto")
    embedder, said = build_embedder("timm/test_resnet", "random"), io.StringIO()
    store = describe_images(embedder, truth, tmp_path / "store", options, Console(file=said))
    assert store.manifest().settings == store_settings(embedder, truth, None, "32", "openvino")
    assert "engine openvino" in said.getvalue()
    assert options.for_model(build_embedder("timm/test_vit", "random")).engine == "torch"  # a network of patches
    assert replace(options, precision="bf16-mixed").for_model(embedder).engine == "torch"  # whose rows differ by more
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert options.for_model(embedder).engine == "torch"


@pytest.mark.parametrize("precision", ["32", pytest.param("bf16-mixed", marks=needs_bfloat16)])
@torch.inference_mode()
def test_streams_at_work_side_by_side_keep_to_themselves(backbone, precision, two_threads):
    engine = start_engine("openvino", backbone, precision, n_streams=2)
    inputs = [images(140 + 3 * i, 150, n=1) for i in range(12)]
    with ThreadPoolExecutor(2) as streams:
        found = list(streams.map(engine, inputs))
    for features, x in zip(found, inputs, strict=True):
        torch.testing.assert_close(features.map, engine(x).map, rtol=1e-5, atol=1e-5)


def test_a_fault_in_a_stream_is_told_and_finished_rows_are_kept(tiny_museum, tmp_path, two_threads, monkeypatch):
    truth, embedder = load_ground_truth(enlarged(tiny_museum)), build_embedder("timm/test_resnet", "random")
    options = ExtractionOptions(accelerator="cpu", engine="openvino", batch_size=2, num_workers=0, quiet=True)
    describe, batches, lock = DescriptorModule.describe, [], threading.Lock()

    def fail(module, batch):
        with lock:
            batches.append(batch)
            is_fifth = len(batches) == 5
        if is_fifth:
            raise UserError("the fifth batch")
        return describe(module, batch)

    monkeypatch.setattr(DescriptorModule, "describe", fail)
    with pytest.raises(UserError, match="the fifth batch"):
        describe_images(embedder, truth, tmp_path / "store", options, Console(quiet=True))
    assert torch.get_num_threads() == 2
    monkeypatch.undo()
    told = io.StringIO()
    describe_images(embedder, truth, tmp_path / "store", options, Console(file=told, width=200))
    kept = int(re.search(r"continuing, (\d+) of ", told.getvalue())[1])
    assert 4 <= kept < len(batches)  # the four before; of those at work behind it, what was described by then


def test_an_efficientnet_starts_in_float32_under_autocast():
    backbone = build_backbone("lite0_in", "random")
    seen = {}
    for name in ("conv_stem", "blocks.3", "blocks.4"):
        module = backbone.model.get_submodule(name)
        module.register_forward_hook(lambda module, inputs, output, name=name: seen.update({name: output.dtype}))
    with torch.inference_mode():
        plain = backbone(images(130, 140)).map
        expected = backbone.model.forward_features(images(130, 140))
        assert torch.equal(plain, expected)  # in float32 nothing changes
        with torch.autocast("cpu", dtype=torch.bfloat16):
            backbone(images(130, 140))
    assert seen == {"conv_stem": torch.float32, "blocks.3": torch.float32, "blocks.4": torch.bfloat16}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.inference_mode()
def test_a_compiled_backbone_on_a_gpu():
    backbone = build_backbone("timm/test_resnet", "random").cuda()
    compiled = start_engine("compile", backbone, "32")
    for shape in SHAPES:
        torch.testing.assert_close(compiled(images(*shape).cuda()).map, backbone(images(*shape).cuda()).map)


@torch.inference_mode()
def test_small_images_are_left_to_pytorch():
    # OpenVINO averages wrongly where a map is smaller than the pooling's window, as here.
    embedder = build_embedder("timm/test_resnet", "random", scales=[1.0])
    small, large = embedder.normalise((images(24, 32) * 60 + 128).byte()), images(128, 130)
    expected = embedder.describe(small), embedder.describe(large)
    used = []
    engine = start_engine("openvino", embedder.backbone, "32")

    def noted(batch):
        used.append(batch.shape[-1])
        return engine(batch)

    torch.testing.assert_close(embedder.describe(small, noted), expected[0], rtol=0, atol=0)
    torch.testing.assert_close(embedder.describe(large, noted), expected[1], rtol=0, atol=2e-6)
    assert used == [130]


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that ``--engine compile`` makes, run without generated code."""
    made = []

    def run_as_traced(graph, inputs):
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)  # pytest would have it told, slowly
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=run_as_traced))
    torch._dynamo.reset()
    yield made
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "batches", "most"),
    [
        ("timm/test_resnet", (2, 1, 16), 4 if NEW_TORCH else 6),
        ("timm/test_vit", (2, 1), 2),
        ("timm/test_efficientnet", (2, 1), 2),
    ],
)
@torch.inference_mode()
def test_a_few_graphs_serve_all_shapes_and_batches(name, batches, most, graphs):
    backbone = build_backbone(name, "random")
    compiled = start_engine("compile", backbone, "32")
    for n in batches:
        compiled(images(128, 128, n))  # a square, which could be taken for a rule
    for n, (height, width) in itertools.product(batches, [(144, 176), (176, 144)]):
        if backbone.patch == 1:
            height, width = height + 1, width + 3
        found, expected = compiled(images(height, width, n)), backbone(images(height, width, n))
        torch.testing.assert_close(found.map, expected.map)
        assert found.cls is expected.cls is None or torch.equal(found.cls, expected.cls)
    assert len(graphs) <= most
    values = [node.meta.get("example_value") for graph in graphs for node in graph.graph.nodes]
    sides = [str(side) for value in values if isinstance(value, torch.Tensor) for side in value.shape]
    # timm's own padding nests from layer to layer, which takes minutes to compile.
    assert len(sides) > 50 and max(map(len, sides)) < 100


@torch.inference_mode()
def test_what_cannot_be_compiled_whole_is_refused(graphs):
    backbone = build_backbone("timm/test_resnet", "random")
    backbone.model.maxpool = Unknown()
    with pytest.raises(UserError, match=r"cannot compile timm/test_resnet \(.+\); take torch"):
        start_engine("compile", backbone, "32")(images(64, 50))


class Unknown(nn.Module):
    def forward(self, x):
        torch._dynamo.graph_break()
        return x


@torch.inference_mode()
def test_a_compiled_backbone_never_goes_on_uncompiled(graphs, monkeypatch):
    monkeypatch.setattr(engines, "MOST_GRAPHS", 1)
    compiled = start_engine("compile", build_backbone("timm/test_resnet", "random"), "32")
    compiled(images(64, 50, 2))
    with pytest.raises(UserError, match="timm/test_resnet would be compiled anew for most image shapes"):
        compiled(images(64, 50, 1))


@pytest.mark.parametrize("kernel_size", range(1, 8))
def test_the_padding_of_compiled_layers_is_timms(kernel_size):
    for side, stride, dilation in itertools.product(range(1, 40), range(1, 5), range(1, 4)):
        expected = padding.get_same_padding(side, kernel_size, stride, dilation)
        assert engines.added_padding(side, kernel_size, stride, dilation) == expected
