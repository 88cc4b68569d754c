"""``metilr compare RUN...``: finished evaluations side by side, with published figures where the row is known."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.markup import escape

from metilr.data.ground_truth import NOT_NAMED, QUERY_FILES, load_ground_truth
from metilr.errors import UserError
from metilr.evaluation.results import FIGURES, LEVEL, UNITS, Run, read_run
from metilr.evaluation.runs import RUNS, make_output
from metilr.files import write_atomically
from metilr.metrics.bootstrap import Difference, paired_intervals, resampling_units
from metilr.progress import printable, tracked
from metilr.report.published import Published, published
from metilr.report.tables import METRICS, TextTable, chosen

OF_RUNS = ("data", "notes", "elements", "geometric_check", "seconds", "peak_memory_gb", *QUERY_FILES)  # in the JSON
CSV_COLUMNS = ("run", "kind", "split", *FIGURES, "k", "tau", "database", "fingerprint", "source")
DIFFERENT_DATA = "runs on other data are in a table of their own: figures of different tables do not compare"


def compare(runs: Sequence[Path], output: Path | None = None) -> dict[str, Any]:
    """Compare evaluations with each other and with published figures.

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
    from metilr.report.plots import plot_comparison  # matplotlib, which help does not need

    console = Console(highlight=False)
    read = _read_runs(runs)
    known = {name: published(run.results) for name, run in read.items()}
    groups = _by_data(read)
    folder = make_output(output, "compare")

    tables = [figures_table(title, group, known) for title, group in groups.items()]
    differences, notes = _differences(read)
    if len(read) > 1:
        tables += [differences_table(split, next(iter(read)), differences, notes[split]) for split in QUERY_FILES]
    if any(run.results.seconds is not None for run in read.values()):  # not of runs by other programs
        tables += [costs_table(title, group) for title, group in groups.items()]
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


def _read_runs(paths: Sequence[Path]) -> dict[str, Run]:
    """Read the runs by name: the folder's, or as much of its path as tells it from the others."""
    folders = [Path(path).resolve() for path in paths]
    twice = [path for path, folder in zip(paths, folders, strict=True) if folders.count(folder) > 1]
    if twice:
        raise UserError(f"{twice[0]}: named twice; name each run once")
    if not folders:
        raise UserError("no run is named; name the folders that evaluations wrote")
    length = 1
    while len({folder.parts[-length:] for folder in folders}) < len(folders):
        length += 1
    return {"/".join(folder.parts[-length:]): read_run(path) for path, folder in zip(paths, folders, strict=True)}


def _by_data(runs: Mapping[str, Run]) -> dict[str, dict[str, Run]]:
    """Group runs by the data that they were measured on, titled."""
    by_fingerprint: dict[str, dict[str, Run]] = {}
    for name, run in runs.items():
        by_fingerprint.setdefault(run.results.data.fingerprint, {})[name] = run
    groups: dict[str, dict[str, Run]] = {}
    for fingerprint, group in by_fingerprint.items():
        data = next(iter(group.values())).results.data
        title = f"{'SYNTHETIC demo museum' if data.synthetic else data.root}, {data.database} database"
        groups[title + (f" ({fingerprint[:8]})" if title in groups else "")] = group
    return groups


class PairedDifferences(NamedTuple):
    """How much better a run is than the baseline on one split, by unit of the resampling and by metric."""

    split: str
    by_unit: Mapping[str, Mapping[str, Difference]]
    left_out: str | None = None  # why there are none


def paired_differences(
    baseline: Run, run: Run, photographers: Mapping[str, np.ndarray] | None
) -> list[PairedDifferences]:
    """Subtract the baseline's figures from the run's, on val and on test, wherever both answered the same queries.

    ``photographers`` says who took each query, by split; None where that is not known.
    """
    compared = []
    for split in QUERY_FILES:
        first, second = baseline.answers[split], run.answers[split]
        target = first.exhibit_ids
        if first.paths != second.paths or not np.array_equal(target, second.exhibit_ids):
            compared.append(PairedDifferences(split, {}, "measured on other queries"))
            continue
        taken_by = np.full(len(target), NOT_NAMED) if photographers is None else photographers[split]
        units = resampling_units(target, taken_by)
        before, after = ((answers.log_confidence, answers.predicted_ids) for answers in (first, second))
        by_unit = {
            unit: paired_intervals(before, after, target, units[unit], level=LEVEL) for unit in UNITS if unit in units
        }
        left_out = None if by_unit else "too few met queries for an interval"
        compared.append(PairedDifferences(split, by_unit, left_out))
    return compared


