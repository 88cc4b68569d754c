"""``metilr sweep``: planning without running anything, and small sweeps as a user runs them."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from metilr.cli import flat_defaults, main
from metilr.commands import sweep as sweep_module
from metilr.commands.evaluate import evaluate
from metilr.commands.sweep import CHANGE_NO_FIGURE, plan_rows, sweep
from metilr.errors import UserError
from metilr.report.published import PUBLISHED
from tests.commands.test_compare import write_museum_files, write_run
from tests.commands.test_evaluate import REPOSITORY
from tests.forks import Popen

CONFIGS = REPOSITORY / "configs" / "eval"
FAILS = [sys.executable, "-c", "raise SystemExit('p -1 is wrong')"]
CHEAP = ["weights=random", "accelerator=cpu", "num_workers=0", "report=false", "wandb=off"]


def plan(configs=("r18_in",), vary=None, values=(), options=(), root=None, database=None):
    files = [CONFIGS / f"{name}.yaml" for name in configs]
    return plan_rows(files, root, database, vary, values, options, Path("out"))


def test_the_report_s_ten_backbones_are_one_glob_away():
    rows = plan([file.stem for file in sorted(CONFIGS.glob("r*.yaml"))], root="DIR", database="mini")
    assert sorted(row.options["backbone"] for row in rows) == sorted(
        {row.backbone for row in PUBLISHED if "/" not in row.backbone}
    )
    assert [row.name for row in rows] == [row.options["backbone"] for row in rows]
    for row in rows:
        assert row.folder == Path("out") / row.name
        assert row.options["database"] == "mini" and row.options["root"] == str(Path("DIR").absolute())


def test_a_relative_checkpoint_is_the_one_that_its_row_records(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "best.ckpt").touch()
    [row] = plan(options=["ckpt=best.ckpt"])
    assert row.options["ckpt"] == str(tmp_path / "best.ckpt")


@pytest.mark.parametrize(
    ("vary", "values", "expected"),
    [
        ("p", ["1", "3", "4.5"], [1.0, 3.0, 4.5]),
        ("stage", ["null", "3"], [None, 3]),
        ("scales", ["[1]", "[1,0.5]"], [[1.0], [1.0, 0.5]]),
        ("precision", ["32", "bf16-mixed"], ["32", "bf16-mixed"]),
    ],
)
def test_one_option_over_several_values(vary, values, expected):
    rows = plan(["r18_in", "r50_in"], vary, values, options=["accelerator=cpu"])
    assert [row.options[vary] for row in rows] == expected * 2
    assert [row.options["backbone"] for row in rows] == ["r18_in"] * len(values) + ["r50_in"] * len(values)
    assert {row.options["accelerator"] for row in rows} == {"cpu"}
    assert len({row.name for row in rows}) == len(rows)


def test_names_of_rows_are_folders_below_the_sweep():
    [row] = plan(vary="ckpt", values=["../a b/best.ckpt"])
    assert row.name == "r18_in-ckpt=.._a_b_best.ckpt" and row.folder.parent == Path("out")
    assert plan(vary="p", values=["4"])[0].name == "r18_in-p=4"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vary": "whitening_dm", "values": ["1"]}, "unknown option --whitening_dm (did you mean --whitening_dim"),
        ({"vary": "output", "values": ["1"]}, "every row has a folder of its own"),
        ({"vary": "p"}, "vary and values belong together"),
        ({"vary": "p", "values": ["1", "one"]}, "p one: expected float"),
        ({"vary": "p", "values": ["3", "3"]}, "two rows would be called r18_in-p=3"),
        ({"vary": "p", "values": ["3"], "options": ["p=4"]}, "p: is set twice"),
        ({"options": ["accelerator"]}, "options accelerator: write it as NAME=VALUE"),
        ({"options": ["acelerator=cpu"]}, "did you mean --accelerator"),
        ({"configs": ["nothing"]}, "nothing.yaml: no such file"),
    ],
)
def test_a_wrong_option_is_refused_before_any_work(arguments, message):
    with pytest.raises(UserError) as caught:
        plan(**arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_options_that_change_no_figure_exist():
    assert set(flat_defaults(evaluate)) >= CHANGE_NO_FIGURE
    assert not {"root", "p", "precision", "bad_images", "seed", "descriptors"} & CHANGE_NO_FIGURE


def test_a_failing_row_does_not_stop_the_others_and_finished_rows_are_kept(
    tiny_museum, tmp_path, monkeypatch, capfd, forks
):
    """One row fails, one is finished; the second time only the failed one is tried again."""
    monkeypatch.chdir(tmp_path)

    def popen(command, **options):
        return subprocess.Popen(command, **options) if command == FAILS else Popen(forks, command)

    monkeypatch.setattr(sweep_module, "subprocess", SimpleNamespace(Popen=popen, PIPE=subprocess.PIPE))
    real = sweep_module._command
    monkeypatch.setattr(sweep_module, "_command", lambda row: FAILS if "p=-1" in row.name else real(row))
    command = ["sweep", str(CONFIGS / "r18_in.yaml"), "--root", str(tiny_museum), "--vary", "p", "--values"]
    failure = run_sweep([*command, "-1", "3", "--options", *CHEAP], capfd)
    assert "1 of 2 rows failed (r18_in-p=-1)" in failure.err.splitlines()[-1]
    assert "p -1 is wrong" in failure.out and "row 2 of 2" in failure.out
    folder = Path("runs/sweep")
    assert "metilr evaluate --config" in (folder / "r18_in-p=-1.failed.txt").read_text()
    results = json.loads((folder / "r18_in-p=3/results.json").read_text())
    assert results["model"]["pooling"]["p"] == 3
    assert results["command"].split()[:3] == ["metilr", "evaluate", "--config"]
    comparison = json.loads((folder / "comparison.json").read_text())
    assert [run["name"] for run in comparison["runs"]] == ["r18_in-p=3"]

    before = (folder / "r18_in-p=3/results.json").stat().st_mtime_ns
    monkeypatch.setattr(sweep_module, "_command", lambda row: FAILS)
    again = run_sweep([*command, "-1", "3", "--options", *CHEAP, "batch_size=4"], capfd)
    assert "finished already" in again.out and "row 1 of 2" in again.out and "row 2 of 2" not in again.out
    assert (folder / "r18_in-p=3/results.json").stat().st_mtime_ns == before

    refused = run_sweep([*command, "3", "--options", *CHEAP, "whitening_dim=4"], capfd)
    assert "runs/sweep/r18_in-p=3: is finished, with other options (whitening_dim: null there, 4 now)" in refused.err


def run_sweep(command, capfd):
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2
    return capfd.readouterr()


# What a finished row leaves; YAML reads JSON.
FINISH = (
    "import json, os, pathlib, shutil, sys, time; folder = pathlib.Path(sys.argv[1])\n"
    "def finish(folder=folder, options=sys.argv[2]):\n"
    "  shutil.copytree('drawn', folder); (folder / 'config.yaml').write_text(options)\n"
)


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    """Rows run a few lines of Python in place of an evaluation; finished ones are drawn by lot."""
    monkeypatch.chdir(tmp_path)
    museum = write_museum_files(tmp_path / "museum")

    def pretend(program: str):
        def command(row):
            return [sys.executable, "-c", program, str(row.folder), json.dumps(row.options)]

        monkeypatch.setattr(sweep_module, "_command", command)

    def sweep_p(*values: str):
        return sweep([CONFIGS / "r18_in.yaml"], vary="p", values=values, output=Path("out"))

    return pretend, sweep_p, museum


def test_reasons_are_the_last_line_or_the_signal_and_go_when_the_row_succeeds(pretended, capfd):
    pretend, sweep_p, museum = pretended
    pretend("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(UserError, match=r"1 of 1 rows failed \(r18_in-p=2\)"):
        sweep_p("2")
    assert "ended by SIGKILL, most often for want of memory" in Path("out/r18_in-p=2.failed.txt").read_text()
    assert "SIGKILL" in capfd.readouterr().out
    pretend("import sys; print('RuntimeError: out of memory\\n', file=sys.stderr); sys.exit(1)")
    with pytest.raises(UserError):
        sweep_p("2")
    assert Path("out/r18_in-p=2.failed.txt").read_text().startswith("RuntimeError: out of memory\n")
    assert "RuntimeError: out of memory" in capfd.readouterr().err
    pretend("pass")
    with pytest.raises(UserError):
        sweep_p("2")
    assert Path("out/r18_in-p=2.failed.txt").read_text().startswith("ended with status 0 and said nothing")
    write_run(Path("drawn"), museum, 0)
    pretend(FINISH + "finish()")
    assert sweep_p("2") == {"r18_in-p=2": None}
    assert not list(Path("out").glob("*.failed.txt")) and Path("out/comparison.md").exists()
    with Path("out/r18_in-p=2/config.yaml").open("w") as config:  # as a first edition's row could have it
        config.write("dba: 5\n")
    with pytest.raises(UserError, match="dba 5: metilr no longer has this"):
        sweep_p("2")


@pytest.fixture
def ctrl_c_raises():
    """Whoever runs the tests in the background hands down an ignored Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupted_sweep_ends_its_row_and_continues(pretended, capfd, ctrl_c_raises):
    pretend, sweep_p, museum = pretended
    write_run(Path("drawn"), museum, 0)
    wait = "(pathlib.Path('pid').write_text(str(os.getpid())), time.sleep(60))"
    pretend(FINISH + f"finish() if 'p=2' in folder.name else {wait}")
    interrupt = threading.Thread(target=interrupt_when_the_second_row_runs)
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        sweep_p("2", "4")
    interrupt.join()
    with pytest.raises(ProcessLookupError):
        os.kill(int(Path("pid").read_text()), 0)
    assert not list(Path("out").glob("*.failed.txt"))
    pretend(FINISH + "assert 'p=4' in folder.name; finish()")
    assert sweep_p("2", "4") == {"r18_in-p=2": None, "r18_in-p=4": None}


