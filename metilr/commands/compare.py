"""``metilr compare RUN...``: finished evaluations side by side, with published figures where the row is known."""

import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.markup import escape

from metilr.data.ground_truth import NOT_NAMED, QUERY_FILES, load_ground_truth, nfc
from metilr.data.tables import as_csv
from metilr.errors import UserError
from metilr.evaluation.read_run import Run, read_run
from metilr.evaluation.results import FIGURES, LEVEL, UNITS, Figures
from metilr.evaluation.runs import RUNS, make_output
from metilr.files import write_atomically
from metilr.metrics.bootstrap import Difference, paired_intervals, resampling_units
from metilr.progress import make_console, printable, tracked
from metilr.report.published import Published, published
from metilr.report.tables import DRAWN, METRICS, TextTable, calibrated, chosen

OF_RUNS = (  # in the JSON
    *("data", "notes", "elements", "geometric_check", "confidence", "seconds", "rows", "peak_memory_gb"),
    *QUERY_FILES,
)
CSV_COLUMNS = ("run", "kind", "split", *FIGURES, "k", "tau", "database", "fingerprint", "source")
DIFFERENT_DATA = "runs on other data are in a table of their own: figures of different tables do not compare"


def compare(runs: Sequence[Path], output: Path | None = None) -> dict[str, Any]:
    """Compare evaluations with each other and with published figures.

    Writes comparison.md, .csv, .tex, .json, .png and .svg. Runs on other data get a table of their own. Differences
    are to the first run, on the same queries and the same resamples.

    Args:
        runs: Folders that evaluations wrote; the first is the baseline of the differences.
        output: Folder for the files, which replace those of an earlier comparison; without it a dated one under runs/.
    """
    console = make_console()
    read = _read_runs(runs)
    from metilr.report.plots import plot_comparison  # matplotlib, which takes a second

    known = {name: published(run.results) for name, run in read.items()}
    groups = _by_data(read)
    folder = make_output(output, "compare")

    tables = [_figures_table(title, group, known) for title, group in groups.items()]
    (baseline_name, baseline), *others = read.items()
    photographers = photographers_of(baseline) if others else None
    differences = [
        (name, pair)
        for name, run in tracked(others, "differences", len(others), "runs")
        for pair in paired_differences(baseline, run, photographers)
    ]
    if others:
        gone = f"the ground truth of {baseline_name} is not where it was, so photographers are not known"
        notes = [gone] if photographers is None else []
        tables += [_differences_table(split, read, differences, notes) for split in QUERY_FILES]
    if any(run.results.seconds is not None for run in read.values()):  # not of runs by other programs
        tables += [_costs_table(title, group) for title, group in groups.items()]
    remarks = [DIFFERENT_DATA] if len(groups) > 1 else []
    remarks += [f"{table.title}: {note}" for table in tables if not table.rows for note in table.notes]
    tables = [table for table in tables if table.rows]
    for remark in remarks:
        console.print(f"[bold yellow]note:[/] {escape(printable(remark))}")
    for table in tables:
        console.print()
        console.print(table.rich(), soft_wrap=False)
        for note in table.notes:
            console.print(f"[bold yellow]note:[/] {escape(printable(note))}")

    comparison = _as_json(read, known, differences)
    texts = {
        "md": "\n".join([*(f"{printable(remark)}\n" for remark in remarks), *(table.markdown() for table in tables)]),
        "tex": "\n".join(["% needs \\usepackage{booktabs}", *(table.latex() for table in tables)]),
        "csv": _as_csv(read, known),
        "json": json.dumps(comparison, indent=1, allow_nan=False) + "\n",
    }
    written = [folder / f"comparison.{ending}" for ending in (*texts, "png", "svg")]
    for file, text in zip(written, texts.values(), strict=False):
        write_atomically(file, text)
    results = {title: {name: run.results for name, run in group.items()} for title, group in groups.items()}
    plot_comparison(results, known, written[len(texts) :])
    for file in written:
        console.print(f"wrote {escape(str(file))}")
    return comparison


def _read_runs(paths: Sequence[Path]) -> dict[str, Run]:
    """Read the runs by name: the folder's, or as much of its path as tells it from the others."""
    folders = [Path(os.path.realpath(path)) for path in paths]  # which takes links in a circle, too
    if not folders:
        raise UserError("no run is named; name the folders that evaluations wrote")
    if twice := [path for path, folder in zip(paths, folders, strict=True) if folders.count(folder) > 1]:
        raise UserError(f"{twice[0]}: named twice; name each run once")
    length = 1
    while len({folder.parts[-length:] for folder in folders}) < len(folders):
        length += 1
    return {"/".join(folder.parts[-length:]): read_run(path) for path, folder in zip(paths, folders, strict=True)}


