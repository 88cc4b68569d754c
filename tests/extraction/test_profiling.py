import io
import re
import time

import pytest
from rich.console import Console

from metilr.data.ground_truth import load_ground_truth
from metilr.extraction.datamodule import StageTimes
from metilr.extraction.describe import describe_images
from metilr.extraction.options import ExtractionOptions
from metilr.models.embedder import build_embedder


def test_only_what_is_asked_for_is_measured():
    for is_on in (False, True):
        times = StageTimes(is_on=is_on)
        for stage in ("network", "network", "write"):
            with times.measured(stage):
                pass
        assert {stage for stage, seconds in times.seconds.items() if seconds > 0} == (
            {"network", "write"} if is_on else set()
        )


def test_what_is_computed_side_by_side_is_not_taken_for_waiting():
    times, told = StageTimes(is_on=True), io.StringIO()
    times.seconds.update(network=9.0, collect=4.0, write=1.0)  # two streams of 4.5 s, for 4 s of which all wait
    times.started = time.perf_counter() - 10
    times.print(Console(file=told, width=200), n_workers=2, n_processes=1, n_streams=2)
    rows = {line.split()[0]: line for line in told.getvalue().splitlines()[2:]}
    assert list(rows) == ["decode", "wait", "transfer", "network", "write"]
    assert float(rows["wait"].split()[1]) == pytest.approx(5, abs=0.5)
    assert float(rows["network"].split()[1]) == 9 and "2 batches side by side" in rows["network"]


def test_an_extraction_says_where_its_time_went(tiny_museum, tmp_path, capsys):
    truth = load_ground_truth(tiny_museum)
    options = ExtractionOptions(accelerator="cpu", num_workers=0, quiet=True, profile=True)
    embedder = build_embedder("timm/test_resnet", "random")
    describe_images(embedder, truth, tmp_path / "store", options, Console(quiet=True))
    printed = capsys.readouterr().out
    n_images = sum(map(len, truth.paths.values()))
    total = float(re.search(rf"{n_images} images in ([\d.]+) s", printed)[1])
    stages = {
        line.split()[0]: float(line.split()[1]) for line in printed.splitlines() if re.match(r" *[a-z]+ +\d", line)
    }
    assert list(stages) == ["decode", "wait", "transfer", "network", "write"]
    assert sum(stages[stage] for stage in ("wait", "transfer", "network", "write")) == pytest.approx(total, abs=0.3)
    describe_images(embedder, truth, tmp_path / "store", options, Console(quiet=True))
    assert not capsys.readouterr().out  # nothing was described
