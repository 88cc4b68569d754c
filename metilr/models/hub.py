"""Files of the Hugging Face Hub: fetched and kept by huggingface_hub, checked, and recorded by the commit they are of.

An address is ``hf://OWNER/NAME[@REVISION][/FILE]``. Whatever stands there is a stranger's file: it is read like any
other, without running code. Offline (``HF_HUB_OFFLINE=1``), or without a network, what the cache holds is taken.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from metilr.errors import UserError, one_line
from metilr.files import file_sha256
from metilr.models import is_on_hub

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in the order in which timm looks for them
CHECKPOINTS = ("model.safetensors", "model.ckpt", "best.ckpt")  # what metilr push, pack and train write
LOOKED_FOR = {"ckpt": CHECKPOINTS, "weights": WEIGHTS, "whitening": CHECKPOINTS}  # by option, where no file is named
KINDS = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")
TOKEN = "hf auth login, or set HF_TOKEN"
_ADDRESS = re.compile(r"hf://(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[^/@]+))?(/(?P<file>[^@]+))?")

Options = TypeVar("Options")


def pin(options: Options) -> Options:
    """A dataclass of options with each address on the Hub made complete: with its commit and its file.

    So options that are recorded name the very file, which is in the cache from now on.
    """
    given = {name: value for name, value in vars(options).items() if name in LOOKED_FOR and is_on_hub(value)}
    found: dict[str, Any] = {name: locate(value, LOOKED_FOR[name], name)[1] for name, value in given.items()}
    return replace(options, **found) if found else options  # type: ignore[type-var]


def locate(place: str | Path, names: Sequence[str], parameter: str | None = None) -> tuple[Path, str]:
    """Find a file on this disk or, given an address, on the Hub: the first of ``names`` where the address has no file.

    Returns:
        The file on this disk, and what results call it: its name, or its address with the commit.

    Raises:
        UserError: If there is no such repository, revision or file, if it is of no kind that is read here, or if it
            cannot be had; names the address and ``parameter``.
    """
    if not is_on_hub(place):
        return Path(place), Path(place).name
    parts = _ADDRESS.fullmatch(str(place))
    if parts is None:
        raise UserError(f"{place}: is no address; write hf://OWNER/NAME[@REVISION][/FILE]", parameter)
    repository, names = parts["repository"], names if parts["file"] is None else (parts["file"],)
    if not names[0].endswith(KINDS):
        raise UserError(f"{place}: is not read here; name a file that ends in {', '.join(KINDS)}", parameter)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of each try; the last one's reason is told
    try:
        path = _first_of(repository, names, unquote(parts["revision"] or "main"))
    except Exception as error:  # each of its HTTP libraries has errors of its own
        raise UserError(f"{place}: {_reason(error, repository, names)}", parameter) from error
    file = next(name for name in names if path.as_posix().endswith(f"/{name}"))
    commit = path.parts[-1 - len(Path(file).parts)]  # in the cache: snapshots/COMMIT/FILE
    verify_hub_file(f"{repository}@{commit}", file)
    return path, f"hf://{repository}@{commit}/{file}"


def _first_of(repository: str, names: Sequence[str], revision: str) -> Path:
    failure, only_cached = Exception(), False
    for name in names:
        try:
            found = huggingface_hub.hf_hub_download(
                repository, name, revision=revision, local_files_only=only_cached, library_name="metilr"
            )
            return Path(found)
        except LocalEntryNotFoundError as error:  # asked for in vain once, the network is not asked again
            failure, only_cached = error, True
        except EntryNotFoundError as error:
            failure = error
    raise failure


def _reason(error: Exception, repository: str, names: Sequence[str]) -> str:
    """What keeps a file from being had, and the remedy."""
    if isinstance(error, GatedRepoError):
        return f"asks to accept its terms; do so at https://huggingface.co/{repository}, then {TOKEN}"
    if isinstance(error, RepositoryNotFoundError):
        return f"no such repository, or a private one; check the name, or {TOKEN}"
    if isinstance(error, RevisionNotFoundError):
        return "no such revision; name a branch, a tag or a commit"
    if isinstance(error, LocalEntryNotFoundError):
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
        return f"is not in the cache, and {offline}; fetch it once with a network, or name a file on this disk"
    if isinstance(error, EntryNotFoundError):
        return f"holds no {' or '.join(names)}; name its file, as hf://{repository}/FILE"
    return f"cannot be had ({one_line(error)}); try again, or name a file on this disk"


def verify_hub_file(hub_id: str, filename: str | None = None) -> str | None:
    """Check a weights file in Hugging Face's cache against the sha256 that the hub names it by, and return that.

    The hub's own client compares sizes only. The id is timm's, ``owner/name`` or ``owner/name@revision``. Returns None
    if the file, by default one of the names that timm looks for, is not in that cache.
    """
    repository, _, revision = hub_id.partition("@")
    for name in WEIGHTS if filename is None else (filename,):
        cached = huggingface_hub.try_to_load_from_cache(repository, name, revision=revision or None)
        if isinstance(cached, str):
            stored = Path(cached).resolve()  # large files lie under their sha256, small ones under another digest
            digest = file_sha256(stored)
            if re.fullmatch("[0-9a-f]{64}", stored.name) and stored.name != digest:
                raise UserError(f"{stored}: is damaged (its sha256 is {digest}); delete it to have it downloaded again")
            return digest
    return None