def _by_data(runs: Mapping[str, Run]) -> dict[str, dict[str, Run]]:
    """Group runs by the data that they were measured on, titled."""
    titles: dict[str, str] = {}  # by fingerprint
    groups: dict[str, dict[str, Run]] = defaultdict(dict)
    for name, run in runs.items():
        data = run.results.data
        title = f"{'SYNTHETIC demo museum' if data.synthetic else data.root}, {data.database} database"
        title += f" ({data.fingerprint[:8]})" if title in titles.values() else ""
        groups[titles.setdefault(data.fingerprint, title)][name] = run
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
        if [*map(nfc, first.paths)] != [*map(nfc, second.paths)] or not np.array_equal(target, second.exhibit_ids):
            compared.append(PairedDifferences(split, {}, "measured on other queries"))
            continue
        taken_by = np.full(len(target), NOT_NAMED) if photographers is None else photographers[split]
        units = resampling_units(target, taken_by)
        before, after = ((answers.log_confidence, answers.predicted_ids) for answers in (first, second))
        of = {
            unit: paired_intervals(before, after, target, units[unit], level=LEVEL) for unit in UNITS if unit in units
        }
        compared.append(PairedDifferences(split, of, None if of else "too few met queries for an interval"))
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


def _figures_table(title: str, runs: Mapping[str, Run], known: Mapping[str, Sequence[Published]]) -> TextTable:
    """Put runs on the same data in the shape of the report's Tables 1 and 2, published figures under their split."""
    rows, quiet = [], []
    true_of: dict[str, list[str]] = defaultdict(list)  # what the evaluations themselves noted, each thing once
    for name, run in runs.items():
        knn, splits = run.results.knn, run.results.splits
        rows.append([name, str(knn.k), f"{knn.tau:g}", *(cell for split in splits.values() for cell in _cells(split))])
        of_splits = [row.split for row in known[name]]
        for row in known[name]:
            source = f", {row.source}" if of_splits.count(row.split) > 1 else ""  # where several are of one split
            quiet.append(len(rows))
            figures = [cell for split in splits for cell in (_cells(row) if split == row.split else [""] * 3)]
            k_and_tau = ["" if value is None else f"{value:g}" for value in (row.k, row.tau)]
            rows.append([f"published ({row.split}{source})", *k_and_tau, *figures])
        confidence = run.results.confidence
        notes = [] if confidence is None else [calibrated(confidence)]
        for note in (f"{chosen(knn, with_values=False)}; test scored once", *notes, *run.results.notes):
            true_of[note].append(name)
    counts = next(iter(runs.values())).results.data.counts
    notes = [
        f"in percent; {counts['database_images']:,} database images of {counts['exhibits']:,} exhibits; "
        f"val {counts['val_queries']:,} queries ({counts['val_met']:,} met), "
        f"test {counts['test_queries']:,} ({counts['test_met']:,} met)"
    ]
    if sources := dict.fromkeys(f"published ({row.split}): {row.source}" for name in runs for row in known[name]):
        misnamed = "; the report's tables say test, but were measured on val" if "report" in "".join(sources) else ""
        notes.append(f"{'; '.join(sources)}; each under the split that it was measured on{misnamed}")
    notes += [f"{note} ({'all runs' if len(of) == len(runs) else ', '.join(of)})" for note, of in true_of.items()]
    spans = [("", 3), *((split, len(METRICS)) for split in QUERY_FILES)]
    header = ["run", "k", "τ", *METRICS.values(), *METRICS.values()]
    return TextTable(title, spans, header, rows, frozenset(quiet), notes)


def _cells(figures: Figures | Published) -> list[str]:
    return ["" if (value := getattr(figures, metric)) is None else f"{100 * value:.2f}" for metric in METRICS]


