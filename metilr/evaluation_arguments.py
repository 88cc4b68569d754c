"""Options of an evaluation that are refused before any work."""

import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

from metilr.errors import UserError

# Options that make descriptors from images.
OF_THE_MODEL = ("backbone", "weights", "pooling", "p", "stage", "patch_rounding")
OF_THE_IMAGES = ("ckpt", *OF_THE_MODEL, "scales", "image_size", "bad_images", "store", "engine", "profile")


def check_arguments(arguments: Mapping[str, Any], command: Callable[..., Any]) -> None:
    """Refuse values out of range, and options that would be ignored: recorded all the same, they would lie.

    Args:
        arguments: Values of ``evaluate``'s options.
        command: That function, whose signature has their defaults and choices.

    Raises:
        UserError: At the first such option.
    """
    defaults = {name: parameter.default for name, parameter in inspect.signature(command).parameters.items()}
    for name, kind in typing.get_type_hints(command).items():
        literals = [part for part in (kind, *typing.get_args(kind)) if typing.get_origin(part) is Literal]
        choices = [choice for literal in literals for choice in typing.get_args(literal)]
        value = arguments.get(name)
        may_be_number = int in typing.get_args(kind) and isinstance(value, int)
        if choices and value not in (*choices, defaults.get(name)) and not may_be_number:
            raise UserError(f"--{name} {value}: choose one of {', '.join(dict.fromkeys(map(str, choices)))}")
    changed = [name for name, value in arguments.items() if value != defaults[name]]
    idle = [name for name in changed if name in OF_THE_IMAGES] if arguments["descriptors"] else []
    if idle:
        raise UserError(f"--{idle[0]}: has no effect with --descriptors, which were made before; leave it out")
    idle = [name for name in changed if name in OF_THE_MODEL] if arguments["ckpt"] is not None else []
    if idle:
        raise UserError(f"--{idle[0]}: has no effect with --ckpt, which carries its model; leave it out")
    if "p" in changed and arguments["pooling"] != "gem":
        raise UserError(f"--p: has no effect with --pooling {arguments['pooling']}; leave it out")
    if arguments["geometric_check"] < 0:
        raise UserError(f"--geometric_check {arguments['geometric_check']}: choose 0 (off) or more")
    if arguments["geometric_check"] and arguments["descriptors"]:
        raise UserError(
            "--geometric_check: needs the model and the images; give --root with the model's options (and --store) "
            "instead of --descriptors"
        )
    if arguments["geometric_reorder"] and not arguments["geometric_check"]:
        raise UserError("--geometric_reorder: has no effect without --geometric_check, such as 20; leave it out")
    if arguments["report_pictures"] < 0:
        raise UserError(f"--report_pictures {arguments['report_pictures']}: choose 0 or more")
    if not 0 <= arguments["seed"] < 2**63:
        raise UserError(f"--seed {arguments['seed']}: choose a number from 0 to 2**63 - 1")
