"""Checkpoints, metilr's and the reference code's, and weights files."""

import io
import pickle
import zipfile
from collections import OrderedDict

import pytest
import safetensors.torch
import timm
import torch

from metilr.data.pixels import resized_shape
from metilr.evaluation.database import load_whitening
from metilr.models.checkpoints import FORMAT, load_embedder, model_entry, read_checkpoint, write_checkpoint
from metilr.models.embedder import Embedder, build_embedder
from metilr.models.weights import read_state_dict
from metilr.retrieval.whitening import PCAWhitening
from tests.fuzz.guard import refusal
from tests.fuzz.mutations import SHARED, Program, cases, each_replaced, mutated, mutated_value

STATE = {"module.a.weight": torch.arange(6.0).reshape(2, 3), "module.b": torch.tensor([1], dtype=torch.int64)}
TOKENS = (
    b"cos\nsystem\n", b"R", b"c__builtin__\neval\n", b"torch._utils\n_rebuild_tensor_v2\n", b"\x80\x02",
    b"X\xff\xff\xff\x7f", b"K\xff", b"J\xff\xff\xff\x7f", b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f", b"PK\x03\x04",
    b"PK\x01\x02", b"PK\x05\x06", b".",
)  # fmt: skip
SAFE_TOKENS = (
    b"[999999999999,3]", b"F64", b"BOOL", b"I8", b"-1", b"[0,0]", b"[3]", b'"', b"{" * 500, b"F8_E4M3", b"[]",
)  # fmt: skip
HOSTILE = (None, 3, "x", torch.zeros(0), torch.zeros(3, 3), torch.zeros(64, dtype=torch.bool), [1.0])


def saved(content, **options):
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


