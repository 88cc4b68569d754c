"""Files of a Hub on this machine: which one is taken, what is recorded, and what is said where there is none."""

import hashlib
import io
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch

import metilr
from metilr.errors import UserError
from metilr.models import ModelOptions
from metilr.models.checkpoints import build_model, checkpoint_entry, read_checkpoint, write_checkpoint
from metilr.models.embedder import build_embedder
from metilr.models.hub import CHECKPOINTS, WEIGHTS, locate, pin, verify_hub_file
from tests.hub import TOKEN, Hub

NET = "timm/test_resnet"


def checkpoint(tmp_path: Path, name: str, seed: int = 0) -> bytes:
    """A checkpoint's file, of an untrained network that the seed decides."""
    embedder = build_embedder(NET, "random", scales=(1.0,), seed=seed)
    state = {f"embedder.{key}": value for key, value in embedder.state_dict().items()}
    whitening = {"kind": "pca", "mean": torch.arange(3, dtype=torch.float64)}
    entry = {**checkpoint_entry(embedder, None, None, {"scales": (1.0,), "x": None}), "whitening": whitening}
    write_checkpoint(tmp_path / name, {"state_dict": state, "metilr": entry})
    return (tmp_path / name).read_bytes()


def test_the_first_of_the_usual_files_is_taken_and_recorded_with_its_commit(hub: Hub) -> None:
    files = {name: name.encode() for name in ("best.ckpt", "pytorch_model.bin", "other.pth")}
    old = hub.put("anna/net", files)
    hub.repositories["anna/net"].refs["v1.0"] = old
    new = hub.put("anna/net", {**files, "model.safetensors": b"safe", "deep/er/net.pt": b"deep"})
    for address, names, commit, file in (
        ("hf://anna/net", CHECKPOINTS, new, "model.safetensors"),
        ("hf://anna/net", WEIGHTS, new, "model.safetensors"),
        ("hf://anna/net@v1.0", CHECKPOINTS, old, "best.ckpt"),
        ("hf://anna/net@v1.0", WEIGHTS, old, "pytorch_model.bin"),
        (f"hf://anna/net@{old}/other.pth", WEIGHTS, old, "other.pth"),
        ("hf://anna/net/deep/er/net.pt", WEIGHTS, new, "deep/er/net.pt"),
    ):
        path, name = locate(address, names)
        assert name == f"hf://anna/net@{commit}/{file}"
        assert path.read_bytes() == hub.repositories["anna/net"].commits[commit][file]
    assert locate("a/b.ckpt", CHECKPOINTS) == (Path("a/b.ckpt"), "b.ckpt")


def test_a_complete_address_asks_nobody_once_its_file_is_there(hub: Hub) -> None:
    hub.put("anna/net", {"best.ckpt": b"first"})
    first = locate("hf://anna/net", CHECKPOINTS)
    newer = hub.put("anna/net", {"best.ckpt": b"second"})
    hub.requests.clear()
    assert locate(first[1], CHECKPOINTS) == first and first[0].read_bytes() == b"first"
    assert hub.requests == []
    assert locate("hf://anna/net", CHECKPOINTS)[1] == f"hf://anna/net@{newer}/best.ckpt"  # and a short one the newest


