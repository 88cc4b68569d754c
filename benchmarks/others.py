"""metilr beside what a user would take instead, from image files to figures: time, memory, lines to write, figures.

Each way is a program in `ways/`, run in a process of its own with its imports, on the same files and with the same
weights, those of lite0_in; programs that do not import metilr get them as a file. There are two settings. The recipe,
which metilr follows by default and the plain way by hand: images as they are, three scales, whitening, k and τ chosen
on val, GAP. And squares of 512 px at one scale, the nearest image alone, which is what VPR-methods-evaluation (its way,
written anew) and open-metric-learning (its own functions) do. metilr also draws its intervals and writes its report
page, as it does for a user. Processor time is that of a program and all its processes; ways alternate in each round,
and medians are shown. Without --oml_python the row of open-metric-learning is left out:

    python -m venv OML && OML/bin/pip install open-metric-learning timm
    python benchmarks/others.py --root DIR --oml_python OML/bin/python
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measuring import Clock, PeakMemory, show

from metilr.demo import DEMO, make_demo
from metilr.errors import UserError
from metilr.evaluation.runs import RUNS
from metilr.models.embedder import build_embedder

HERE = Path(__file__).parent
GROUND_TRUTH = ("MET_database", "valset", "testset")
RECIPE, SQUARE = "recipe", "square 512, one scale"
OML = "open-metric-learning"


class Way(NamedTuple):
    """A program, what it is given after the data root (an engine of metilr or nothing), and at which settings."""

    program: str
    settings: str
    engine: str | None = None

    @property
    def file(self) -> Path:
        """Where it lies."""
        return HERE / "ways" / f"{self.program}.py"


WAYS = {
    "by hand": Way("by_hand", RECIPE),
    "metilr, torch": Way("by_metilr", RECIPE, "torch"),
    "metilr, openvino": Way("by_metilr", RECIPE, "openvino"),
    "VPR-methods-evaluation's way": Way("by_batches", SQUARE),
    OML: Way("by_oml", SQUARE),
    "metilr square, torch": Way("by_metilr_square", SQUARE, "torch"),
    "metilr square, openvino": Way("by_metilr_square", SQUARE, "openvino"),
}


def lines_of(file: Path) -> int:
    """Lines of a program that its user writes: without blank ones, comments and docstrings."""
    lines, inside = 0, False
    for line in map(str.strip, file.read_text().splitlines()):
        quotes = line.count('"""')
        lines += not (inside or quotes or not line or line.startswith("#"))
        inside ^= quotes == 1
    return lines


def part_of(root: Path, share: float, folder: Path) -> Path:
    """A data root of a share of each split, spread over it, with all images of the exhibits that queries show."""
    (folder / "ground_truth").mkdir(parents=True)
    (folder / "images").symlink_to((root / "images").absolute())
    database, *queries = (json.loads((root / f"ground_truth/{name}.json").read_text()) for name in GROUND_TRUTH)
    queries = [entries[:: round(1 / share)] for entries in queries]
    shown = {entry.get("MET_id") for entries in queries for entry in entries}
    spread = {entry["id"] for entry in database[:: round(1 / share)]}
    database = [entry for entry in database if entry["id"] in shown | spread]
    for name, entries in zip(GROUND_TRUTH, (database, *queries), strict=True):
        (folder / f"ground_truth/{name}.json").write_text(json.dumps(entries))
    return folder


def measure(command: Sequence[object], folder: Path) -> dict[str, Any]:
    """Run a program in an empty folder; wall and processor seconds, peak memory and the figures that it prints."""
    folder.mkdir()
    paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with (folder / "printed").open("w+") as printed:
        clock = Clock()
        process = subprocess.Popen(
            [*map(str, command)], cwd=folder, env=environment, stdout=printed, stderr=subprocess.STDOUT
        )
        with PeakMemory(process.pid, with_children=True) as memory:
            _, status, used = os.wait4(process.pid, 0)
        seconds, process.returncode = clock(), os.waitstatus_to_exitcode(status)
        printed.seek(0)
        lines = printed.read().splitlines()
    if process.returncode:
        raise UserError("\n".join([f"{command[1]} ended with {process.returncode}:", *lines[-20:]]))
    shutil.rmtree(folder)
    [figures] = [json.loads(line) for line in lines if line.startswith("{")]
    by_split = {split: {**figures[split], **figures[split].pop("ranking", {})} for split in ("val", "test")}
    return {
        "seconds": seconds, "processor_seconds": used.ru_utime + used.ru_stime, "peak_bytes": memory.bytes,
        "figures": {split: {k: v for k, v in of.items() if isinstance(v, float)} for split, of in by_split.items()},
    }  # fmt: skip


def row_of(name: str, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the rounds; figures are those of the last."""
    medians = {key: statistics.median(each[key] for each in rounds) for key in ("seconds", "processor_seconds")}
    peak = max(each["peak_bytes"] for each in rounds)
    lines = lines_of(WAYS[name].file)
    return {
        "settings": WAYS[name].settings,
        "lines": lines,
        **medians,
        "peak_bytes": peak,
        "figures": rounds[-1]["figures"],
    }


def print_rows(rows: dict[str, dict[str, Any]], record: dict[str, Any]) -> None:
    """The table, figures in percent."""
    figures = [(split, figure) for figure in ("gap", "recall@1") for split in ("val", "test")]
    show(
        "from files to figures",
        ["way", "lines", "s", "processor s", "peak GB", *(f"{split} {figure}" for split, figure in figures)],
        [
            [
                name, row["lines"], row["seconds"], row["processor_seconds"], row["peak_bytes"] / 1e9,
                *(100 * row["figures"][split].get(figure, math.nan) for split, figure in figures),
            ]
            for name, row in rows.items()
        ],
        record | {"ways": rows},
    )  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="data root; without it the demo museum")
    parser.add_argument("--oml_python", type=Path, help="Python of an environment that has open-metric-learning")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS), help="these alone")
    parser.add_argument("--share", type=float, default=1.0, help="of the images of each split")
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.oml_python is None and OML in arguments.ways:
        arguments.ways.remove(OML)
        print(f"{OML} is left out: no --oml_python")
    RUNS.mkdir(exist_ok=True)
    root, folder = (arguments.root or make_demo(DEMO)).absolute(), Path(tempfile.mkdtemp(dir=RUNS)).absolute()
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.ways}
    try:
        root = part_of(root, arguments.share, folder / "root")
        weights = folder / "weights.pth"
        torch.save(build_embedder("lite0_in", None).backbone.model.state_dict(), weights)
        for i in range(arguments.rounds):
            for name in rounds:
                way = WAYS[name]
                python = arguments.oml_python.absolute() if name == OML else sys.executable
                measured = measure([python, way.file, root, way.engine or weights], folder / "run")
                print(f"round {i + 1}, {name}: {measured}", file=sys.stderr, flush=True)
                rounds[name].append(measured)
        rows = {name: row_of(name, of_way) for name, of_way in rounds.items()}
        print_rows(rows, {"share": arguments.share, "rounds": arguments.rounds})
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
