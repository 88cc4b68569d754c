import dataclasses
import errno
import inspect
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest

from metilr import __version__
from metilr.cli import SUBCOMMANDS, _load, call, flat, flat_defaults, main, parse_options, run_command
from metilr.commands.evaluate import evaluate
from metilr.errors import UserError


@pytest.fixture
def command():
    """A command that notes what it was called with."""

    def weigh(
        name: str = "x",
        kind: Literal["full", "mini"] = "full",
        k: int | None = None,
        p: float = 3.0,
        precision: Literal["32", "bf16"] = "32",
        scales: Sequence[float] = (1.0, 0.5),
        numbers: list[int] | None = None,
        folders: Sequence[Path] = (),
        words: tuple[str, ...] = (),
        output: Path | None = None,
    ) -> None:
        """Weigh something.

        Args:
            name: Whose.
        """
        weigh.called = dict(locals())

    weigh.called = None
    return weigh


@pytest.fixture
def called_with(command):
    def call(*args):
        run_command(command, [str(arg) for arg in args])
        return command.called

    return call


@pytest.fixture
def failure(command, capsys):
    """What a command line fails with: one line, status 2, and nothing was called."""

    def fail(*args, function=None, status=2):
        with pytest.raises(SystemExit) as caught:
            run_command(function or command, [str(arg) for arg in args])
        assert caught.value.code == status
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.count("\n") == 1 and printed.err.endswith("\n")
        assert ": error: " in printed.err
        assert command.called is None
        return printed.err.split(": error: ", 1)[1].rstrip("\n")

    return fail


def yaml_file(tmp_path, text):
    file = tmp_path / "options.yaml"
    file.write_text(text)
    return file


def test_options_arrive_with_their_types(called_with):
    called = called_with("--k", "3", "--p=2", "--kind", "mini", "--name", "12", "--output", "a/b")
    assert called["k"] == 3 and called["p"] == 2.0 and isinstance(called["p"], float)
    assert called["kind"] == "mini" and called["name"] == "12" and called["output"] == Path("a/b")


@pytest.mark.parametrize(
    ("args", "option", "expected"),
    [
        (["--scales", "1", "0.5", "--k", "2"], "scales", [1.0, 0.5]),
        (["--scales", "1e-1"], "scales", [0.1]),
        (["--folders", "a", "b c"], "folders", [Path("a"), Path("b c")]),
        (["--folders", "2024", "1e3", "null"], "folders", [Path("2024"), Path("1e3"), Path("null")]),
        (["--words", "1", "true"], "words", ["1", "true"]),
        (["--numbers", "1", "2"], "numbers", [1, 2]),
        (["--scales=2"], "scales", [2.0]),
        ([], "scales", [1.0, 0.5]),
    ],
)
def test_lists(called_with, args, option, expected):
    assert called_with(*args)[option] == expected


@pytest.mark.parametrize(
    ("args", "folder", "files", "others"),
    [
        (["a", "b", "2024", "null"], "a", ["b", "2024", "null"], {}),
        (["--least", "-1e-5", "a", "b"], "a", ["b"], {"least": -1e-5}),
        (["a", "[1] b.jpg", "😀 ü.jpg", "<b>\"'.jpg", "\x1b[31m", "a\nb: c"], "a",
         ["[1] b.jpg", "😀 ü.jpg", "<b>\"'.jpg", "\x1b[31m", "a\nb: c"], {}),
        (["--sizes", "1", "2", "--least=2", "a", "b", "c"], "a", ["b", "c"], {"least": 2.0, "sizes": [1, 2]}),
        (["a", "b", "--quiet"], "a", ["b"], {"quiet": True}),
        (["--quiet", "a", "b"], "a", ["b"], {"quiet": True}),
        (["--quiet", "true", "a", "b"], "a", ["b"], {"quiet": True}),
        (["--quiet=false", "a", "b"], "a", ["b"], {"quiet": False}),
    ],
)  # fmt: skip
def test_what_has_no_name_goes_where_it_belongs_and_a_switch_needs_no_value(args, folder, files, others):
    def pack(
        folder: Path, files: Sequence[Path], least: float = 0.0, sizes: Sequence[int] = (), quiet: bool = False
    ) -> None:
        """Pack."""
        called.update(locals())

    called = {}
    run_command(pack, args)
    expected = {"least": 0.0, "sizes": [], "quiet": False, **others}
    assert called["folder"] == Path(folder) and called["files"] == [Path(file) for file in files]
    assert {name: called[name] for name in expected} == expected


def test_a_list_between_others_and_one_that_is_missing(failure):
    def move(files: list[Path], target: Path) -> None:
        """Move."""
        assert (files, target) == ([Path("a"), Path("b")], Path("c"))

    run_command(move, ["a", "b", "c"])
    assert "target" in failure("a", function=move)
    assert "files" in failure(function=move)


