"""What pyproject.toml declares is what is tested."""

import os
import shutil
import subprocess
import tomllib  # pytest needs it there too
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

REPOSITORY = Path(__file__).parents[1]
LINUX = {"sys_platform": "linux", "platform_machine": "x86_64"}


def bounds(requirements: list[str]) -> dict[str, Version]:
    """The one version that each requirement names, of those for Linux."""
    read = map(Requirement, requirements)
    meant = [each for each in read if each.marker is None or each.marker.evaluate(LINUX)]
    return {canonicalize_name(each.name): Version(specifier.version) for each in meant for specifier in each.specifier}


def test_lowest_txt_holds_the_lower_bounds_that_are_declared():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = [
        project["optional-dependencies"][extra]
        for extra in ("demo", "serve", "openvino", "onnx", "heic", "parquet", "tensorboard", "milvus")
    ]
    lines = (REPOSITORY / "tests" / "lowest.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all("==" in pin for pin in pins)
    assert bounds(pins) == bounds(sum(extras, project["dependencies"]))


def steps(folder: Path, *arguments: str) -> str:
    """What make would run to install for the demo, in an environment that is there but for what it needs."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, folder)
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/python").touch()
    (folder / ".venv/.cpu").touch()
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("UV", "CPU", "LOCK", "MAKEFLAGS", "MAKEOVERRIDES")
    }
    command = ["make", "-n", ".venv/.installed-demo", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("arguments", "installer"),
    [
        (["UV=/opt/uv"], "/opt/uv pip install --python .venv/bin/python -q"),
        (["UV="], ".venv/bin/python -m pip install -q"),
        (["UV=/opt/uv", "CPU="], "/opt/uv pip install --python .venv/bin/python -q"),
        (["UV=/opt/uv", "LOCK=.ci/lock.txt"], ".venv/bin/python -m pip install -q"),  # the gate's, digest by digest
    ],
)
def test_make_installs_with_uv_where_it_is_there(tmp_path, arguments, installer):
    lines = [line for line in steps(tmp_path, *arguments).splitlines() if " install " in line]
    assert lines and all(line.startswith(installer) for line in lines)
    is_for_cpu = not {"CPU=", "LOCK=.ci/lock.txt"} & set(arguments)
    assert any("whl/cpu" in line for line in lines) == is_for_cpu
