"""Weight files: found or downloaded, verified, read without executing pickle code, loaded strictly."""

import contextlib
import hashlib
import importlib.util
import re
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import safetensors.torch
import torch
from rich.console import Console
from torch import nn

from metilr.errors import UserError
from metilr.files import file_sha256, refuse_compressed, rename_on_disk
from metilr.progress import byte_progress
from metilr.transfer import MOST, FetchError, content_length, copy_body, open_url

HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # in the order in which timm looks for them
StateDict = dict[str, torch.Tensor]

# BatchNorm's step counter: no part of the forward pass in eval mode, absent from files older than torch 0.4.1.
COUNTER = "num_batches_tracked"


class PackagedFile(NamedTuple):
    """A weights file inside an installed Python package.

    Attributes:
        module: Name that the package is imported by.
        path: Of the file, relative to the package's folder.
        install: The command that brings the package.
    """

    module: str
    path: str
    install: str


def find_packaged_file(package: PackagedFile, sha256: str) -> Path:
    """Return the path of a weights file that came with a Python package, verified.

    Raises:
        UserError: If the package is missing, or its file is not the published one.
    """
    module = importlib.util.find_spec(package.module)
    if module is None or module.origin is None:
        raise UserError(f"the package {package.module} is not installed; run: {package.install}")
    path = Path(module.origin).parent / package.path
    if not path.is_file() or not file_sha256(path).startswith(sha256):
        raise UserError(f"{path}: missing or not the published file; reinstall it: {package.install} --force-reinstall")
    return path


def fetch_official_file(url: str, sha256: str | None) -> Path:
    """Return the path of an official weights file in torch.hub's cache: downloaded if need be, always verified.

    A file without a published digest is trusted once: the digest is recorded beside it (``FILE.sha256``) and
    a later difference is refused.

    Args:
        url: Where the file is published; the cache keeps its name.
        sha256: The file's digest or its first digits; None if unknown.

    Raises:
        UserError: If the download fails, or the file, downloaded or cached, has another digest.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    record = path.with_name(path.name + ".sha256")
    if not path.is_file():
        _download(url, path, sha256)
    digest = file_sha256(path)
    expected = sha256
    if expected is None and record.is_file():
        expected = record.read_text(encoding="ascii", errors="replace").strip()
    if expected is None:
        with contextlib.suppress(OSError):  # a read-only cache: the results still name the digest
            record.write_text(digest + "\n", encoding="ascii")
    elif not digest.startswith(expected):
        raise UserError(
            f"{path}: its sha256 starts with {digest[:8]}, not {expected[:8]}, so it is not the file of {url}; "
            f"delete {path} and run again"
        )
    return path


def _download(url: str, path: Path, sha256: str | None) -> None:
    """Download to a temporary file beside the target, which appears whole and verified or not at all."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    elsewhere = "get the file by other means and pass it as --weights FILE"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        size, announced = _copy_from_network(url, partial)
        if announced is not None and size != announced:
            raise UserError(f"{url}: the download broke off at {size} of {announced} bytes; run again, or {elsewhere}")
        digest = file_sha256(partial)
        if sha256 is not None and not digest.startswith(sha256):
            raise UserError(
                f"{url}: the download's sha256 starts with {digest[:8]}, not {sha256[:8]}; run again, or {elsewhere}"
            )
        rename_on_disk(partial, path)
    except (OSError, FetchError) as error:
        raise UserError(f"{url}: cannot be downloaded to {path.parent} ({error}); {elsewhere}") from error
    finally:
        with contextlib.suppress(OSError):  # nothing to remove, or the folder itself is the trouble
            partial.unlink()


def _copy_from_network(url: str, target: Path) -> tuple[int, int | None]:
    """Copy a URL's content to a file; return the bytes written and those announced, None if not announced."""
    with open_url(url) as response, target.open("wb") as file, byte_progress(console=Console(stderr=True)) as progress:
        announced = content_length(response)
        bar = progress.add_task(url.rpartition("/")[2], total=announced)
        most = MOST if announced is None else announced
        size = copy_body(response, file, most, lambda n: progress.update(bar, completed=n))
    return size, announced


def verify_hub_file(hub_id: str, filename: str | None = None) -> str | None:
    """Check a weights file in Hugging Face's cache against the sha256 that the hub names it by.

    The hub's own client compares sizes only.

    Args:
        hub_id: As in timm's configurations: ``owner/name``, or ``owner/name@revision``.
        filename: The file; None for the names that timm looks for.

    Returns:
        The file's sha256; None if it is not in that cache.

    Raises:
        UserError: If the file is damaged.
    """
    repository, _, revision = hub_id.partition("@")
    for name in HUB_FILES if filename is None else (filename,):
        cached = huggingface_hub.try_to_load_from_cache(repository, name, revision=revision or None)
        if isinstance(cached, str):
            stored = Path(cached).resolve()  # large files lie under their sha256, small ones under another digest
            digest = file_sha256(stored)
            if re.fullmatch("[0-9a-f]{64}", stored.name) and stored.name != digest:
                raise UserError(f"{stored}: is damaged (its sha256 is {digest}); delete it to have it downloaded again")
            return digest
    return None


