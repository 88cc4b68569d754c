"""Commands in forks of one process that has imported everything: a run, or a killed one, in a fraction of a second."""

import atexit
import contextlib
import faulthandler
import gc
import json
import multiprocessing.util
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
POPEN = subprocess.Popen
HANGS = 300  # seconds after which a run counts as hanging; it says where


class Outcome(NamedTuple):
    """How a run ended: exit status (negative: the signal), what it printed, what it did to files, how long it took.

    Attributes:
        seconds: Since there was the file that ``wait`` was given; while the forking process was running itself.
    """

    status: int
    printed: str
    operations: list[str]
    seconds: float

    @property
    def error(self) -> str:
        """The one line that a command's error must be."""
        assert self.status == 2, self
        lines = [line for line in self.printed.splitlines() if "error" in line.lower()]
        assert len(lines) == 1 and "Traceback" not in self.printed, self.printed
        return lines[0]


class Forks:
    """The process that forks. It computes nothing itself: threads that have been at work do not survive a fork."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "disabled"}
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.forks"], cwd=REPOSITORY, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
        )  # fmt: skip

    def errors(self) -> str:
        """What the forking process itself, which has imported everything, has printed."""
        self._errors.seek(0)
        return self._errors.read().decode()

    def run(self, folder: Path, command: Sequence[object], setup: str = "", **fault: Any) -> Outcome:
        """Run ``evaluate.py``, ``train.py``, another subcommand of ``metilr`` or a script with options in a folder.

        Args:
            folder: Where to.
            command: ``"evaluate"``, ``"train"`` or another subcommand, and options; or ``"python"``, a script, which
                imports metilr anew, and options.
            setup: Python to be executed before.
            fault: See ``tests.faults.Operations``; without any no fault, and operations are not counted.
        """
        return self.wait(self.start(folder, command, setup, **fault))

    def start(
        self, folder: Path, command: Sequence[object], setup: str = "", env: dict[str, str] | None = None, **fault: Any
    ) -> tuple[int, Path]:
        """As ``run``, without waiting."""
        folder.mkdir(parents=True, exist_ok=True)
        log = folder.with_name(f"{folder.name}.{time.monotonic_ns()}")
        job = {"cwd": str(folder), "command": [str(part) for part in command], "setup": setup, "log": str(log),
               "fault": fault, "env": env or {}}  # fmt: skip
        return self._ask(job), log

    def start_as_torchrun(
        self, folder: Path, command: Sequence[object], setups: Sequence[str] = ("", "")
    ) -> list[tuple[int, Path]]:
        """Start one process for each setup, which find what torchrun tells its own."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        n, started = len(setups), []
        for rank, setup in enumerate(setups):
            told = {
                "RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test",
            }  # fmt: skip
            env = {name: str(value) for name, value in told.items()}
            started.append(self.start(folder, command, setup, env=env))
        return started

    def wait(self, started: tuple[int, Path], since: Path | None = None) -> Outcome:
        """Wait for a run that was started; with ``since``, a file that it makes, it is told how long after that."""
        pid, log = started
        status, seconds = self._ask({"wait": pid, "since": str(since) if since else None})
        assert status is not None, f"hangs: {Path(f'{log}.out').read_text()}"
        counted = Path(f"{log}.operations")
        operations = counted.read_text().splitlines() if counted.exists() else []
        return Outcome(status, Path(f"{log}.out").read_text(), operations, seconds)

    def ended(self, pid: int) -> int | None:
        """Exit status of a run that was started, negative for a signal; None while it runs."""
        status: int | None = self._ask({"ended": pid})
        return status

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)

    def _ask(self, job: dict[str, Any]) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(job), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        assert answer, self.errors()
        return json.loads(answer)


class Popen:
    """Runs what ``subprocess.Popen`` would as Python's ``evaluate.py``, or ``-m metilr``: in a fork, here."""

    def __init__(self, forks: Forks, command: Sequence[str], **_: object) -> None:
        is_evaluation = command[:2] == [sys.executable, str(REPOSITORY / "evaluate.py")]
        assert is_evaluation or command[:3] == [sys.executable, "-m", "metilr"], command
        self._forks = forks
        self.returncode: int | None = None
        self.stderr = Path(os.devnull).open()  # noqa: SIM115
        asked, argv = (["evaluate", *command[2:]], command[1:]) if is_evaluation else (command[3:], command[2:])
        self.pid, self._log = forks.start(Path.cwd(), asked, f"import sys; sys.argv = {list(argv)!r}")

    def __enter__(self) -> "Popen":
        return self

    def __exit__(self, *error: object) -> None:
        self.stderr.close()
        if self.returncode is None:
            self.wait()

    def wait(self) -> None:
        self.returncode = self._forks.wait((self.pid, self._log)).status

    def poll(self) -> int | None:
        self.returncode = self._forks.ended(self.pid)
        return self.returncode

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