def _costs_table(title: str, runs: Mapping[str, Run]) -> TextTable:
    """Put beside each run's GAP its interval, and what the run took."""
    rows = []
    for name, run in runs.items():
        results, cells = run.results, [name]
        for figures in results.splits.values():
            ends = [100 * end for end in figures.intervals[results.unit]["gap"]] if results.unit else None
            cells.append(f"{100 * figures.gap:.2f}" + (f" ({ends[0]:.0f}–{ends[1]:.0f})" if ends else ""))
        cells.append("–" if results.seconds is None else f"{results.seconds:,.0f}")
        cells.append(f"{results.rows['reused']:,} of {results.rows['all']:,}" if results.rows else "–")
        cells.append("–" if results.peak_memory_gb is None else f"{results.peak_memory_gb:.2f}")
        rows.append(cells)
    notes = [
        f"in brackets {100 * LEVEL:g}% intervals; seconds and memory from the data to the figures, without report and "
        "W&B; rows are descriptors: reused ones were there before, and took none of the seconds; nor do local features "
        "that an earlier geometric check has kept"
    ]
    header = ["run", *(f"GAP {split}" for split in QUERY_FILES), "seconds", "rows reused", "GB"]
    return TextTable(f"{title}: what each run took", [], header, rows, notes=notes)


def _differences_table(
    split: str, runs: Mapping[str, Run], differences: Sequence[tuple[str, PairedDifferences]], notes: Sequence[str]
) -> TextTable:
    """Put the differences to the first run on one split in a table, each with the widest interval of all units."""
    base_name, baseline = next(iter(runs.items()))
    rows: list[list[str]] = []
    units: dict[str, None] = {}
    true_of: dict[str, list[str]] = defaultdict(list)
    for name, (of_split, by_unit, left_out) in differences:
        if of_split != split:
            continue
        if by_unit:
            unit = max(by_unit, key=lambda unit: np.ptp(by_unit[unit]["gap"][1:]))
            rows.append([name, *(_with_interval(by_unit[unit][metric]) for metric in METRICS)])
            units[unit] = None
        if left_out:
            true_of[f"left out, {left_out}"].append(name)
        elif runs[name].results.data.fingerprint != baseline.results.data.fingerprint:
            other = f"of another data set than {base_name} (its database, or the queries of another split)"
            true_of[other].append(name)
    drawn = f"draw, with repeats, {' or '.join(DRAWN[unit] for unit in units)}, and single distractors"
    within = f"the difference of {100 * LEVEL:g} of 100 resamples, the same of both runs, lies within; they {drawn}"
    explained = [f"in points, in brackets {100 * LEVEL:g}% intervals: {within}"] if rows else []
    notes = [*explained, *(f"{note}: {', '.join(names)}" for note, names in true_of.items()), *notes]
    return TextTable(f"{split}: difference to {base_name}", [], ["run", *METRICS.values()], rows, notes=notes)


def _with_interval(difference: Difference) -> str:
    value, low, high = (f"{100 * each:+.1f}" for each in difference)
    text = f"{value} ({low.lstrip('+')}, {high.lstrip('+')})"
    return text.replace("+0.0 ", "0.0 ").replace("-0.0", "0.0").replace("-", "−")


def _as_csv(runs: Mapping[str, Run], known: Mapping[str, Sequence[Published]]) -> str:
    """One line a run and split, and one a published row; figures in [0, 1]."""
    rows: list[dict[str, Any]] = []
    for name, run in runs.items():
        data, knn = run.results.data, run.results.knn
        of_run = {"run": name, "database": data.database, "fingerprint": data.fingerprint}
        for split, figures in run.results.splits.items():
            measured = {"kind": "measured", "split": split, "k": knn.k, "tau": knn.tau}
            rows.append({**figures.model_dump(include=set(FIGURES)), **of_run, **measured})
        rows += [{**vars(row), **of_run, "kind": "published"} for row in known[name]]
    return as_csv([CSV_COLUMNS, *([row.get(column, "") for column in CSV_COLUMNS] for row in rows)])


def _as_json(
    runs: Mapping[str, Run],
    known: Mapping[str, Sequence[Published]],
    differences: Sequence[tuple[str, PairedDifferences]],
) -> dict[str, Any]:
    of_runs = []
    for name, run in runs.items():
        recorded = run.results.recorded()
        parts = {key: recorded.get(key) for key in OF_RUNS}
        knn = run.results.knn.model_dump(include={"k", "tau", "tuned_on"})
        rows = [vars(row) for row in known[name]]
        of_runs.append({"name": name, "path": str(run.path.resolve()), **parts, "knn": knn, "published": rows})
    of_pairs = []
    for name, (split, by_unit, left_out) in differences:
        plain = {unit: {metric: each._asdict() for metric, each in of.items()} for unit, of in by_unit.items()}
        of_pairs.append({"run": name, "split": split, "left_out": left_out, "by_unit": plain})
    return {"baseline": next(iter(runs)), "runs": of_runs, "differences": of_pairs}
