"""What pyproject.toml declares is what is tested."""

import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest needs it there too

REPOSITORY = Path(__file__).parents[1]
LINUX = {"sys_platform": "linux", "platform_machine": "x86_64"}


def bounds(requirements: list[str]) -> dict[str, Version]:
    """The one version that each requirement names, of those for Linux."""
    read = map(Requirement, requirements)
    meant = [each for each in read if each.marker is None or each.marker.evaluate(LINUX)]
    return {canonicalize_name(each.name): Version(specifier.version) for each in meant for specifier in each.specifier}


def test_lowest_txt_holds_the_lower_bounds_that_are_declared():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = [project["optional-dependencies"][extra] for extra in ("demo", "serve", "openvino", "onnx", "heic")]
    lines = (REPOSITORY / "tests" / "lowest.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all("==" in pin for pin in pins)
    assert bounds(pins) == bounds(sum(extras, project["dependencies"]))