def with_pickle(content, rng):
    """The same archive with other bytes where its pickle is."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w") as new:
        for entry in old.infolist():
            part = old.read(entry)
            new.writestr(entry.filename, mutated(part, rng, TOKENS) if entry.filename.endswith("data.pkl") else part)
    return stream.getvalue()


def read_weights(file):
    with refusal(file) as said:
        state = read_state_dict(file)
        assert state and all(type(key) is str for key in state)
        for tensor in state.values():
            assert isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu"
            assert tensor.nelement() * tensor.element_size() <= 10_000
            tensor.clone()  # every element is there
    return said


@pytest.mark.parametrize("form", ["zip", "zip's pickle", "legacy", "bare pickle"])
def test_changed_weights_files(tmp_path, form):
    file, canary, n_read = tmp_path / "w.pth", tmp_path / "canary", 0
    hostile = {**STATE, "x": Program(f"touch {canary}")}
    options = {"_use_new_zipfile_serialization": form not in ("legacy", "bare pickle")}
    contents = [saved(STATE, **options), saved(hostile, **options), saved({"state_dict": STATE}, **options)]
    if form == "bare pickle":
        contents = [pickle.dumps(content, 2) for content in (hostile, {"a": Program(f"touch {canary}")})]
    for rng in cases(125):
        content = rng.choice(contents)
        file.write_bytes(with_pickle(content, rng) if form == "zip's pickle" else mutated(content, rng, TOKENS))
        n_read += not read_weights(file)
        with refusal(file):
            assert isinstance(read_checkpoint(file)["state_dict"], dict)
    assert not canary.exists() and (n_read or form == "bare pickle")


def test_changed_safetensors(tmp_path):
    file, whole, n_read = tmp_path / "w.safetensors", safetensors.torch.save(STATE), 0
    for rng in cases(350):
        head = int.from_bytes(whole[:8], "little") + 8
        file.write_bytes(mutated(whole[:head], rng, SAFE_TOKENS) + whole[head:])
        n_read += not read_weights(file)
    assert n_read > 10


def test_changed_safetensors_checkpoints(tmp_path):
    """Also of what they say of their model, which is JSON beside the tensors."""
    file, n_read = tmp_path / "a.safetensors", 0
    write_checkpoint(file, {"state_dict": STATE, "metilr": {"format": FORMAT, "rows": [1, {"x": torch.ones(3)}]}})
    whole = file.read_bytes()
    for rng in cases(250):
        head = int.from_bytes(whole[:8], "little") + 8
        file.write_bytes(mutated(whole[:head], rng, SAFE_TOKENS) + whole[head:])
        with refusal(file) as said:
            content = read_checkpoint(file)
            assert all(isinstance(tensor, torch.Tensor) for tensor in content["state_dict"].values())
        n_read += not said
    assert n_read > 5


def why_refused(file, load=load_embedder):
    with refusal(file) as said:
        load(file)
    return said[0] if said else None


@pytest.fixture(scope="module")
def whole():
    torch.manual_seed(0)
    embedder = build_embedder("timm/test_resnet", "random", "gem", 3.0, None, (1.0,))
    state = {f"embedder.{name}": value for name, value in embedder.state_dict().items()}
    model = {**model_entry(embedder, 64), "scales": [1.0]}
    entry = {"format": FORMAT, "model": model, "provenance": {"source": "x", "licence": None}}
    return {"state_dict": state, "metilr": entry, "epoch": 1}


def test_changed_entries_of_checkpoints(tmp_path, whole):
    file, n_read = tmp_path / "a.ckpt", 0
    for rng in cases(75):
        torch.save({**whole, "metilr": mutated_value(whole["metilr"], rng)}, file)
        with refusal(file) as said:
            embedder = load_embedder(file)
            assert isinstance(embedder, Embedder) and not embedder.training
            assert all(type(side) is int and side >= 1 for side in resized_shape(1, 1, embedder.image_size))
            assert all(0 < scale < float("inf") for scale in embedder.scales) and embedder.scales
            assert embedder.mean.numel() == embedder.std.numel() == 3 and (embedder.std > 0).all()
        n_read += not said
    assert n_read > 5


def test_entries_whose_parts_share_their_parts(tmp_path, whole):
    """A file keeps them short; in a message or a comparison they would be gigabytes."""
    file = tmp_path / "a.ckpt"
    for changed in each_replaced(whole["metilr"], (SHARED, OrderedDict(a=SHARED), (SHARED, 1))):
        torch.save({**whole, "metilr": changed}, file)
        why_refused(file)
        torch.save({"state_dict": {}, "metilr": {"whitening": {"kind": changed}}}, file)
        assert why_refused(file, load_whitening)


def test_changed_tensors_of_checkpoints(tmp_path, whole):
    file = tmp_path / "a.ckpt"
    for rng in cases(30):
        state = dict(whole["state_dict"])
        state[rng.choice([*state, "embedder.new", "other", 3])] = rng.choice(HOSTILE)
        if rng.random() < 0.3:
            del state[rng.choice([*state])]
        torch.save({**whole, "state_dict": state}, file)
        with refusal(file):
            load_embedder(file)(torch.zeros(1, 3, 32, 32))


HUGE = "timm/vit_gigantic_patch14_clip_224"  # 7 GB, where a case has 1


@pytest.mark.parametrize(
    ("changes", "tensors", "said"),
    [
        ({"backbone": HUGE}, {}, f"for {HUGE}: the weights do not fit (missing: backbone.model.blocks.0"),
        ({}, {"embedder.x": torch.zeros(()).expand(2**33)}, "its tensors claim more numbers than the file has"),
        # As a layer of the network's width it would take 2 GB.
        ({"projector_dim": 2**20}, {"embedder.projector.linear.weight": torch.zeros(2**20, 1)}, "the projector is ("),
        ({"projector_dim": 1}, {"embedder.projector.linear.weight": torch.zeros(1, 2**20)}, "the projector is ("),
    ],
)
def test_a_model_that_takes_memory_is_refused_before(tmp_path, whole, changes, tensors, said):
    file, entry = tmp_path / "a.ckpt", whole["metilr"]
    changed = {**entry, "model": {**entry["model"], **changes}}
    torch.save({"state_dict": {**whole["state_dict"], **tensors}, "metilr": changed}, file)
    assert said in why_refused(file)


def test_reference_weights_that_name_a_large_network(tmp_path, monkeypatch):
    """The largest of those known, 776 MB, is not built either."""
    file = tmp_path / "a.ckpt"
    depths = enumerate((3, 4, 23, 3), start=1)
    blocks = {f"layer{i}.{block}.conv1.weight": torch.zeros(1) for i, depth in depths for block in range(depth)}
    state = {**blocks, "layer1.0.conv3.weight": torch.zeros(1), "layer1.0.conv2.weight": torch.zeros(512, 16, 3, 3)}
    torch.save({"state_dict": state}, file)
    built = []
    monkeypatch.setattr("metilr.models.checkpoints.build_backbone", lambda *_: built.append(True))
    assert "for timm/resnext101_32x16d: the weights do not fit" in why_refused(file) and not built


def test_changed_reference_checkpoints(tmp_path):
    file = tmp_path / "a.ckpt"
    network = timm.create_model("resnet18", pretrained=False, num_classes=0).state_dict()
    small = {key: value for key, value in network.items() if value.numel() < 40_000 or key == "layer1.0.conv2.weight"}
    state = {f"backbone.backbone.{key}": value for key, value in small.items()} | {
        "backbone.pool.p": torch.tensor([2.5]), "backbone.projector.weight": torch.zeros(4, 512),
    }  # fmt: skip
    likely = ["backbone.backbone.layer1.0.conv2.weight", "backbone.pool.p", "backbone.projector.weight", "layer1", 3]
    hostile = (*HOSTILE, torch.zeros(64, 0, 3, 3), torch.zeros(1, 1, 1, 1))
    for rng in cases(30):
        changed = dict(state)
        for _ in range(rng.choice((1, 2))):
            changed[rng.choice([*likely, *changed])] = rng.choice(hostile)
        torch.save({"state_dict": changed}, file)
        assert why_refused(file)  # a part of the weights is missing


def test_changed_whitenings_in_checkpoints(tmp_path):
    file = tmp_path / "a.ckpt"
    whitening = {
        "kind": PCAWhitening.format, "mean": torch.zeros(3, dtype=torch.float64), "n": torch.tensor(9),
        "projection": torch.eye(3, 2, dtype=torch.float64), "eigenvalues": torch.ones(3, dtype=torch.float64),
        "shrinkage": torch.tensor(1.0), "supported_dim": torch.tensor(3),
    }  # fmt: skip
    hostile = (*HOSTILE, torch.zeros(3, dtype=torch.bfloat16), torch.tensor(-1), {}, [])
    expanded = torch.zeros((), dtype=torch.float64).expand(2**31)  # 16 GB of one number
    torch.save({"state_dict": {}, "metilr": {"whitening": {**whitening, "mean": expanded}}}, file)
    assert why_refused(file, load_whitening)
    n_read = 0
    for rng in cases(100):
        entry = {"whitening": mutated_value(whitening, rng, hostile)}
        torch.save({"state_dict": {}, "metilr": rng.choice((entry, entry, entry, *hostile))}, file)
        with refusal(file) as said:
            assert load_whitening(file).transform(torch.ones(2, 3).numpy()).shape[0] == 2
        n_read += not said
    assert n_read
