"""How many cases there are."""

import re
from pathlib import Path

LEAST = 10_000


def test_there_are_thousands_of_cases():
    """Those of ``cases(N)`` alone; single replacements, properties and parameters come on top."""
    numbers = [int(n) for file in Path(__file__).parent.glob("test_*.py")
               for n in re.findall(r"in cases\((\d+)", file.read_text())]  # fmt: skip
    assert sum(numbers) >= LEAST and max(numbers) < 2000  # no single test is all of them
