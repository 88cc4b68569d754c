"""``metilr compare RUN...``: finished evaluations side by side, with published figures where the row is known."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import track

from metilr.comparison_plot import METRICS, plot_comparison
from metilr.comparison_tables import costs_table, differences_table, figures_table
from metilr.data.ground_truth import QUERY_FILES
from metilr.differences import PairedDifferences, paired_differences, photographers_of
from metilr.errors import UserError
from metilr.files import write_atomically
from metilr.published import Published, published
from metilr.run_folder import make_output
from metilr.runs import Run, read_run
from metilr.terminal import printable

OF_RUNS = ("data", "notes", "elements", "geometric_check", "seconds", "peak_memory_gb")
CSV_COLUMNS = ("run", "kind", "split", "gap", "gap_minus", "acc", "k", "tau", "database", "fingerprint", "source")


def compare(runs: Sequence[Path], output: Path | None = None) -> dict[str, Any]:
    """Compare evaluations: figures on val and on test beside published ones, and paired differences.

    Writes comparison.md, .csv, .tex, .json, .png and .svg. Runs on other data get a table of their own. Differences
    are to the first run, on the same queries and the same resamples.

    Args:
        runs: Folders that evaluations wrote; the first is the baseline of the differences.
        output: Folder for the files, which replace those of an earlier comparison; without it a dated one under runs/.

    Returns:
        What comparison.json says.

    Raises:
        UserError: If a folder holds no finished evaluation or is named twice, or the output cannot be written.
    """
    console = Console(highlight=False)
    read = _read_runs(runs)
    known = {name: published(run.results) for name, run in read.items()}
    groups = _by_data(read)
    folder = make_output(output, "compare")

    tables = [figures_table(title, group, known) for title, group in groups.items()]
    differences, notes = _differences(read, console)
    if len(read) > 1:
        tables += [differences_table(split, next(iter(read)), differences, notes[split]) for split in QUERY_FILES]
    costs_known = any("seconds" in run.results for run in read.values())  # not of runs by other programs
    tables += [costs_table(title, group) for title, group in groups.items()] if costs_known else []
    if len(groups) > 1:
        console.print(f"[bold yellow]note:[/] {DIFFERENT_DATA}")
    for table in tables:
        console.print()
        console.print(table.rich())
        for note in table.notes:
            console.print(f"[bold yellow]note:[/] {escape(printable(note))}", soft_wrap=True)

    comparison = _as_json(read, known, differences)
    texts = {
        "md": "\n".join([*([DIFFERENT_DATA, ""] if len(groups) > 1 else []), *(table.markdown() for table in tables)]),
        "tex": "\n".join(["% needs \\usepackage{booktabs}", *(table.latex() for table in tables)]),
        "csv": _as_csv(read, known),
        "json": json.dumps(comparison, indent=1, allow_nan=False) + "\n",
    }
    for ending, text in texts.items():
        write_atomically(folder / f"comparison.{ending}", text)
    pictures = [folder / "comparison.png", folder / "comparison.svg"]
    results = {title: {name: run.results for name, run in group.items()} for title, group in groups.items()}
    plot_comparison(results, known, pictures)
    written = [*(folder / f"comparison.{ending}" for ending in texts), *pictures]
    console.print("wrote " + ", ".join(escape(str(file)) for file in written), soft_wrap=True)
    return comparison


DIFFERENT_DATA = "runs on other data are in a table of their own: figures of different tables do not compare"


def _read_runs(paths: Sequence[Path]) -> dict[str, Run]:
    """Read the runs by name: the folder's, or as much of its path as tells it from the others."""
    folders = [Path(path).resolve() for path in paths]
    twice = [path for path, folder in zip(paths, folders, strict=True) if folders.count(folder) > 1]
    if twice:
        raise UserError(f"{twice[0]}: named twice; name each run once")
    if not folders:
        raise UserError("no run is named; name the folders that evaluations wrote")

    def tail(folder: Path, length: int) -> str:
        return "/".join(folder.parts[-length:])

    length = 1
    while len({tail(folder, length) for folder in folders}) < len(folders):
        length += 1
    return {tail(folder, length): read_run(path) for path, folder in zip(paths, folders, strict=True)}


