"""What a log says of long work."""

import io

import pytest
from rich.table import Table

from metilr import progress
from metilr.progress import counted, make_console, tracked


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

    monkeypatch.setattr(progress, "time", clock := Clock())
    return clock


def test_a_log_has_a_line_a_minute_with_rate_and_time_left_and_none_of_short_work(clock, capsys):
    with counted("describing images", 9000, "images") as done:
        for _ in range(30):
            clock.now += 10
            done(100)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[0] == "describing images: 600 of 9,000 images, 10.0 a second, 0:14:00 left"
    with counted("training", 30, "batches") as done:
        for _ in range(4):
            clock.now += 40
            done(1)
    assert capsys.readouterr().out.startswith("training: 2 of 30 batches, 40 s each, 0:18:40 left\n")
    assert list(tracked([1, 2], "short work", 2, "files")) == [1, 2]
    with counted("quiet work", 10, "files", quiet=True) as done:
        clock.now += 1000
        done(1)
    printed = capsys.readouterr()
    assert printed.out == printed.err == ""


def test_no_line_of_a_log_is_broken(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr("sys.stdout", log := io.StringIO())
    path, table = "a/" * 100, Table(*[f"a long column {i}" for i in range(10)])
    table.add_row(*[f"a long cell {i}" for i in range(10)])
    make_console().print(f"wrote {path}")
    make_console().print(table, soft_wrap=False)
    assert f"wrote {path}" in log.getvalue().splitlines() and "a long cell 0" in log.getvalue()
