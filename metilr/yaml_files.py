"""YAML from anywhere: plain values, and one kind of error."""

import math
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

from metilr.errors import one_line

REPEATED = 100_000  # characters that aliases may stand for; of options, with all that repeats, some hundreds


def read_yaml(file: Path) -> Any:
    """Read a YAML file; tags that would make objects are refused.

    Raises:
        ValueError: If it is no YAML in UTF-8, nested too deeply, much longer without its aliases, or a tag does not
            fit its value.
        OSError: If it cannot be read.
    """
    try:
        text = file.read_text(encoding="utf-8")
        refuse_aliases_of_aliases(text)
        return yaml.safe_load(text)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # PyYAML's constructors raise nearly any type
        raise ValueError(one_line(error)) from error


def parser_mode() -> str:
    """Jsonargparse's name for reading values and files as it does by default, without aliases of aliases."""
    set_loader("metilr", _load, (yaml.YAMLError,))
    return "metilr"


def _load(text: str) -> Any:
    refuse_aliases_of_aliases(text)
    return get_loader("yaml")(text)


def refuse_aliases_of_aliases(text: str) -> None:
    """Refuse a few lines that stand for gigabytes: read, they share their parts; shown or compared, they do not.

    Raises:
        yaml.YAMLError: If aliases stand for too much.
    """
    if "*" in text and _length(yaml.compose(text, yaml.SafeLoader), {}) > 2 * len(text) + REPEATED:
        raise yaml.YAMLError("its aliases stand for too much; write out what they stand for")


def _length(node: yaml.Node | None, known: dict[int, float]) -> float:
    """Characters and parts with all that aliases repeat; infinite where a part holds itself."""
    if not isinstance(node, yaml.CollectionNode):
        return 1 if node is None else 1 + len(node.value)
    if id(node) not in known:
        known[id(node)] = math.inf  # until it is known: who meets it before that is in it
        pairs = isinstance(node, yaml.MappingNode)
        parts = [part for pair in node.value for part in pair] if pairs else node.value
        known[id(node)] = 1 + sum(_length(part, known) for part in parts)
    return known[id(node)]
