"""Weights & Biases for both commands: never a prompt, never a crash for want of a network or a key."""

import contextlib
import netrc
import os
import sys
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from metilr.errors import UserError
from metilr.files import write_atomically

WandbMode = Literal["auto", "online", "offline", "off"]
PROJECT = "metilr"
TIMEOUT = 30  # seconds for the first contact; then the run goes on offline


def open_wandb(mode: WandbMode, project: str, folder: Path, options: Mapping[str, Any]) -> Any | None:
    """Start a run whose files lie beside the folder's own.

    Args:
        mode: auto is online if there is a key, else offline; off, or the variable WANDB_MODE=disabled: no run.
        project: Its name in W&B.
        folder: Of the run here; ``wandb_id`` in it lets a continued run go on under the same name.
        options: Shown as the run's configuration.

    Returns:
        The wandb run; None without one. Where W&B cannot start, a line on stderr says so.

    Raises:
        UserError: If ``mode`` is online and there is no key.
    """
    if mode == "off" or os.environ.get("WANDB_MODE") == "disabled":
        return None
    check_key(mode)
    import wandb

    id_file = folder / "wandb_id"
    if not id_file.exists():
        write_atomically(id_file, uuid.uuid4().hex[:8])
    arguments: dict[str, Any] = {
        "project": project, "name": folder.name, "id": id_file.read_text(), "dir": str(folder), "config": dict(options),
    }  # fmt: skip
    online = mode == "online" or (mode == "auto" and _has_key() and os.environ.get("WANDB_MODE") != "offline")
    if online:
        try:
            settings = wandb.Settings(silent=True, init_timeout=TIMEOUT)
            return wandb.init(mode="online", resume="allow", settings=settings, **arguments)
        except Exception as error:  # whatever keeps W&B from being reached must not stop the work
            print(f"W&B cannot be reached ({short(error)}); logging offline", file=sys.stderr)
    try:
        return wandb.init(mode="offline", settings=wandb.Settings(silent=True), **arguments)
    except Exception as error:  # its service cannot start here
        print(f"W&B cannot start ({short(error)}); going on without it", file=sys.stderr)
        return None


def check_key(mode: WandbMode) -> None:
    """Refuse to log online without a key, before hours of work.

    Raises:
        UserError: If ``mode`` is online and there is none.
    """
    if mode == "online" and not _has_key():
        raise UserError("--wandb online: no key; run wandb login, set WANDB_API_KEY, or use --wandb offline")


@contextlib.contextmanager
def staged_in(folder: Path) -> Iterator[None]:
    """Let pictures of an offline run wait for ``wandb sync`` beside the run, and not in the user's home."""
    before = os.environ.get("WANDB_DATA_DIR")
    if before is None:
        os.environ["WANDB_DATA_DIR"] = str((folder / "wandb").absolute())
    try:
        yield
    finally:
        if before is None:
            del os.environ["WANDB_DATA_DIR"]


@contextlib.contextmanager
def unharmed(run: Any) -> Iterator[None]:
    """Log to a run and end it: the work is done, whatever W&B's service or network does now."""
    try:
        yield
        run.finish()
    except Exception as error:
        print(f"W&B could not be finished ({short(error)}); see wandb sync", file=sys.stderr)


def where_logged(run: Any, folder: Path) -> str:
    """Say where the run can be looked at."""
    if run.offline:
        return f"W&B: offline; wandb sync {folder}/wandb/offline-run-* sends it"
    return f"W&B: {run.url}"


def short(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc().authenticators(host) is not None
    return False
