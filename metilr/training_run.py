"""The folder of a training run: made, or found unfinished and continued; one run at a time works in it."""

import contextlib
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from metilr.checkpoints import read_checkpoint
from metilr.errors import UserError
from metilr.files import remove_leftovers, write_atomically
from metilr.launch import has_launcher, is_first_process
from metilr.locks import LOCK, alone_in
from metilr.run_folder import RUNS, make_new_folder
from metilr.yaml_files import read_yaml

OUTPUT_VARIABLE = "METILR_TRAINING_OUTPUT"  # tells the processes that Lightning starts which folder the first chose
BEST, LAST = "best", "last"


def open_run(output: Path | None, options: Mapping[str, Any], held: contextlib.ExitStack) -> tuple[Path, Path | None]:
    """Make the run's folder, or find the unfinished run in it; the first process holds it against other runs.

    Returns:
        The folder, and the checkpoint to continue from, if any.

    Raises:
        UserError: If the folder cannot be written, or holds a finished run, one of other options, or other files, or
            another run is at work there.
    """
    if not has_launcher() and not is_first_process():  # started by Lightning in the first one's environment
        output = Path(os.environ[OUTPUT_VARIABLE])
    elif output is None:
        if has_launcher():
            raise UserError("--output: name a folder; processes that a launcher starts cannot agree on a dated one")
        output = make_new_folder(RUNS, f"{datetime.now():%Y-%m-%d_%H-%M-%S}_train")
    os.environ[OUTPUT_VARIABLE] = str(output)
    config = output / "config.yaml"
    last = output / f"{LAST}.ckpt"
    if is_first_process():
        _claim(output, config, options, held)
    if not last.exists():
        return output, None
    try:
        read_checkpoint(last)
    except UserError as error:
        reason = str(error).removeprefix("--ckpt ").partition(";")[0]
        raise UserError(f"{reason}; this run cannot be continued: delete {output}, or name another --output") from None
    return output, last


def _claim(output: Path, config: Path, options: Mapping[str, Any], held: contextlib.ExitStack) -> None:
    text = yaml.safe_dump(dict(options), sort_keys=False)
    try:
        output.mkdir(parents=True, exist_ok=True)
        ours = (LOCK, f".{config.name}.")  # where a killed process got no further
        if not config.exists() and any(not file.name.startswith(ours) for file in output.iterdir()):
            raise UserError(f"--output {output}: holds other files; name an empty or new folder")
        held.enter_context(alone_in(output, "another run", "name another --output"))
        if (output / "finished").exists():
            raise UserError(f"--output {output}: holds a finished run; name another folder")
        remove_leftovers(output)
        if config.exists() and (output / f"{LAST}.ckpt").exists():
            _refuse_other_options(output, config, yaml.safe_load(text))
        else:  # what failed before its first epoch is tried anew
            write_atomically(config, text)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror}); name another folder") from None


def _refuse_other_options(output: Path, config: Path, options: Mapping[str, Any]) -> None:
    try:
        before = read_yaml(config)
    except (OSError, ValueError) as error:
        raise UserError(f"{config}: cannot be read ({type(error).__name__}); name another --output") from None
    other = _differing(before, options)
    if other:
        raise UserError(
            f"--output {output}: holds a run with other options ({', '.join(other[:4])}); name another folder, or "
            f"continue that run with --config {config} --output {output}"
        )


def _differing(before: Any, now: Any, name: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        return [d for key in keys for d in _differing(before.get(key), now.get(key), f"{name}.{key}".lstrip("."))]
    return [] if before == now else [name]
