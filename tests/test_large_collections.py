"""The code in docs/large_collections.md runs as it stands, and its plan follows from what was measured."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch.distributed

from metilr import approximate_search
from tests.test_approximate_search import brute_force, exhibits

DOCUMENT = (Path(__file__).parents[1] / "docs" / "large_collections.md").read_text()


def test_its_examples_find_neighbours(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(approximate_search, "MIN_ROWS", 1000)
    start = torch.distributed.init_process_group
    monkeypatch.setattr(
        torch.distributed,
        "init_process_group",
        lambda backend: start(backend, init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1),
    )
    rows, queries = exhibits(n=2000)
    (tmp_path / "share").mkdir()
    np.save("share/rows.npy", rows)
    np.save("queries.npy", queries)
    on_one, on_several = re.findall(r"^```python\n(.*?)^```", DOCUMENT, flags=re.MULTILINE | re.DOTALL)
    exec(on_one, {"__name__": "__main__"})
    assert "[[0 " in capsys.readouterr().out.replace("[[   0", "[[0")  # a row finds itself
    try:
        exec(on_several, {"__name__": "__main__"})
    finally:
        torch.distributed.destroy_process_group()
    found = np.load("found.npz")
    assert (found["rows"][:, 0] == brute_force(rows, queries, 1)[1][:, 0]).mean() >= 0.98


def test_the_plan_follows_from_the_table():
    row = re.search(r"^\| 10,000,000 \| (\S+) \| (\S+) \|.*\| (\S+) s \|$", DOCUMENT, re.MULTILINE)
    exact_ms, search_ms, seconds = (float(number) for number in row.groups())
    alone_ms = float(re.search(r"and (\S+) ms at 10 million", DOCUMENT)[1])
    text = " ".join(DOCUMENT.split())
    million = 1e6
    codes = 10 * million / 8
    said = {
        r"building \| measured (\S+) µs a row": seconds / 10,
        r"25 M rows have as well \| (\S+) min": 25 * million * seconds / (10 * million) / 60,
        r"1.25 M codes, so [^|]* \| (\S+) ms a query": search_ms * 25 * million / 8 / codes,
        r"1.25 M codes, so (\S+) ns each": search_ms / codes * million,
        r"measured (\S+) ms for 1.25 M codes \|": alone_ms,
        r"ms for 1.25 M codes \| (\S+) ms": alone_ms * 25 * million / 8 / codes,
        r"little beside (\S+) s of search": search_ms * 25 * million / 8 / codes,  # 1,000 queries
        r"so about (\S+) hours": 100 * million * 2 * seconds / (10 * million) / 3600,
        r"so (\S+) ms a query in batches": search_ms * 8.8 * million / codes,
        r"in batches, (\S+) ms alone": alone_ms * 8.8 * million / codes,
        r"Measured (\S+) ms a query for 10 M rows": exact_ms,
        r"10 M rows: (\S+) s a query on each": exact_ms * 2.5 / 1000,
    }
    for pattern, expected in said.items():
        assert float(re.search(pattern, text)[1]) == pytest.approx(expected, rel=0.04), pattern
