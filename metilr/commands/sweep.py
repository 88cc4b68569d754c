"""``metilr sweep CONFIG...``: many evaluations one after another, and their comparison."""

import contextlib
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Column, Table

from metilr.cli import parse_options
from metilr.commands.compare import compare
from metilr.commands.evaluate import evaluate, options_of_run
from metilr.data.ground_truth import DatabaseName
from metilr.distributed import PARENT_VARIABLE
from metilr.errors import UserError
from metilr.evaluation.runs import RUNS, make_output, plain_options, refuse_other_options
from metilr.files import write_atomically
from metilr.progress import make_console

# Options of metilr evaluate that say how and where, but change no figure beyond rounding: another run of the sweep may
# have other ones, say a smaller batch after a row that ran out of memory.
CHANGE_NO_FIGURE = frozenset({
    "output", "store", "accelerator", "devices", "num_nodes", "batch_size", "num_workers", "search_device",
    "report", "report_pictures", "wandb", "wandb_project", "quiet",
})  # fmt: skip
SECONDS_TO_STOP = 60  # for a row after Ctrl-C, before it is killed
KEPT_OF_ERRORS = 1 << 16  # bytes at the end of a failed row's stderr


@dataclass(frozen=True)
class Row:
    """One evaluation of a sweep, by the arguments of ``metilr evaluate`` but its output, and by what these set."""

    name: str
    folder: Path
    arguments: tuple[str, ...]
    options: Mapping[str, Any]  # as config.yaml keeps them

    @property
    def is_finished(self) -> bool:
        """Whether its results are there."""
        return (self.folder / "results.json").exists()


def sweep(
    configs: Sequence[Path],
    root: Path | None = None,
    database: DatabaseName | None = None,
    vary: str | None = None,
    values: Sequence[str] = (),
    options: Sequence[str] = (),
    output: Path = RUNS / "sweep",
) -> dict[str, str | None]:
    """Evaluate many configurations, or one option over several values.

    Every evaluation is a row of its own process and folder. A row that fails is shown with its reason and does not stop
    the others. The same command continues an interrupted sweep and tries failed rows again; finished ones are kept.

    Args:
        configs: YAML files of metilr evaluate's options, as in configs/eval.
        root: Data root for all rows; without it each file's own.
        database: Match against full or mini in all rows; without it each file's own.
        vary: Option of metilr evaluate to give several values, such as p, stage or whitening_dim.
        values: Values of that option, a row each; a list as [1,0.5].
        options: Further options of metilr evaluate for all rows, each as NAME=VALUE, such as accelerator=cpu.
        output: Folder for a folder a row, and for the comparison.

    Returns:
        By row, the reason why it failed; None if it did not.
    """
    started = time.monotonic()
    console = make_console()
    rows = plan_rows(configs, root, database, vary, values, options, output)
    finished: set[str] = set()
    for row in filter(lambda row: row.is_finished, rows):
        _refuse_other_options(row)
    make_output(output, "sweep")

    reasons: dict[str, str | None] = {row.name: None for row in rows}
    for i, row in enumerate(rows):
        if row.is_finished:  # perhaps by now, by what an earlier sweep has left running
            finished.add(row.name)
            _refuse_other_options(row)
            continue
        elapsed = timedelta(seconds=round(time.monotonic() - started))
        console.rule(f"[bold]{escape(row.name)}[/], row {i + 1} of {len(rows)}, {elapsed} elapsed", align="left")
        reasons[row.name] = _run(row)
        if reason := reasons[row.name]:
            console.print(f"[bold red]failed:[/] {escape(reason)}")

    console.rule("sweep", align="left")
    if folders := [row.folder for row in rows if row.is_finished]:
        compare(folders, output)
    table = Table("row", "outcome", Column("reason", overflow="fold"), title="rows of the sweep", title_justify="left")
    for name, reason in reasons.items():
        outcome = "[bold red]failed[/]" if reason else f"[green]{'finished already' if name in finished else 'done'}[/]"
        table.add_row(escape(name), outcome, escape(reason or ""))
    console.print(table, soft_wrap=False)
    if failed := [name for name, reason in reasons.items() if reason]:
        where = f"their errors are in {output}/NAME.failed.txt; the same command tries them again"
        raise UserError(f"{len(failed)} of {len(rows)} rows failed ({', '.join(failed)}); {where}")
    return reasons