def photographers_of(run: Run) -> Mapping[str, np.ndarray] | None:
    """Who took the queries, from the ground truth where the run found it; None if that is gone or has changed."""
    root, data = run.config.get("root"), run.results.data
    if root is None:  # the demo's
        root = Path(run.results.directory) / RUNS / data.root
    try:
        ground_truth = load_ground_truth(Path(root), data.database)
    except UserError:
        return None
    return ground_truth.photographers if ground_truth.fingerprint() == data.fingerprint else None


def _differences(runs: Mapping[str, Run]) -> tuple[dict[str, list[PairedDifferences]], dict[str, list[str]]]:
    """Compare each run with the first; the notes say, by split, what had to be left out."""
    (base_name, baseline), *others = runs.items()
    photographers = photographers_of(baseline) if others else None
    differences: dict[str, list[PairedDifferences]] = {}
    noted: dict[str, dict[str, list[str]]] = {split: {} for split in QUERY_FILES}
    for name, run in tracked(others, "differences", len(others), "runs"):
        differences[name] = paired_differences(baseline, run, photographers)
        same_data = run.results.data.fingerprint == baseline.results.data.fingerprint
        for pair in differences[name]:
            if pair.left_out:
                noted[pair.split].setdefault(f"left out, {pair.left_out}", []).append(name)
            elif not same_data:
                noted[pair.split].setdefault(f"matched against another database than {base_name}", []).append(name)
    notes = {split: [f"{note}: {', '.join(names)}" for note, names in of.items()] for split, of in noted.items()}
    if others and photographers is None:
        for of_split in notes.values():
            of_split.append(f"the ground truth of {base_name} is not where it was, so photographers are not known")
    return differences, notes


def figures_table(title: str, runs: Mapping[str, Run], known: Mapping[str, Sequence[Published]]) -> TextTable:
    """Put runs on the same data in the shape of the report's Tables 1 and 2, published figures under their split."""
    rows, quiet = [], []
    for name, run in runs.items():
        knn, splits = run.results.knn, run.results.splits.values()
        figures = [f"{100 * getattr(of_split, metric):.2f}" for of_split in splits for metric in METRICS]
        rows.append([name, str(knn.k), f"{knn.tau:g}", *figures])
        for row in known[name]:
            quiet.append(len(rows))
            of_row = [f"{100 * getattr(row, metric):.2f}" for metric in METRICS]
            figures = [*of_row, "", "", ""] if row.split == "val" else ["", "", "", *of_row]
            k_and_tau = ["" if value is None else f"{value:g}" for value in (row.k, row.tau)]
            rows.append([f"published ({row.split})", *k_and_tau, *figures])
    counts = next(iter(runs.values())).results.data.counts
    sources = dict.fromkeys(f"published ({row.split}): {row.source}" for name in runs for row in known[name])
    true_of: dict[str, list[str]] = {}  # what the evaluations themselves noted, each thing once
    for name, run in runs.items():
        for note in (f"{chosen(run.results.knn, with_values=False)}; test scored once", *run.results.notes):
            true_of.setdefault(note, []).append(name)
    notes = [
        f"in percent; {counts['database_images']:,} database images of {counts['exhibits']:,} exhibits; "
        f"val {counts['val_queries']:,} queries ({counts['val_met']:,} met), "
        f"test {counts['test_queries']:,} ({counts['test_met']:,} met)"
    ]
    if sources:
        misnamed = "the report's tables say test, but were measured on val"
        notes.append(f"{'; '.join(sources)}; each under the split that it was measured on; {misnamed}")
    notes += [f"{note} ({'all runs' if len(of) == len(runs) else ', '.join(of)})" for note, of in true_of.items()]
    spans = [("", 3), *((split, len(METRICS)) for split in QUERY_FILES)]
    header = ["run", "k", "τ", *METRICS.values(), *METRICS.values()]
    return TextTable(title, spans, header, rows, frozenset(quiet), notes)