@pytest.mark.parametrize("fault", ["offline", "no network"])
def test_without_a_network_the_cache_is_taken(hub: Hub, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # between its tries
    hub.put("anna/net", {"best.ckpt": b"first"})
    found = locate("hf://anna/net", CHECKPOINTS)
    if fault == "offline":
        hub.set_offline(monkeypatch)
        hub.requests.clear()
    else:
        hub.stop()
    assert locate("hf://anna/net", CHECKPOINTS) == found
    asked, download = [], huggingface_hub.hf_hub_download

    def noted(*args: object, **options: object) -> str:
        asked.append(options["local_files_only"])
        return download(*args, **options)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", noted)
    reason = "HF_HUB_OFFLINE is set" if fault == "offline" else "the Hub cannot be reached"
    with pytest.raises(UserError, match=rf"ckpt hf://anna/other: is not in the cache, and {reason}; .*on this disk"):
        locate("hf://anna/other", CHECKPOINTS, "ckpt")
    assert asked == [False, True, True]  # the network once, and not for each of the usual files
    assert fault != "offline" or hub.requests == []


def test_the_variables_of_huggingface_hub_are_followed(hub: Hub, tmp_path: Path) -> None:
    """As a process of its own has them; nothing that takes seconds is imported."""
    commit = hub.put("anna/net", {"pytorch_model.bin": b"content"})
    code = (
        "import sys; from metilr.models.hub import *; print(*locate('hf://anna/net', WEIGHTS), 'torch' in sys.modules)"
    )
    for offline, status in (("1", 1), ("0", 0), ("1", 0)):
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": offline,
        }
        environment["PYTHONPATH"] = str(Path(__file__).parents[2])
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert run.returncode == status, run.stderr
    path, name, has_torch = run.stdout.split()
    assert name == f"hf://anna/net@{commit}/pytorch_model.bin" and has_torch == "False"
    assert Path(path).is_relative_to(tmp_path / "home")