def plan_rows(
    configs: Sequence[Path],
    root: Path | None,
    database: str | None,
    vary: str | None,
    values: Sequence[str],
    options: Sequence[str],
    output: Path,
) -> list[Row]:
    """Plan the rows: every configuration with every value, in that order."""
    if (vary is None) != (not values):
        raise UserError("and values belong together; give both or neither", "vary")
    pairs = [(name, str(value)) for name, value in (("root", root), ("database", database)) if value is not None]
    for option in options:
        if "=" not in option:
            raise UserError(f"{option}: write it as NAME=VALUE, such as accelerator=cpu", "options")
        name, _, value = option.partition("=")
        pairs.append((name, value))
    named = [name for name, _ in pairs] + ([] if vary is None else [vary])
    if twice := [name for name in named if named.count(name) > 1]:
        raise UserError(f"{twice[0]}: is set twice for all rows; leave one of the two out")
    if "output" in named:
        raise UserError("output: every row has a folder of its own; leave it out")
    varied = [{}] if vary is None else [{vary: value} for value in values]
    rows: dict[str, Row] = {}
    for config, changes in itertools.product(configs, varied):
        name = "-".join([Path(config).stem, *(f"{option}={value}" for option, value in changes.items())])
        name = re.sub(r"[^\w.,=+-]+", "_", name)  # a value may be a path
        if name in rows:
            raise UserError(f"two rows would be called {name}; name every configuration and value once")
        given = [part for option in (*pairs, *changes.items()) for part in _written(*option)]
        arguments = ("--config", str(config), *given)
        resolved = parse_options(evaluate, arguments)
        resolved["precision"] = str(resolved["precision"])  # as evaluate records it
        rows[name] = Row(name, output / name, arguments, plain_options(resolved))
    return list(rows.values())


def _written(option: str, value: str) -> list[str]:
    """An option on a command line; a list is written [A, B] here, and A B there."""
    is_list = value[:1] + value[-1:] == "[]"
    return [f"--{option}", *value[1:-1].replace(",", " ").split()] if is_list else [f"--{option}={value}"]


def _refuse_other_options(row: Row) -> None:
    """Refuse a finished row that stands for something else than what is asked for now."""
    names, before = row.options.keys() - CHANGE_NO_FIGURE, options_of_run(row.folder)
    refuse_other_options(row.folder, *({name: of[name] for name in names} for of in (before, row.options)))


def _run(row: Row) -> str | None:
    """Evaluate in a process of its own, so that nothing that ends it ends the sweep; return why it failed."""
    errors = b""
    environment = {**os.environ, PARENT_VARIABLE: str(os.getpid())}
    with subprocess.Popen(_command(row), stderr=subprocess.PIPE, env=environment) as process:
        assert process.stderr is not None
        try:
            while chunk := os.read(process.stderr.fileno(), 4096):  # shown as it comes, and kept
                errors = (errors + chunk)[-KEPT_OF_ERRORS:]
                sys.stderr.write(chunk.decode(errors="replace"))
                sys.stderr.flush()
            process.wait()
        except BaseException:
            _stop(process)
            raise
    record = row.folder.parent / f"{row.name}.failed.txt"
    if row.is_finished:  # whatever ended it after that
        _refuse_other_options(row)
        record.unlink(missing_ok=True)
        return None
    printed = errors.decode(errors="replace")
    reason = _reason(process.returncode, printed)
    write_atomically(record, f"{reason}\n\n{shlex.join(['metilr', *_evaluate(row)])}\n\n{printed}")
    return reason


def _command(row: Row) -> list[str]:
    return [sys.executable, "-m", "metilr", *_evaluate(row)]


def _evaluate(row: Row) -> list[str]:
    return ["evaluate", *row.arguments, "--output", str(row.folder)]


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Let a process end by itself, as Ctrl-C in a terminal reaches it too, else ask it to, else kill it."""
    for ask, seconds in ((lambda: None, 3), (process.terminate, SECONDS_TO_STOP), (process.kill, None)):
        ask()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
            return


def _reason(code: int, printed: str) -> str:
    if code < 0:
        hint = ", most often for want of memory" if -code == signal.SIGKILL else ""
        return f"ended by {signal.Signals(-code).name}{hint}"
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    return lines[-1] if lines else f"ended with status {code} and said nothing"
