"""The options of a model: what is refused, and that they cost no library."""

import subprocess
import sys

import pytest

from metilr.errors import UserError
from metilr.models import ModelOptions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ckpt": "a.ckpt", "backbone": "r18_in"}, "backbone has no effect with ckpt"),
        ({"ckpt": "a.ckpt", "p": 2.0}, "p has no effect with ckpt"),
        ({"pooling": "max"}, "pooling max: choose one of gem, mac"),
        ({"patch_rounding": "up"}, "patch_rounding up: choose one of nearest"),
        ({"pooling": "mac", "p": 2.0}, "p has no effect with pooling mac"),
        ({"seed": -1}, "seed -1: choose a number from 0"),
    ],
)
def test_values_that_are_wrong_or_without_effect_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ModelOptions(**options)


def test_a_checkpoint_takes_scales_and_a_seed() -> None:
    assert ModelOptions(ckpt="a.ckpt", scales=1, seed=3).scales == (1,)


def test_options_cost_no_library() -> None:
    code = (
        "import sys, metilr.models, metilr.models.zoo; "
        "sys.exit(' '.join({'torch', 'timm', 'openvino'} & sys.modules.keys()) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