def test_what_cannot_be_had_is_said_in_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.put("anna/net", {"notes.txt": b"", "net.ckpt": b"x"})
    hub.put("anna/secret", {"best.ckpt": b"secret"})
    hub.put("anna/terms", {"best.ckpt": b"terms"})
    hub.repositories["anna/secret"].is_private = hub.repositories["anna/terms"].is_gated = True
    for address, said in (
        ("hf://anna/nothing", "no such repository, or a private one; check the name, or hf auth login"),
        ("hf://anna/secret", "no such repository, or a private one"),
        ("hf://anna/terms", r"asks to accept its terms; do so at https://huggingface.co/anna/terms, then hf auth"),
        (
            "hf://anna/net",
            r"holds no model.safetensors or model.ckpt or best.ckpt; name its file, as hf://anna/net/FILE",
        ),
        ("hf://anna/net/gone.ckpt", "holds no gone.ckpt"),
        ("hf://anna/net@v9/net.ckpt", "no such revision"),
        ("hf://anna/net/notes.txt", r"is not read here; name a file that ends in \.safetensors, \.ckpt"),
        ("hf://anna", "is no address; write hf://OWNER/NAME"),
        ("hf://anna/net@/net.ckpt", "is no address"),
        ("hf://anna/net/../../x.ckpt", r"cannot be had \(.*\); try again"),
        ("hf://anna/n--t", r"cannot be had \(.*\); try again"),
    ):
        with pytest.raises(UserError, match=f"^ckpt {address}: {said}") as error:
            locate(address, CHECKPOINTS, "ckpt")
        assert "\n" not in str(error.value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert locate("hf://anna/secret", CHECKPOINTS)[0].read_bytes() == b"secret"
    assert locate("hf://anna/terms", CHECKPOINTS)[0].read_bytes() == b"terms"


def test_a_file_that_changed_on_this_disk_is_refused(hub: Hub) -> None:
    hub.put("anna/net", {"best.ckpt": b"content"})
    path, name = locate("hf://anna/net", CHECKPOINTS)
    path.resolve().write_bytes(b"comment")  # as long as before, so that a check of the size passes
    with pytest.raises(UserError, match="is damaged"):
        locate(name, CHECKPOINTS)


@pytest.mark.parametrize("file", ["model.safetensors", "best.ckpt"])
def test_a_model_of_the_hub_is_that_of_the_file(hub: Hub, tmp_path: Path, file: str) -> None:
    commit = hub.put("anna/net", {file: checkpoint(tmp_path, file)})
    embedder = metilr.load("hf://anna/net")
    here = metilr.load(tmp_path / file)
    images = torch.rand(2, 3, 48, 40)
    assert torch.equal(embedder(images), here(images))
    assert embedder.backbone.provenance.source == f"checkpoint hf://anna/net@{commit}/{file}"
    assert here.backbone.provenance.source == f"checkpoint {file}"
    assert build_model(ModelOptions("hf://anna/net")).backbone.provenance == embedder.backbone.provenance


def test_weights_of_the_hub_are_loaded_and_recorded(hub: Hub) -> None:
    state = build_embedder(NET, "random", seed=3).backbone.model.state_dict()
    commit = hub.put("anna/net", {"model.safetensors": safetensors.torch.save(state)})
    provenance = build_embedder(NET, "hf://anna/net").backbone.provenance
    assert provenance.source == f"hf://anna/net@{commit}/model.safetensors" and provenance.seed is None
    assert provenance.weights_sha256 == build_embedder(NET, "random", seed=3).backbone.provenance.weights_sha256


def test_a_stranger_s_file_runs_no_code(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hostile:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "executed",)

    stream = io.BytesIO()
    torch.save({"state_dict": {"a": Hostile()}}, stream)
    hub.put("anna/net", {"best.ckpt": stream.getvalue(), "pytorch_model.bin": stream.getvalue()})
    for load in (lambda: metilr.load("hf://anna/net"), lambda: build_embedder(NET, "hf://anna/net")):
        with pytest.raises(UserError, match="cannot be read"):
            load()
    assert not (tmp_path / "executed").exists()


def test_options_are_made_complete_and_others_stay(hub: Hub) -> None:
    commit = hub.put("anna/net", {"best.ckpt": b""})
    assert pin(ModelOptions("hf://anna/net")) == ModelOptions(f"hf://anna/net@{commit}/best.ckpt")
    options = ModelOptions("a/b.ckpt")
    assert pin(options) is options and options.ckpt == Path("a/b.ckpt")
    assert ModelOptions(Path("a.ckpt")) == ModelOptions("a.ckpt")


def test_a_checkpoint_is_the_same_in_both_forms(tmp_path: Path) -> None:
    contents = []
    for name in ("a.ckpt", "a.safetensors"):
        checkpoint(tmp_path, name)
        contents.append(read_checkpoint(tmp_path / name))
    one, other = contents
    assert one["state_dict"].keys() == other["state_dict"].keys()
    assert all(torch.equal(value, other["state_dict"][key]) for key, value in one["state_dict"].items())
    assert torch.equal(one["metilr"]["whitening"].pop("mean"), other["metilr"]["whitening"].pop("mean"))
    assert {**one["metilr"], "config": None} == {**other["metilr"], "config": None}
    assert other["metilr"]["config"] == {"scales": [1.0], "x": None}


def test_safetensors_that_are_no_checkpoint_are_refused_in_one_line(tmp_path: Path) -> None:
    file, tensors = tmp_path / "a.safetensors", {"a": torch.ones(2)}
    for metadata in (
        None, {"metilr": "{"}, {"metilr": "[" * 10_000}, {"metilr": '{"tensor in this file": "b"}'},
        {"metilr": '{"tensor in this file": []}'}, {"metilr": '{"model": 1}'}, {"metilr": "3"},
        {"metilr": '{"a": 1, "a": 2}'},
    ):  # fmt: skip
        safetensors.torch.save_file(tensors, file, metadata)
        with pytest.raises(UserError, match=r"a\.safetensors: ") as error:
            metilr.load(file)
        assert "\n" not in str(error.value)


def hub_cache(folder: Path, name: str, content: bytes) -> Path:
    """The layout of Hugging Face's cache: a link from the snapshot to the file under its digest."""
    repository = folder / "models--timm--net.tag"
    stored = repository / "blobs" / hashlib.sha256(content).hexdigest()
    link = repository / "snapshots" / "abc" / name
    for file in (stored, link, repository / "refs" / "main"):
        file.parent.mkdir(parents=True, exist_ok=True)
    stored.write_bytes(content)
    link.symlink_to(stored)
    (repository / "refs" / "main").write_text("abc")
    return stored


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_hub_file_is_checked_against_its_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert verify_hub_file("timm/net.tag") is None
    stored = hub_cache(tmp_path, name, b"weights")
    assert verify_hub_file("timm/net.tag") == hashlib.sha256(b"weights").hexdigest()
    stored.write_bytes(b"weighty")  # as long as before, so that a check of the size passes
    with pytest.raises(UserError, match="is damaged") as error:
        verify_hub_file("timm/net.tag")
    assert str(stored) in str(error.value)