class Script:
    """Runs what ``subprocess.Popen`` would as Python's script, in a fork of this process; other programs it leaves."""

    def __new__(cls, command: Sequence[str], *args: Any, **options: Any) -> Any:
        is_script = command[0] == sys.executable and command[1].endswith(".py")
        return super().__new__(cls) if is_script else POPEN(command, *args, **options)

    def __init__(
        self, command: Sequence[str], cwd: Path | None = None, env: dict[str, str] | None = None, stdout: Any = None,
        stderr: Any = None, **_: object,
    ) -> None:  # fmt: skip
        def run() -> None:
            if stdout is not None:
                os.dup2(stdout.fileno(), 1)
            if stderr == subprocess.STDOUT:
                os.dup2(1, 2)
            os.chdir(cwd or Path.cwd())
            os.environ.update(env or {})
            _take_rank("LOCAL_RANK")
            _run_script(*command[1:])

        self.pid = _in_fork(run)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if found else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def spawn_by_forks() -> None:
    """Let this process fork itself where multiprocessing would spawn another, which would take seconds to import.

    What is handed over is the same, and the forks are named ``spawned``.
    """
    spawn = multiprocessing.util.spawnv_passfds

    def fork(path: bytes, arguments: list[str], kept: list[int]) -> int:
        program = arguments[arguments.index("-c") + 1]

        def run() -> None:
            Path("/proc/self/comm").write_text("spawned")
            for descriptor in {int(each.name) for each in Path("/proc/self/fd").iterdir()} - {0, 1, 2, *kept}:
                with contextlib.suppress(OSError):
                    os.close(descriptor)
            sys.argv = ["-c", "--multiprocessing-fork"]
            exec(program, {})

        # The other is a helper of multiprocessing itself.
        return _in_fork(run) if "spawn_main" in program else spawn(path, arguments, kept)

    multiprocessing.util.spawnv_passfds = fork


def _serve() -> None:
    import torch

    torch.set_num_threads(1)
    # All that a run imports, so that no fork does: seconds each.
    import metilr.commands.evaluate
    import metilr.evaluation.runs
    import metilr.report.page
    import metilr.training.cli
    import metilr.training.run  # noqa: F401
    from tests import faults  # noqa: F401

    sys.dont_write_bytecode = True  # what else is compiled is no file of a run's
    # A fork that ends as a process of its own does would remove the libraries' folders, which all share.
    folders = [each for each in gc.get_objects() if type(each) is tempfile.TemporaryDirectory]
    for folder in folders:
        atexit.unregister(folder.cleanup)
        folder._finalizer.detach()
    groups: set[Any] = set()
    gc.collect()
    gc.freeze()  # or each fork's collector would copy all of it
    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            answer: Any = _wait(job["wait"], job["since"])
        elif "ended" in job:
            found, status = os.waitpid(job["ended"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if found else None
        else:
            answer = _fork(job)
            groups.add(answer)
        print(json.dumps(answer), flush=True)
    for group in groups:  # whatever a failed test has left at work
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    for folder in folders:
        folder.cleanup()


def _in_fork(run: Callable[[], object]) -> int:
    """Let a fork of this process run a function, or until that raises SystemExit, and end; its number."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            try:
                run()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
            code = 0
        except SystemExit as stop:
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr, flush=True)
            code = 1 if isinstance(stop.code, str) else int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def _fork(job: dict[str, Any]) -> int:
    def run() -> None:
        os.setsid()
        printed = os.open(f"{job['log']}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        faulthandler.dump_traceback_later(HANGS - 30)
        _run(job)

    return _in_fork(run)


def _wait(pid: int, since: str | None) -> tuple[int | None, float]:
    """Exit status, None if it hangs, and the seconds that this process has counted since there was a file."""
    now, seconds = time.monotonic(), 0.0
    end = now + HANGS
    while now < end:
        time.sleep(0.005)
        before, now = now, time.monotonic()
        found, status = os.waitpid(pid, os.WNOHANG)
        if since is not None and Path(since).exists():
            seconds += min(now - before, 1.0)  # else the whole machine was stopped
        if found:
            return os.waitstatus_to_exitcode(status), seconds
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None, seconds


def _run(job: dict[str, Any]) -> None:
    from metilr.cli import main, run_command, run_main
    from tests.faults import Operations

    os.chdir(job["cwd"])
    os.environ.update(job["env"])
    _take_rank("RANK")
    if job["fault"]:
        log = Path(f"{job['log']}.operations")
        Operations(Path(job["cwd"]).parent, log, **job["fault"]).install()
    exec(job["setup"], {})
    name, *options = job["command"]
    if name == "python":
        _run_script(*options)
    elif name == "train":
        run_main("metilr.training.cli:train", options, prog="train.py")
    elif name == "evaluate":
        run_command("metilr.commands.evaluate:evaluate", options, prog="evaluate.py")
    else:
        main([name, *options])


def _run_script(file: str, *options: str) -> None:
    for module in [each for each in sys.modules if each.partition(".")[0] == "metilr"]:
        del sys.modules[module]
    sys.argv = [file, *options]
    runpy.run_path(file, run_name="__main__")


def _take_rank(variable: str) -> None:
    """Lightning has read it before the fork."""
    from lightning_utilities.core import rank_zero

    rank_zero.rank_zero_only.rank = int(os.environ.get(variable, 0))


if __name__ == "__main__":
    _serve()
