"""``metilr compare RUN...``: finished evaluations side by side, with published figures where the row is known."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from rich.console import Console
from rich.markup import escape
from rich.progress import track

from metilr.commands.differences import PairedDifferences, paired_differences, photographers_of
from metilr.data.ground_truth import QUERY_FILES
from metilr.errors import UserError
from metilr.evaluation.results import LEVEL, Figures, Results
from metilr.evaluation.runs import Run, make_output, read_run
from metilr.files import write_atomically, write_picture
from metilr.progress import printable
from metilr.report.plots import COLOURS, plain
from metilr.report.published import Published, published
from metilr.report.tables import TextTable, chosen

METRICS = {"gap": "GAP", "gap_minus": "GAP⁻", "acc": "ACC"}
BAR = 0.26  # height of one bar, where a run takes 1
TEXT = "#333333"


def plot_comparison(
    groups: Mapping[str, Mapping[str, Results]],
    published: Mapping[str, Sequence[Published]],
    files: Sequence[Path],
) -> None:
    """Draw runs as groups of bars, val on the left and test on the right, runs on other data in a row of their own.

    Args:
        groups: By title of the data, by name of the run: what ``results.json`` says.
        published: By name of the run.
        files: What to write, .png or .svg.
    """
    heights = [len(runs) for runs in groups.values()]
    height = 1.1 + 0.62 * sum(heights) + 0.55 * len(groups)
    figure = Figure(figsize=(9, height), dpi=160, layout="constrained")
    panels = figure.subplots(len(groups), 2, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})
    for row, (title, runs) in enumerate(groups.items()):
        for column, split in enumerate(QUERY_FILES):
            axes = panels[row, column]
            _draw_bars(axes, split, runs, published)
            first = next(iter(runs.values())).splits[split]
            queries = f"{split}: {first.n_met:,} met of {first.n_queries:,} queries"
            axes.set_title(plain(f"{title if column == 0 else ''}\n{queries}"), fontsize=9, loc="left")
            axes.set_yticks(range(len(runs)), [plain(name) if column == 0 else "" for name in runs])
    for axes in panels[-1]:
        axes.set_xlabel("%")
    figure.legend(handles=_legend(groups, published), loc="outside upper center", ncols=5, frameon=False, fontsize=9)
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text stays text
        for file in files:
            write_picture(file, partial(figure.savefig, format=file.suffix[1:]))


def _draw_bars(
    axes: Axes, split: str, runs: Mapping[str, Results], published: Mapping[str, Sequence[Published]]
) -> None:
    for y, (name, results) in enumerate(runs.items()):
        unit = results.unit
        for i, (metric, colour) in enumerate(zip(METRICS, COLOURS, strict=False)):
            place, value = y + (i - 1) * BAR, 100 * getattr(results.splits[split], metric)
            axes.barh(place, value, height=0.92 * BAR, color=colour)
            if unit is not None:
                interval = [100 * end for end in getattr(results.splits[split].intervals[unit], metric)]
                axes.plot(interval, [place, place], color=TEXT, linewidth=0.9, solid_capstyle="butt")
            for row in published[name]:
                if row.split == split:
                    mark = 100 * getattr(row, metric)
                    axes.plot(mark, place, "D", markersize=5.5, markerfacecolor="white", markeredgecolor=TEXT, zorder=3)
            axes.text(102, place, f"{value:.1f}", va="center", fontsize=7.5, color=TEXT)  # a column beside the bars
    axes.set(xlim=(0, 100), ylim=(len(runs) - 0.5, -0.5))
    axes.set_xticks(range(0, 101, 20))
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _legend(groups: Mapping[str, Mapping[str, Results]], published: Mapping[str, Sequence[Published]]) -> list[Any]:
    handles: list[Any] = [
        Patch(color=colour, label=label) for label, colour in zip(METRICS.values(), COLOURS, strict=False)
    ]
    units = {results.unit for runs in groups.values() for results in runs.values()} - {None}
    if units:
        label = f"{100 * LEVEL:g}% interval, bootstrap over {' or '.join(sorted(map(str, units)))}"
        handles.append(Line2D([], [], color=TEXT, linewidth=0.9, label=label))
    if any(published.values()):
        mark = {"marker": "D", "linestyle": "", "markerfacecolor": "white", "markeredgecolor": TEXT}
        handles.append(Line2D([], [], label="published, on the same split", **mark))  # type: ignore[arg-type]
    return handles


def figures_table(title: str, runs: Mapping[str, Run], known: Mapping[str, Sequence[Published]]) -> TextTable:
    """Put runs on the same data in the shape of the report's Tables 1 and 2, published figures under their split."""
    rows: list[list[str]] = []
    quiet = []
    for name, run in runs.items():
        knn = run.results.knn
        figures = [_percent(getattr(run.results.splits[split], metric)) for split in QUERY_FILES for metric in METRICS]
        rows.append([name, str(knn.k), f"{knn.tau:g}", *figures])
        for row in known[name]:
            quiet.append(len(rows))
            figures = [
                _percent(getattr(row, metric)) if split == row.split else ""
                for split in QUERY_FILES
                for metric in METRICS
            ]
            k_and_tau = ["" if value is None else f"{value:g}" for value in (row.k, row.tau)]
            rows.append([f"published ({row.split})", *k_and_tau, *figures])
    data = next(iter(runs.values())).results.data.counts
    notes = [
        f"in percent; {data.database_images:,} database images of {data.exhibits:,} exhibits; val "
        f"{data.val_queries:,} queries ({data.val_met:,} met), test "
        f"{data.test_queries:,} ({data.test_met:,} met)",
        *_sources([row for name in runs for row in known[name]]),
        *_notes_of_runs(runs),
    ]
    spans = [("", 3), *((split, len(METRICS)) for split in QUERY_FILES)]
    header = ["run", "k", "τ", *METRICS.values(), *METRICS.values()]
    return TextTable(title, spans, header, rows, frozenset(quiet), notes)


