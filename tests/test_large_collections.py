"""The code in docs/large_collections.md runs as it stands."""

import re
from pathlib import Path

import numpy as np
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
