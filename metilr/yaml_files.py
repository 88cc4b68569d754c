"""YAML from anywhere: plain values, and one kind of error."""

from pathlib import Path
from typing import Any

import yaml

from metilr.errors import one_line


def read_yaml(file: Path) -> Any:
    """Read a YAML file; tags that would make objects are refused.

    Raises:
        ValueError: If it is no YAML in UTF-8, nested too deeply, or a tag does not fit its value.
        OSError: If it cannot be read.
    """
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, MemoryError):
        raise
    except Exception as error:  # PyYAML's constructors raise nearly any type
        raise ValueError(one_line(error)) from error