def costs_table(title: str, runs: Mapping[str, Run]) -> TextTable:
    """Put beside each run's GAP its interval, and what the run took."""
    rows = []
    for name, run in runs.items():
        results = run.results
        unit = results.unit
        gaps = [_gap_with_interval(figures, unit) for figures in results.splits.values()]
        seconds, memory = results.seconds, results.peak_memory_gb
        rows.append(
            [name, *gaps, "–" if seconds is None else f"{seconds:,.0f}", "–" if memory is None else f"{memory:.2f}"]
        )
    notes = [
        f"in brackets {100 * LEVEL:g}% intervals; seconds and memory of the whole evaluation; descriptors that an "
        "earlier run left in a store were not made again"
    ]
    header = ["run", *(f"GAP {split}" for split in QUERY_FILES), "seconds", "GB"]
    return TextTable(f"{title}: what each run took", [], header, rows, notes=notes)


def _gap_with_interval(figures: Figures, unit: str | None) -> str:
    if unit is None:
        return _percent(figures.gap)
    low, high = figures.intervals[unit].gap
    return f"{_percent(figures.gap)} ({100 * low:.0f}–{100 * high:.0f})"


def _sources(rows: Sequence[Published]) -> list[str]:
    """Where published figures are from."""
    sources = dict.fromkeys(f"published ({row.split}): {row.source}" for row in rows)
    if not sources:
        return []
    misnamed = "; the report's tables say test, but were measured on val"
    return [f"{'; '.join(sources)}; each under the split that it was measured on{misnamed}"]


def _notes_of_runs(runs: Mapping[str, Run]) -> list[str]:
    """What the evaluations themselves noted, each thing once with the runs that it is true of."""
    names: dict[str, list[str]] = {}
    for name, run in runs.items():
        how = f"{chosen(run.results.knn, with_values=False)}; test scored once"
        names.setdefault(how, []).append(name)
        for note in run.results.notes:
            names.setdefault(note, []).append(name)
    return [f"{note} ({'all runs' if len(of) == len(runs) else ', '.join(of)})" for note, of in names.items()]


def differences_table(
    split: str, base_name: str, differences: Mapping[str, Sequence[PairedDifferences]], notes: Sequence[str]
) -> TextTable:
    """Put the paired differences to ``base_name`` on one split in a table, with the widest intervals of all units."""
    rows = []
    drawn: dict[str, None] = {}
    for name, pairs in differences.items():
        for pair in pairs:
            if pair.split == split and pair.differences:
                unit, figures = max(pair.differences.items(), key=_width)  # the widest; comparison.json has all
                rows.append([name, *(_with_interval(figures[metric]) for metric in METRICS)])
                drawn[unit] = None
    interval = f"in brackets {100 * LEVEL:g}% intervals"
    explained = f"in points, {interval}: paired bootstrap over {' or '.join(drawn)} and distractors"
    notes = [*([explained] if rows else []), *notes]
    return TextTable(f"{split}: difference to {base_name}", [], ["run", *METRICS.values()], rows, notes=notes)


def _width(of_unit: tuple[str, Mapping[str, Sequence[float]]]) -> float:
    _, low, high = of_unit[1]["gap"]
    return high - low


def _with_interval(difference: Sequence[float]) -> str:
    value, low, high = (f"{100 * each:+.1f}" for each in difference)
    text = f"{value} ({low.lstrip('+')}, {high.lstrip('+')})"
    return text.replace("+0.0 ", "0.0 ").replace("-0.0", "0.0").replace("-", "−")


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


OF_RUNS = ("data", "notes", "elements", "geometric_check", "seconds", "peak_memory_gb")
CSV_COLUMNS = ("run", "kind", "split", "gap", "gap_minus", "acc", "k", "tau", "database", "fingerprint", "source")


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
    console = Console(highlight=False)
    read = _read_runs(runs)
    known = {name: published(run.results) for name, run in read.items()}
    groups = _by_data(read)
    folder = make_output(output, "compare")

    tables = [figures_table(title, group, known) for title, group in groups.items()]
    differences, notes = _differences(read, console)
    if len(read) > 1:
        tables += [differences_table(split, next(iter(read)), differences, notes[split]) for split in QUERY_FILES]
    costs_known = any(run.results.seconds is not None for run in read.values())  # not of runs by other programs
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
        by_fingerprint.setdefault(run.results.data.fingerprint, {})[name] = run
    groups: dict[str, dict[str, Run]] = {}
    for fingerprint, group in by_fingerprint.items():
        data = next(iter(group.values())).results.data
        kind = "SYNTHETIC demo museum" if data.synthetic else data.root
        title = f"{kind}, {data.database} database"
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
        same_data = run.results.data.fingerprint == baseline.results.data.fingerprint
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
        data, knn = run.results.data, run.results.knn
        of_run = {"run": name, "database": data.database, "fingerprint": data.fingerprint}
        for split in QUERY_FILES:
            figures = {metric: getattr(run.results.splits[split], metric) for metric in METRICS}
            writer.writerow({**of_run, "kind": "measured", "split": split, **figures, "k": knn.k, "tau": knn.tau})
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
                **{key: run.results.recorded().get(key) for key in (*OF_RUNS, *QUERY_FILES)},
                "knn": run.results.knn.model_dump(include={"k", "tau", "tuned_on"}),
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