def interrupt_when_the_second_row_runs() -> None:
    """Ctrl-C, once that row has written its process number."""
    for _ in range(3000):
        if Path("pid").exists() and Path("pid").read_text():
            break
        time.sleep(0.02)
    time.sleep(0.5)  # the row's process can be ahead of the one that has started it
    os.kill(os.getpid(), signal.SIGINT)


def test_a_row_killed_after_its_results_is_finished_and_so_is_one_that_finished_meanwhile(pretended, capfd):
    """What an earlier sweep left running writes its results after the rows were planned."""
    pretend, sweep_p, museum = pretended
    write_run(Path("drawn"), museum, 0)
    other = "finish(folder.parent / 'r18_in-p=4', json.dumps({**json.loads(sys.argv[2]), 'p': 4.0}))"
    pretend(FINISH + f"assert 'p=2' in folder.name; finish(); {other}; os.kill(os.getpid(), 9)")
    assert sweep_p("2", "4") == {"r18_in-p=2": None, "r18_in-p=4": None}
    assert not list(Path("out").glob("*.failed.txt"))
    assert sweep_p("2", "4") == {"r18_in-p=2": None, "r18_in-p=4": None}
    assert capfd.readouterr().out.count("finished already") == 3


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="asks Linux for a process's children")
def test_a_killed_sweep_s_row_ends_and_the_same_command_finishes_it(tiny_museum, tmp_path, monkeypatch, forks):
    monkeypatch.chdir(tmp_path)
    command = ["sweep", str(CONFIGS / "r18_in.yaml"), "--root", str(tiny_museum), "--options", *CHEAP]
    started = forks.start(tmp_path, command)
    children = Path(f"/proc/{started[0]}/task/{started[0]}/children")
    while not (child := children.read_text().split()):
        time.sleep(0.01)
    os.kill(started[0], signal.SIGKILL)
    while Path(f"/proc/{child[0]}").exists() and "\nState:\tZ" not in Path(f"/proc/{child[0]}/status").read_text():
        time.sleep(0.1)
    assert forks.wait(started).status == -signal.SIGKILL and not Path("runs/sweep/r18_in/results.json").exists()
    monkeypatch.setattr(sweep_module, "subprocess", SimpleNamespace(Popen=partial(Popen, forks), PIPE=-1))
    main(command)
    assert Path("runs/sweep/r18_in/results.json").exists()
