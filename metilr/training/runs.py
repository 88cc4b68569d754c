"""The folder of a training: who may work there, what is continued, and checkpoints that appear whole."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO
from typing_extensions import override

from metilr.distributed import has_launcher, is_first_process
from metilr.errors import UserError, one_line
from metilr.evaluation.runs import make_output
from metilr.extraction.store import differing_settings
from metilr.files import LOCK, alone_in, read_yaml, remove_leftovers, write_atomically
from metilr.models.checkpoints import read_checkpoint, write_checkpoint

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
            raise UserError("name a folder: processes that a launcher starts cannot agree on a dated one", "output")
        output = make_output(None, "train")
    os.environ[OUTPUT_VARIABLE] = str(output)
    last = output / f"{LAST}.ckpt"
    if is_first_process():
        try:
            _claim(output, options, last, held)
        except OSError as error:
            raise UserError(f"{output}: cannot be written ({error.strerror}); name another folder", "output") from None
    if not last.exists():
        return output, None
    try:
        read_checkpoint(last)
    except UserError as error:
        raise UserError(f"{error}; or delete {output}, or name another output, to start anew") from None
    return output, last


def _claim(output: Path, options: Mapping[str, Any], last: Path, held: contextlib.ExitStack) -> None:
    config = output / "config.yaml"
    output.mkdir(parents=True, exist_ok=True)
    ours = (LOCK, f".{config.name}.")  # where a killed process got no further
    if not config.exists() and any(not file.name.startswith(ours) for file in output.iterdir()):
        raise UserError(f"{output}: holds other files; name an empty or new folder", "output")
    held.enter_context(alone_in(output, "another run", "name another output"))
    if (output / "finished").exists():
        raise UserError(f"{output}: holds a finished run; name another folder", "output")
    remove_leftovers(output)
    if not config.exists() or not last.exists():  # what failed before its first epoch is tried anew
        write_atomically(config, yaml.safe_dump(dict(options), sort_keys=False))
        return
    try:
        before = read_yaml(config)
    except ValueError as error:
        raise UserError(f"{config}: cannot be read ({one_line(error)}); name another output") from None
    if other := differing_settings(before, options):
        raise UserError(
            f"{output}: holds a run with other options ({'; '.join(other[:4])}); name another folder, or continue that "
            f"run with --config {config} --output {output}",
            "output",
        )


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's reading and writing of checkpoints, except that a file appears whole and runs no code."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write as ``write_checkpoint`` does."""
        write_checkpoint(Path(path), checkpoint)

    @override
    def load_checkpoint(self, path: Any, map_location: Any = None, *_: Any, **__: Any) -> dict[str, Any]:
        """Read to the CPU, as ``read_checkpoint`` does."""
        return dict(read_checkpoint(Path(path)))


class MovableModelCheckpoint(ModelCheckpoint):
    """Lightning's, except that it remembers the best score of a run whose folder was moved or renamed."""

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the best score and the files that go with it, where they lie now."""

        def moved(path: str) -> str:
            return str(Path(str(self.dirpath)) / Path(path).name) if path else path

        paths = {
            name: moved(state_dict[name]) for name in ("best_model_path", "kth_best_model_path", "last_model_path")
        }
        best = {moved(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **paths, "best_k_models": best, "dirpath": self.dirpath})
