"""The container files, read as Docker reads them: what they copy and run is there, and they run without rights."""

import json
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from metilr.cli import SUBCOMMANDS, _load, flat_defaults
from tests.server import Server

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """Name and arguments of each instruction, continued lines joined."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.M).replace("\\\n", " ")
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions that count for each target: its own after those of the stage that it is made from."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name, rest in instructions():
        if name == "FROM":
            source, _, target = rest.partition(" AS ")
            found[target] = list(found.get(source, []))
        elif found:
            found[target].append((name, rest))
    return found


def last(stage: list[tuple[str, str]], instruction: str) -> str:
    return next(rest for name, rest in reversed(stage) if name == instruction)


def copied() -> list[Path]:
    """What COPY takes, relative to the repository."""
    return [Path(source) for name, rest in instructions() if name == "COPY" for source in rest.split()[:-1]]


def is_ignored(path: str) -> bool:
    """Whether .dockerignore leaves a file out: the last of its lines that fits the file, or a folder above, decides."""
    ignored, parents = False, [path, *map(str, Path(path).parents)]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").replace("**/", "*")
        if line and not line.startswith("#") and any(fnmatch(part, pattern) for part in parents if part != "."):
            ignored = not line.startswith("!")
    return ignored


def test_both_targets_are_there():
    assert stages().keys() == {"evaluate", "serve"}


@pytest.mark.parametrize("source", copied(), ids=str)
def test_what_is_copied_is_tracked_and_not_ignored(source):
    if not (ROOT / ".git").exists():
        pytest.skip("no repository")
    tracked = subprocess.run(["git", "ls-files", source], cwd=ROOT, capture_output=True, text=True, check=True)
    files = tracked.stdout.splitlines()
    assert files and [file for file in files if is_ignored(file)] == []
    assert is_ignored("tests/museum.py") and is_ignored("runs/x") and is_ignored("metilr/data/__pycache__/x.pyc")


def test_what_is_copied_suffices_to_install(tmp_path):
    for source in copied():
        place = tmp_path / source.name
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        copy(ROOT / source, place)
    code = "from setuptools.build_meta import prepare_metadata_for_build_wheel as make; make('.')"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    [metadata] = tmp_path.glob("*.dist-info/METADATA")
    assert "instance-level" in metadata.read_text() and "License-File: LICENSE" in metadata.read_text()

    command = re.search(r'python requirements "\$BUILD" (\S+)', DOCKERFILE.read_text())
    asked = {}
    for build in ("cpu", "cuda"):
        run = subprocess.run(
            [sys.executable, "requirements", build, command[1]], cwd=tmp_path, capture_output=True, text=True
        )
        asked[build] = {line.partition(";")[0] for line in run.stdout.splitlines()}
        assert any(re.match(r"torch>", line) for line in asked[build]) and any(
            "uvicorn" in line for line in asked[build]
        )
    assert any(line.startswith("faiss-gpu") for line in asked["cuda"])
    assert {line for line in asked["cuda"] - asked["cpu"] if not line.startswith("faiss-gpu")} == set()
    run = subprocess.run([sys.executable, "requirements", "tpu", "serve"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr == "tpu: choose cpu or cuda\n"


@pytest.mark.parametrize("target", ["evaluate", "serve"])
def test_it_runs_a_command_of_metilr_without_rights(target):
    stage = stages()[target]
    program, *arguments = json.loads(last(stage, "ENTRYPOINT"))
    assert program == "metilr" and "metilr = " in (ROOT / "pyproject.toml").read_text()
    if arguments:
        known = flat_defaults(_load(SUBCOMMANDS[arguments[0]][0]))
        assert {option.removeprefix("--") for option in arguments if option.startswith("--")} <= known.keys()
    user = last(stage, "USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user) and f"--uid {user.partition(':')[0]} " in str(stage)
    assert ("HEALTHCHECK" in dict(stage)) == (target == "serve")


def test_nothing_that_is_downloaded_stays():
    for name, rest in instructions():
        for command in re.split(r"&&|;", rest) if name == "RUN" else ():
            assert "pip install" not in command or "--no-cache-dir" in command
            assert "apt-get" not in command
        assert name != "ADD" and "sudo" not in rest


@pytest.mark.parametrize("is_well", [True, False])
def test_the_health_check_asks_the_server(server: Server, is_well):
    stage = stages()["serve"]
    program, *arguments = json.loads(re.search(r"CMD (\[.*\])", last(stage, "HEALTHCHECK"))[1])
    entry = json.loads(last(stage, "ENTRYPOINT"))
    port = entry[entry.index("--port") + 1]
    assert program == "python" and last(stage, "EXPOSE") == port
    if is_well:
        server.files["health"] = b"{}"
    asked = [argument.replace(f"http://127.0.0.1:{port}/", server.url) for argument in arguments]
    assert asked != arguments
    assert (subprocess.run([sys.executable, *asked], capture_output=True).returncode == 0) == is_well
    assert server.gets() == ["health"]


def test_the_services_are_the_image_s_and_reach_this_machine_alone():
    options = flat_defaults(_load(SUBCOMMANDS["serve"][0])).keys()
    [service] = services("compose.yaml").values()
    assert service["build"]["target"] in stages()
    more = services("compose.milvus.yaml")
    for each in (service, more["serve"]):
        assert {part.removeprefix("--") for part in each["command"][::2]} <= options
    assert more["serve"]["command"][-1] == "http://milvus:19530" and more["serve"]["depends_on"].keys() == {"milvus"}
    for each in (service, more["milvus"]):
        assert all(port.startswith("127.0.0.1:") for port in each["ports"])  # there is no password


def services(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text())["services"]


def test_hadolint_finds_nothing():
    if (hadolint := shutil.which("hadolint", path=Path(sys.executable).parent) or shutil.which("hadolint")) is None:
        pytest.skip("needs hadolint, of metilr[dev]")
    run = subprocess.run([hadolint, "--no-color", DOCKERFILE], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "")
