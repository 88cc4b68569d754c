"""Weight files: found or downloaded, verified, read without executing pickle code, loaded strictly."""

import contextlib
import hashlib
import importlib.util
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from rich.console import Console
from torch import nn

from metilr.download import fetch
from metilr.errors import UserError
from metilr.files import file_sha256, parse_json, refuse_compressed
from metilr.models.zoo import BackboneSpec
from metilr.progress import byte_progress

SAFETENSORS = ".safetensors"
TENSOR = "tensor in this file"  # in the JSON of a checkpoint, before its name
StateDict = dict[str, torch.Tensor]

# BatchNorm's step counter: no part of the forward pass in eval mode, absent from files older than torch 0.4.1.
COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class Provenance:
    """Where a backbone's weights came from, for the results file."""

    source: str  # URL, hub name, file name, or "random"
    licence: str | None  # as the publisher states it; None if unstated or unknown
    file_sha256: str | None  # None if there was no file
    seed: int | None  # of random weights
    weights_sha256: str  # of the loaded tensors, the same whatever file form they came in


def official_file(spec: BackboneSpec) -> Path:
    """Return the path of a backbone's official weights, verified: from a Python package or torch.hub's cache.

    A file without a published digest is trusted once: its digest is recorded beside it, and a later one is refused.
    """
    if spec.package is not None:
        module, name, install = spec.package
        if (found := importlib.util.find_spec(module)) is None:
            raise UserError(f"the package {module} is not installed; run: {install}")
        path = Path(str(found.origin)).parent / name
        if not path.is_file() or file_sha256(path) != spec.sha256:
            raise UserError(f"{path}: missing or not the published file; reinstall it: {install} --force-reinstall")
        return path
    path = Path(torch.hub.get_dir()) / "checkpoints" / spec.url.rpartition("/")[2]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with byte_progress(console=Console(stderr=True)) as progress:
            bar = progress.add_task(path.name, total=None)
            fetch(
                spec.url, path, "run again, or get the file by other means and pass it as weights", sha256=spec.sha256,
                tries=3, report=lambda n, total: progress.update(bar, completed=n, total=total),
            )  # fmt: skip
    digest, record = file_sha256(path), path.with_name(path.name + ".sha256")
    expected = record.read_text(encoding="ascii", errors="replace").strip() if record.is_file() else digest
    if not digest.startswith(spec.sha256 or expected):
        raise UserError(f"{path}: its sha256 is {digest}, so it is not the file of {spec.url}; delete it and run again")
    if spec.sha256 is None and not record.is_file():
        with contextlib.suppress(OSError):  # a read-only cache: the results still name the digest
            record.write_text(digest + "\n", encoding="ascii")
    return path


def read_file(path: Path, remedy: str) -> Any:
    """Read a PyTorch or safetensors file to the CPU: tensors, plain values, NumPy scalars, and no pickle code."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        refuse_compressed(path)
        if path.suffix == SAFETENSORS:
            return safetensors.torch.load_file(path)
        # What a pickled NumPy number consists of, under its name of NumPy 1 and of NumPy 2; none of it runs code.
        scalar = np.float64(0).__reduce__()[0]
        safe: list[Any] = [*((scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")), np.dtype]
        safe += [type(np.dtype(code)) for code in ("f2", "f4", "f8", "i4", "i8", "?")]
        with torch.serialization.safe_globals(safe):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in as many ways as its format has parts
        reason = f"({type(error).__name__}): it is damaged, or holds more than tensors and plain values"
        raise UserError(f"{path}: cannot be read {reason}; {remedy}") from error


def as_safetensors(content: Mapping[str, Any]) -> bytes:
    """A checkpoint in the form of safetensors: ``state_dict`` and the tensors of ``metilr``, the rest of it as JSON."""
    tensors = dict(content["state_dict"])

    def plain(part: Any, name: str) -> Any:
        if isinstance(part, torch.Tensor):
            tensors[name] = part
            return {TENSOR: name}
        if isinstance(part, Mapping):
            return {key: plain(value, f"{name}.{key}") for key, value in part.items()}
        return (
            [plain(value, f"{name}.{i}") for i, value in enumerate(part)] if isinstance(part, (list, tuple)) else part
        )

    entry = json.dumps(plain(content["metilr"], "metilr"), allow_nan=False)
    alone = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}  # none shares memory
    return safetensors.torch.save(alone, {"metilr": entry})


def from_safetensors(path: Path, tensors: StateDict) -> dict[str, Any]:
    """What ``as_safetensors`` was given, of a file's tensors; without ``metilr`` where the file says nothing of it.

    Raises:
        ValueError, LookupError, TypeError: If what it says is of another form.
    """
    with safetensors.safe_open(path, "pt") as file:
        written = (file.metadata() or {}).get("metilr")

    def whole(part: Any) -> Any:
        if isinstance(part, dict):
            return tensors.pop(part[TENSOR]) if TENSOR in part else {key: whole(value) for key, value in part.items()}
        return [whole(value) for value in part] if isinstance(part, list) else part

    entry = {} if written is None else {"metilr": whole(parse_json(written.encode()))}
    return {"state_dict": tensors, **entry}


def read_state_dict(path: Path) -> StateDict:
    """Read a state dict from a file, which may hold it under ``state_dict``; DataParallel's ``module.`` is dropped."""
    remedy = "get the file again, or save the state dict alone with torch.save(model.state_dict(), FILE)"
    content = read_file(path, remedy)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not (isinstance(content, Mapping) and content and is_state_dict(content)):
        raise UserError(f"{path}: holds no state dict, a mapping of names to tensors; get the file again")
    prefix = "module." if all(key.startswith("module.") for key in content) else ""
    return {key.removeprefix(prefix): value for key, value in content.items()}


def is_state_dict(content: Mapping[Any, Any]) -> bool:
    """Whether it maps names to tensors."""
    return all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in content.items())


def load_strictly(model: nn.Module, state_dict: StateDict, ignored: Iterable[str], source: str) -> None:
    """Load weights into a model, and refuse what ``refuse_unfit`` does."""
    wanted = model.state_dict()
    refuse_unfit({key: value.shape for key, value in wanted.items()}, state_dict, ignored, source)
    model.load_state_dict({key: state_dict.get(key, value) for key, value in wanted.items()})


def refuse_unfit(wanted: Mapping[str, torch.Size], state_dict: StateDict, ignored: Iterable[str], source: str) -> None:
    """Let no key or shape pass that does not fit the names and shapes of a model.

    ``ignored`` are prefixes of keys that the model lacks by design, each with its final dot; ``source`` is what the
    message calls the weights. BatchNorm's step counters may be missing.
    """
    given = {key: value.shape for key, value in state_dict.items() if not key.startswith(tuple(ignored))}
    shared = wanted.keys() & given.keys()
    problems = {
        "missing": [key for key in wanted.keys() - given.keys() if not key.endswith(COUNTER)],
        "unexpected": [*given.keys() - wanted.keys()],
        "of another shape": [
            f"{key} {tuple(given[key])} for {tuple(wanted[key])}" for key in shared if given[key] != wanted[key]
        ],
    }
    listed = []
    for problem, keys in problems.items():
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        listed += [f"{problem}: {', '.join(sorted(keys)[:3])}{more}"] if keys else []
    if listed:
        raise UserError(f"{source}: the weights do not fit ({'; '.join(listed)}); check backbone and weights")


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """Digest named tensors: names in order, dtypes, shapes and bytes, without BatchNorm's step counters.

    The same for the same values whatever the file, order or device they came from.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        if not name.endswith(COUNTER):
            tensor = tensors[name].detach().cpu().contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