def read_state_dict(path: Path) -> StateDict:
    """Read a state dict from a PyTorch or safetensors file.

    Takes the state dict itself or a checkpoint that holds it under ``state_dict``, and drops the ``module.``
    that DataParallel puts before every key. Never executes pickle code (``weights_only=True``).

    Raises:
        UserError: If the file is missing, damaged, holds more than tensors and containers, or no state dict.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; check --weights")
    try:
        refuse_compressed(path)
        if path.suffix == ".safetensors":
            content: object = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in as many ways as its format has parts
        raise UserError(
            f"{path}: cannot be read as weights ({type(error).__name__}): it is damaged or holds more than "
            "tensors; get the file again, or save the state dict alone with torch.save(model.state_dict(), FILE)"
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content or not all(_is_weight(item) for item in content.items()):
        raise UserError(f"{path}: holds no state dict (a mapping of names to tensors); check --weights")
    if all(key.startswith("module.") for key in content):
        return {key.removeprefix("module."): value for key, value in content.items()}
    return dict(content)


def _is_weight(item: tuple[object, object]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], torch.Tensor)


def rename_efficientnet_lite0(state_dict: StateDict) -> StateDict:
    """Turn EfficientNet-PyTorch's keys for Lite0 into timm's.

    The blocks come in the same order, there numbered through and here by stage. A block's layers are named by
    position here, so the first block, which has no expansion, shifts them by one. Keys that are in timm's
    form already stay as they are.
    """
    blocks_per_stage = (1, 2, 2, 3, 3, 4, 1)  # EfficientNet-B0's depths, Tan and Le 2019, table 1
    blocks = [f"{stage}.{block}" for stage, depth in enumerate(blocks_per_stage) for block in range(depth)]
    expanded = {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }
    unexpanded = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    outer = {
        "_conv_stem": "conv_stem",
        "_bn0": "bn1",
        "_conv_head": "conv_head",
        "_bn1": "bn2",
        "_fc": "classifier",
    }
    renamed = {}
    for key, value in state_dict.items():
        inner = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
        if inner and int(inner[1]) < len(blocks):
            layers = unexpanded if inner[1] == "0" else expanded
            key = f"blocks.{blocks[int(inner[1])]}.{layers.get(inner[2], inner[2])}.{inner[3]}"
        else:
            layer, _, rest = key.partition(".")
            key = f"{outer.get(layer, layer)}.{rest}"
        renamed[key] = value
    return renamed


def load_strictly(model: nn.Module, state_dict: StateDict, ignored: Iterable[str], source: str) -> None:
    """Load weights into a model without its classifier, and let no key or shape pass that does not fit.

    BatchNorm's step counters may be missing (files older than torch 0.4.1): they keep the model's zeros,
    which nothing reads in eval mode.

    Args:
        model: Loaded in place.
        state_dict: Weights by the model's own names.
        ignored: Prefixes of keys that the model lacks by design, each with its final dot.
        source: What the message calls the weights: file and backbone.

    Raises:
        UserError: If a key is missing or unexpected, or a shape differs; the message names the first few.
    """
    wanted = model.state_dict()
    refuse_unfit({key: value.shape for key, value in wanted.items()}, state_dict, ignored, source)
    given = {**{key: value for key, value in wanted.items() if key.endswith(COUNTER)}, **state_dict}
    model.load_state_dict({key: given[key] for key in wanted})


def refuse_unfit(wanted: Mapping[str, torch.Size], state_dict: StateDict, ignored: Iterable[str], source: str) -> None:
    """Compare weights with the names and shapes that a model has; raises as ``load_strictly``, and loads nothing."""
    given = {key: value.shape for key, value in state_dict.items() if not key.startswith(tuple(ignored))}
    given = {**{key: shape for key, shape in wanted.items() if key.endswith(COUNTER)}, **given}
    problems = {
        "missing": sorted(wanted.keys() - given.keys()),
        "unexpected": sorted(given.keys() - wanted.keys()),
        "of another shape": [
            f"{key} {tuple(given[key])} for {tuple(wanted[key])}"
            for key in wanted.keys() & given.keys()
            if given[key] != wanted[key]
        ],
    }
    if any(problems.values()):
        listed = "; ".join(f"{kind}: {_first_few(keys)}" for kind, keys in problems.items() if keys)
        raise UserError(f"{source}: the weights do not fit ({listed}); check --backbone and --weights")


def _first_few(keys: list[str], shown: int = 3) -> str:
    more = f" and {len(keys) - shown} more" if len(keys) > shown else ""
    return ", ".join(sorted(keys)[:shown]) + more


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the sha256 of named tensors: names in order, dtypes, shapes and bytes.

    The same for the same values whatever the file, order or device they came from. BatchNorm's step
    counters are left out: some files of the same weights carry them, some do not, and no descriptor depends
    on them.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        if name.endswith(COUNTER):
            continue
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
