from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.guard import watched


@pytest.fixture(autouse=True)
def guarded(tmp_path: Path) -> Iterator[None]:
    """Every test here runs watched, and its cases may write into its own folder alone."""
    with watched(tmp_path):
        yield