def _by_data(runs: Mapping[str, Run]) -> dict[str, dict[str, Run]]:
    """Group runs by the data that they were measured on, titled."""
    by_fingerprint: dict[str, dict[str, Run]] = {}
    for name, run in runs.items():
        by_fingerprint.setdefault(run.results["data"]["fingerprint"], {})[name] = run
    groups: dict[str, dict[str, Run]] = {}
    for fingerprint, group in by_fingerprint.items():
        data = next(iter(group.values())).results["data"]
        kind = "SYNTHETIC demo museum" if data["synthetic"] else data["root"]
        title = f"{kind}, {data['database']} database"
        title += f" ({fingerprint[:8]})" if title in groups else ""
        groups[title] = group
    return groups


def _differences(
    runs: Mapping[str, Run], console: Console
) -> tuple[dict[str, list[PairedDifferences]], dict[str, list[str]]]:
    """Compare each run with the first; the notes say, by split, what had to be left out."""
    (base_name, baseline), *others = runs.items()
    photographers = photographers_of(baseline) if others else None
    differences: dict[str, list[PairedDifferences]] = {}
    noted: dict[str, dict[str, list[str]]] = {split: {} for split in QUERY_FILES}
    for name, run in track(others, "differences", console=console, transient=True):
        differences[name] = paired_differences(baseline, run, photographers)
        same_data = run.results["data"]["fingerprint"] == baseline.results["data"]["fingerprint"]
        for pair in differences[name]:
            if pair.left_out:
                noted[pair.split].setdefault(f"left out, {pair.left_out}", []).append(name)
            elif not same_data:
                noted[pair.split].setdefault(f"matched against another database than {base_name}", []).append(name)
    notes = {split: [f"{note}: {', '.join(names)}" for note, names in of.items()] for split, of in noted.items()}
    if differences and photographers is None:
        for of_split in notes.values():
            of_split.append(f"the ground truth of {base_name} is not where it was, so photographers are not known")
    return differences, notes


def _as_csv(runs: Mapping[str, Run], known: Mapping[str, Sequence[Published]]) -> str:
    """One line a run and split, and one a published row; figures in [0, 1]."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for name, run in runs.items():
        data, knn = run.results["data"], run.results["knn"]
        of_run = {"run": name, "database": data["database"], "fingerprint": data["fingerprint"]}
        for split in QUERY_FILES:
            figures = {metric: run.results[split][metric] for metric in METRICS}
            writer.writerow({**of_run, "kind": "measured", "split": split, **figures, "k": knn["k"], "tau": knn["tau"]})
        for row in known[name]:
            figures = {metric: getattr(row, metric) for metric in METRICS}
            of_row = {"split": row.split, "k": row.k, "tau": row.tau, "source": row.source}
            writer.writerow({**of_run, "kind": "published", **figures, **of_row})
    return stream.getvalue()


def _as_json(
    runs: Mapping[str, Run],
    known: Mapping[str, Sequence[Published]],
    differences: Mapping[str, Sequence[PairedDifferences]],
) -> dict[str, Any]:
    return {
        "baseline": next(iter(runs)),
        "runs": [
            {
                "name": name,
                "path": str(run.path.resolve()),
                **{key: run.results.get(key) for key in (*OF_RUNS, *QUERY_FILES)},
                "knn": {key: run.results["knn"].get(key) for key in ("k", "tau", "tuned_on")},
                "published": [vars(row) for row in known[name]],
            }
            for name, run in runs.items()
        ],
        "differences": [
            {
                "run": name,
                "split": pair.split,
                "left_out": pair.left_out,
                "by_unit": {
                    unit: {metric: difference._asdict() for metric, difference in figures.items()}
                    for unit, figures in pair.differences.items()
                },
            }
            for name, pairs in differences.items()
            for pair in pairs
        ],
    }