def test_yaml_options_and_the_command_line_after_it_wins(called_with, tmp_path):
    file = yaml_file(tmp_path, "scales: [2, 0.5]\nfolders: [a, '2024']\nk: 4\nkind: mini\nprecision: '32'\n")
    called = called_with("--config", file, "--k", "5")
    assert called["scales"] == [2.0, 0.5] and called["folders"] == [Path("a"), Path("2024")]
    assert called["k"] == 5 and called["kind"] == "mini"
    assert called_with(f"--config={file}", "--scales", "1")["scales"] == [1.0]


def test_unknown_options_are_named_with_the_near_ones(failure, tmp_path):
    assert failure("--nme", "x") == "unknown option --nme (did you mean --name or --numbers?); --help lists them"
    assert "unknown option --zzzzzz; --help" in failure("--zzzzzz", "1")
    message = failure("--config", yaml_file(tmp_path, "outptu: x\n"))
    assert "unknown option --outptu (did you mean --output" in message
    assert "stray" in failure("stray")
    assert "unknown option --out (did you mean --output" in failure("--out", "x")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--kind", "huge"], "--kind huge: expected one of full, mini"),
        (["--k", "1.5"], "--k 1.5: expected int or null"),
        (["--p", "three"], "--p three: expected float"),
        (["--scales", "1", "a"], "--scales [1.0, 'a']: expected a list of float"),
        (["--output", "a", "-dash.jpg"], "unrecognized arguments: -dash.jpg"),
        (["--k"], "--k"),
        (["--folders", "a\udcff.jpg"], "a\\udcff.jpg: its name is not in UTF-8; rename it"),
    ],
)
def test_wrong_values_name_the_option_the_value_and_what_is_expected(failure, args, said):
    assert said in failure(*args)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kind: huge\n", "--kind huge: expected one of full, mini"),
        ("output: [1]\n", "--output [1]: expected Path or null"),
        ("scales: 0.5\n", "--scales 0.5: expected a list like [A, B]"),
        ("k: [1\nx: {", "options.yaml: cannot be read as YAML"),
        ("just words\n", "options.yaml: must hold options"),
        ("", "options.yaml: must hold options"),
    ],
)
def test_bad_yaml(failure, tmp_path, text, said):
    assert said in failure("--config", yaml_file(tmp_path, text))


def test_config_that_cannot_be_read(failure, tmp_path):
    assert f"--config {tmp_path}/none.yaml: no such file" in failure("--config", tmp_path / "none.yaml")
    assert "not a regular file" in failure(f"--config={tmp_path}")
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    assert "cannot be read as YAML" in failure("--config", tmp_path / "latin.yaml")
    failure("--config")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UserError("--k 9:\n too large"), "--k 9: too large"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x.npy"), "x.npy: No space left on device; finished work is"),
    ],
)
def test_errors_of_the_function_end_in_one_line(failure, error, said):
    def broken() -> None:
        """Break."""
        raise error

    assert failure(function=broken).startswith(said)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), ImportError("libtorch_cpu.so: failed to map segment"), OSError("x.so: failed to map segment"),
     RuntimeError("can't allocate memory: you tried to allocate 9 bytes"), RuntimeError("can't start new thread")],
)  # fmt: skip
def test_memory_that_is_refused_ends_in_one_line(failure, error):
    def broken() -> None:
        """Break."""
        raise error

    assert failure(function=broken).startswith("memory does not suffice (")


@pytest.mark.skipif(shutil.which("prlimit") is None, reason="limits memory with prlimit")
def test_memory_that_does_not_suffice_for_the_libraries_is_one_line():
    limited = ["prlimit", "--as=300000000", sys.executable, "-m", "metilr", "evaluate", "--root", "nowhere"]
    run = subprocess.run(limited, capture_output=True, text=True, check=False)
    assert run.returncode == 2 and run.stderr.startswith("metilr evaluate: error: memory does not suffice (")
    assert run.stderr.count("\n") == 1


def test_ctrl_c_has_the_status_that_shells_give_it(failure):
    def broken() -> None:
        """Break."""
        raise KeyboardInterrupt

    assert failure(function=broken, status=130).startswith("interrupted; finished work is kept")


@pytest.mark.parametrize("error", [ValueError("a defect"), OSError("no number")])
def test_defects_keep_their_traceback(error):
    def broken() -> None:
        """Break."""
        raise error

    with pytest.raises(type(error), match=str(error)):
        run_command(broken, [])


def test_arguments_default_to_the_process_s_own(command, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["weigh.py", "--scales", "1", "2", "--folders", "7"])
    run_command(command)
    assert command.called["scales"] == [1.0, 2.0] and command.called["folders"] == [Path("7")]


