"""The folder that a command writes into, held against others, with the options that repeat it."""

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from metilr.errors import UserError
from metilr.files import alone_in, remove_leftovers, write_atomically

RUNS = Path("runs")
LEFT_BEHIND = ("predictions/val.csv", "predictions/test.csv", "whitening.npz", "report/index.html")
FILES_OR_WORDS = ("weights", "whitening")  # options that are a file's path, or a word such as "random" or "pca"


def make_output(output: Path | None, name: str) -> Path:
    """Make the folder that a command writes into.

    Args:
        output: The folder, which may be there; None: a new, dated one under ``runs/``.
        name: Ends the dated folder's name.

    Raises:
        UserError: If it cannot be made.
    """
    try:
        folder = output or make_new_folder(RUNS, f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{name}")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(output, error) from None
    return folder


def _unwritable(output: Path | None, error: OSError) -> UserError:
    return UserError(f"--output {output or RUNS}: cannot be written ({error.strerror}); name another folder")


@contextlib.contextmanager
def output_folder(output: Path | None, name: str, options: Mapping[str, Any]) -> Iterator[Path]:
    """Open the output folder of a run, held against others, and write the resolved configuration before any work.

    A dated folder goes again if the run fails. What a run left that did not get to its ``results.json`` goes first.

    Args:
        output: The folder; None: a dated one under ``runs/``.
        name: Ends the dated folder's name.
        options: All options as resolved; ``config.yaml`` repeats the run.

    Raises:
        UserError: If the folder cannot be written, holds results already, or another run is at work there.
    """
    _refuse_results(output)  # before the lock's file is made there
    folder = make_output(output, name)
    try:
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(alone_in(folder, "another run", "name another --output"))
                _refuse_results(output)
                remove_leftovers(folder)
                if (folder / "config.yaml").exists():  # of a run that was killed: its options may have been others
                    for name in LEFT_BEHIND:
                        (folder / name).unlink(missing_ok=True)
                write_atomically(folder / "config.yaml", yaml.safe_dump(plain_options(options), sort_keys=False))
            except OSError as error:
                raise _unwritable(output, error) from None
            yield folder
    except BaseException:
        if output is None:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _refuse_results(output: Path | None) -> None:
    try:
        if output is not None and (output / "results.json").exists():
            raise UserError(f"--output {output}: holds results already; name another folder, or delete it")
    except OSError as error:
        raise _unwritable(output, error) from None


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """All options but the output folder, as what YAML and JSON can say."""
    plain = {key: _plain(value) for key, value in options.items() if key != "output"}
    files = {key for key in FILES_OR_WORDS if isinstance(plain.get(key), str) and Path(plain[key]).is_file()}
    return {key: str(Path(value).absolute()) if key in files else value for key, value in plain.items()}


def make_new_folder(parent: Path, name: str) -> Path:
    """Make a folder that was not there; two runs that start in one second get two."""
    for suffix in ("", *(f"_{i}" for i in range(2, 100))):
        with contextlib.suppress(FileExistsError):
            (parent / f"{name}{suffix}").mkdir(parents=True)
            return parent / f"{name}{suffix}"
    raise UserError(f"--output: {parent / name} and 98 like it exist; name a folder")


def _plain(value: Any) -> Any:
    """What YAML can say without tags."""
    if isinstance(value, Path):
        return str(value.absolute())  # so that the file repeats the run from any folder
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