def costs_table(title: str, runs: Mapping[str, Run]) -> TextTable:
    """Put beside each run's GAP its interval, and what the run took."""
    rows = []
    for name, run in runs.items():
        results, cells = run.results, [name]
        for figures in results.splits.values():
            ends = [100 * end for end in figures.intervals[results.unit]["gap"]] if results.unit else None
            cells.append(f"{100 * figures.gap:.2f}" + (f" ({ends[0]:.0f}–{ends[1]:.0f})" if ends else ""))
        cells.append("–" if results.seconds is None else f"{results.seconds:,.0f}")
        cells.append("–" if results.peak_memory_gb is None else f"{results.peak_memory_gb:.2f}")
        rows.append(cells)
    notes = [
        f"in brackets {100 * LEVEL:g}% intervals; seconds and memory of the whole evaluation; descriptors that an "
        "earlier run left in a store were not made again"
    ]
    header = ["run", *(f"GAP {split}" for split in QUERY_FILES), "seconds", "GB"]
    return TextTable(f"{title}: what each run took", [], header, rows, notes=notes)


def differences_table(
    split: str, base_name: str, differences: Mapping[str, Sequence[PairedDifferences]], notes: Sequence[str]
) -> TextTable:
    """Put the differences to the baseline on one split in a table, each with the widest interval of all units."""
    rows = []
    drawn: dict[str, None] = {}
    for name, pairs in differences.items():
        for pair in pairs:
            if pair.split == split and pair.by_unit:
                unit = max(pair.by_unit, key=lambda unit: np.ptp(pair.by_unit[unit]["gap"][1:]))
                rows.append([name, *(_with_interval(pair.by_unit[unit][metric]) for metric in METRICS)])
                drawn[unit] = None
    explained = f"in points, in brackets {100 * LEVEL:g}% intervals: paired bootstrap over {' or '.join(drawn)}"
    notes = [*([f"{explained} and distractors"] if rows else []), *notes]
    return TextTable(f"{split}: difference to {base_name}", [], ["run", *METRICS.values()], rows, notes=notes)


def _with_interval(difference: Difference) -> str:
    value, low, high = (f"{100 * each:+.1f}" for each in difference)
    text = f"{value} ({low.lstrip('+')}, {high.lstrip('+')})"
    return text.replace("+0.0 ", "0.0 ").replace("-0.0", "0.0").replace("-", "−")


def _as_csv(runs: Mapping[str, Run], known: Mapping[str, Sequence[Published]]) -> str:
    """One line a run and split, and one a published row; figures in [0, 1]."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for name, run in runs.items():
        data, knn = run.results.data, run.results.knn
        of_run = {"run": name, "database": data.database, "fingerprint": data.fingerprint}
        for split, figures in run.results.splits.items():
            measured = {"kind": "measured", "split": split, "k": knn.k, "tau": knn.tau}
            writer.writerow({**figures.model_dump(include=set(FIGURES)), **of_run, **measured})
        writer.writerows({**vars(row), **of_run, "kind": "published"} for row in known[name])
    return stream.getvalue()


def _as_json(
    runs: Mapping[str, Run],
    known: Mapping[str, Sequence[Published]],
    differences: Mapping[str, Sequence[PairedDifferences]],
) -> dict[str, Any]:
    of_runs = []
    for name, run in runs.items():
        recorded = run.results.recorded()
        parts = {key: recorded.get(key) for key in OF_RUNS}
        knn = run.results.knn.model_dump(include={"k", "tau", "tuned_on"})
        rows = [vars(row) for row in known[name]]
        of_runs.append({"name": name, "path": str(run.path.resolve()), **parts, "knn": knn, "published": rows})
    of_pairs = []
    for name, pairs in differences.items():
        for split, by_unit, left_out in pairs:
            plain = {unit: {metric: each._asdict() for metric, each in of.items()} for unit, of in by_unit.items()}
            of_pairs.append({"run": name, "split": split, "left_out": left_out, "by_unit": plain})
    return {"baseline": next(iter(runs)), "runs": of_runs, "differences": of_pairs}