def test_help_is_complete(capsys):
    with pytest.raises(SystemExit) as caught:
        run_command(evaluate, ["--help"])
    assert caught.value.code == 0
    words = capsys.readouterr().out
    for name in flat_defaults(evaluate):
        assert f"\n  --{name} " in words, name
    for group in ("The model", "How images are read", "How descriptors are compared", "The report"):
        assert f"\n{group}" in words
    assert "Measure how well a model recognises exhibits" in words and "--config" in words
    assert words.startswith("usage: ") and words.splitlines()[0].endswith(" [options]") and not words.splitlines()[1]
    assert words.count("stop,skip") == 1 and "Literal" not in words


def test_the_help_of_train_teaches_and_begins_with_the_data(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 172
    places = [next(i for i, line in enumerate(lines) if f"--{name}" in line) for name in ("data.", "model.", "output")]
    assert places == sorted(places) and "nn.Module" not in " ".join(lines)


def test_metilr_lists_its_subcommands_by_the_first_lines_of_their_docstrings(capsys):
    for args in ([], ["--help"], ["-h"]):
        main(args)
        printed = capsys.readouterr().out
        for name, (function, summary) in SUBCOMMANDS.items():
            assert f"\n  {name} " in printed and f" {summary}\n" in printed
            assert inspect.getdoc(_load(function)).splitlines()[0] == summary


VISION = {"torchvision", "timm", "pytorch_lightning", "matplotlib", "wandb", "openvino", "torchmetrics"}
HEAVY = {*VISION, "torch", "faiss", "sklearn"}


def imported_by(*commands: str, cwd: Path | None = None, setup: str = "") -> list[set[str]]:
    """Top-level modules that a process has imported after each of some command lines."""
    code = f"""
import sys
{setup}
from metilr.cli import main
for args in {[command.split() for command in commands]!r}:
    try:
        main(args)
    except SystemExit:
        pass
    print("\\nimported", *sys.modules)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=True)
    lines = [line for line in run.stdout.splitlines() if line.startswith("imported ")]
    return [{name.split(".")[0] for name in line.split()[1:]} for line in lines]


def test_help_and_mistakes_import_nothing_that_takes_seconds():
    helps = [f"{name} --help" for name in SUBCOMMANDS]
    *_, imported = imported_by("--help", "--version", "nonsense", "evaluate --bakbone x", *helps)
    assert "metilr" in imported and not imported & HEAVY


GONE = (  # commands, each with a path that is not there
    "identify nosuch.jpg nosuch --store INDEX", "identify nosuch --run RUN", "identify photos --store INDEX",
    "identify nosuch.jpg --store nosuch", "identify nosuch.jpg --run nosuch", "serve --store nosuch",
    "serve --run nosuch", "serve --store INDEX --ckpt nosuch", "export-descriptors nosuch out.pkl",
    "pack nosuch out.ckpt", "push nosuch anna/net", "export nosuch out.onnx", "rerun nosuch", "compare nosuch",
    "index nosuch out",
)  # fmt: skip


def test_a_path_that_is_not_there_is_named_in_one_line_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder, file in (("INDEX", "index.json"), ("RUN", "results.json"), ("photos", "notes.txt")):
        Path(folder).mkdir()
        Path(folder, file).touch()  # whose content would be refused, too
    for command in GONE:
        with pytest.raises(SystemExit) as stop:
            main(command.split())
        printed = capsys.readouterr()
        assert stop.value.code == 2 and printed.out == "" and printed.err.count("\n") == 1
        assert ("nosuch" in printed.err or "photos: no images inside" in printed.err) and ".json:" not in printed.err
    assert not imported_by(*GONE[:-1], cwd=tmp_path)[-1] & HEAVY  # an index's options ask PyTorch for devices


def test_what_looks_at_files_alone_imports_no_network_library(tiny_museum, tmp_path, server):
    """A sweep's rows run in processes of their own, ones that do nothing here; a comparison alone draws."""
    first = Path(__file__).parent / "fixtures/first_edition_run"
    (tmp_path / "config.yaml").write_text("weights: nowhere.pth")
    commands = (
        f"verify {tiny_museum} --decode", f"download --mirror {server.url} --queries",
        f"sweep config.yaml --root {tiny_museum}", f"describe {tiny_museum}", f"compare {first}",
    )  # fmt: skip
    rows = "from metilr.commands import sweep; sweep._command = lambda row: ['true']"
    *_, sweeping, _, drawing = imported_by(*commands, cwd=tmp_path, setup=rows)
    assert not sweeping & VISION and "matplotlib" in drawing and not drawing & (VISION - {"matplotlib"})


@dataclasses.dataclass
class Scale:
    """The scale.

    Attributes:
        unit: Of weight.
        steps: Its marks.
    """

    unit: Literal["g", "kg"] = "g"
    steps: Sequence[float] = ()

    def __post_init__(self) -> None:
        if self.unit == "kg" and not self.steps:
            raise UserError("kg: needs steps", "unit")


def test_a_dataclass_is_a_group_of_options(capsys, tmp_path):
    def weigh(name: str, scale: Scale | None = None, k: int = 1) -> tuple[str, Scale | None, int]:
        """Weigh it."""
        weighed.append((name, scale, k))

    weighed = []
    assert flat_defaults(weigh) == {"name": inspect.Parameter.empty, "k": 1, "unit": "g", "steps": ()}
    run_command(weigh, ["x", "--steps", "1", "2", "--unit", "kg"])
    file = yaml_file(tmp_path, "unit: kg\nsteps: [3]\n")
    run_command(weigh, ["x", "--config", str(file), "--k", "2"])
    call(weigh, {"name": "y", "steps": [4]})
    assert weighed == [
        ("x", Scale("kg", [1.0, 2.0]), 1), ("x", Scale("kg", [3.0]), 2), ("y", Scale("g", [4]), 1)
    ]  # fmt: skip
    assert flat({"scale": Scale(), "k": 1}) == {"unit": "g", "steps": (), "k": 1}
    with pytest.raises(SystemExit):
        run_command(weigh, ["x", "--unit", "kg"], "weigh")
    assert capsys.readouterr().err == "weigh: error: --unit kg: needs steps\n"
    with pytest.raises(TypeError, match="setps"):
        call(weigh, {"name": "y", "setps": [4]})


def test_version_from_the_command_and_from_the_module(capsys):
    main(["--version"])
    said = capsys.readouterr().out
    assert said == f"metilr {__version__}\n"
    module = [sys.executable, "-m", "metilr"]
    assert subprocess.run([*module, "--version"], capture_output=True, text=True, timeout=120).stdout == said
    refused = subprocess.run([*module, "vers"], capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2 and refused.stderr.startswith("metilr: error: no subcommand 'vers'")


@pytest.mark.parametrize("name", ["evaluate", "train"])
def test_the_scripts_are_subcommands_too(name, capsys):
    with pytest.raises(SystemExit) as caught:
        main([name, "--outptu", "x"])
    assert caught.value.code == 2
    assert f"metilr {name}: error: unknown option --outptu (did you mean --output" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0 and f"usage: metilr {name} " in capsys.readouterr().out


def test_metilr_refuses_what_it_does_not_know(capsys):
    for args, said in (
        (["nonsense"], "metilr: error: no subcommand 'nonsense'; metilr --help lists them\n"),
        (["export-descriptor"], "no subcommand 'export-descriptor' (did you mean export-descriptors?)"),
        (["export-descriptors", "--otput", "x"], "metilr export-descriptors: error: unknown option --otput"),
        (["export-descriptors"], "store, output"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(args)
        error = capsys.readouterr().err
        assert caught.value.code == 2 and error.count("\n") == 1 and said in error


def test_metilr_runs_a_subcommand_and_reports_its_user_errors(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["export-descriptors", str(tmp_path), str(tmp_path / "out.pkl")])
    assert caught.value.code == 2
    assert f"metilr export-descriptors: error: {tmp_path}: not a descriptor store" in capsys.readouterr().err


def test_a_reader_that_has_had_enough_is_no_error():
    code = "from metilr.cli import run_command\ndef f() -> None:\n    while True: print('line')\nrun_command(f, [])"
    run = subprocess.run(
        ["bash", "-c", '"$0" -c "$1" | head -2; exit ${PIPESTATUS[0]}', sys.executable, code],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (run.returncode, run.stdout, run.stderr) == (0, "line\nline\n", "")


def test_what_a_file_says_cannot_steer_the_terminal(capsys):
    def refuse() -> None:
        raise UserError("a\x1b[2Jb\ud800\nç")

    with pytest.raises(SystemExit):
        run_command(refuse, [], prog="x")
    assert capsys.readouterr().err == "x: error: a\\x1b[2Jb\\ud800 ç\n"


@pytest.mark.parametrize(("line", "said"), [("batch_size: null", "expected int"), ("database: null", "one of full")])
def test_null_in_a_configuration_is_no_value_of_an_option_that_needs_one(tmp_path, line, said):
    (tmp_path / "c.yaml").write_text(line)
    with pytest.raises(UserError, match=said):
        parse_options(evaluate, ["--config", str(tmp_path / "c.yaml")])
    (tmp_path / "c.yaml").write_text("k: null")
    assert parse_options(evaluate, ["--config", str(tmp_path / "c.yaml")])["k"] is None
