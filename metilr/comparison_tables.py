"""The tables of ``metilr compare``."""

from collections.abc import Mapping, Sequence
from typing import Any

from metilr.comparison_plot import METRICS
from metilr.data.ground_truth import QUERY_FILES
from metilr.differences import PairedDifferences
from metilr.published import Published
from metilr.results_table import chosen
from metilr.runs import Run
from metilr.scoring import LEVEL, headline_unit
from metilr.tables import TextTable


def figures_table(title: str, runs: Mapping[str, Run], known: Mapping[str, Sequence[Published]]) -> TextTable:
    """Put runs on the same data in the shape of the report's Tables 1 and 2, published figures under their split."""
    rows: list[list[str]] = []
    quiet = []
    for name, run in runs.items():
        knn = run.results["knn"]
        figures = [_percent(run.results[split][metric]) for split in QUERY_FILES for metric in METRICS]
        rows.append([name, str(knn["k"]), f"{knn['tau']:g}", *figures])
        for row in known[name]:
            quiet.append(len(rows))
            figures = [
                _percent(getattr(row, metric)) if split == row.split else ""
                for split in QUERY_FILES
                for metric in METRICS
            ]
            k_and_tau = ["" if value is None else f"{value:g}" for value in (row.k, row.tau)]
            rows.append([f"published ({row.split})", *k_and_tau, *figures])
    data = next(iter(runs.values())).results["data"]["counts"]
    notes = [
        f"in percent; {data['database_images']:,} database images of {data['exhibits']:,} exhibits; val "
        f"{data['val_queries']:,} queries ({data['val_met']:,} met), test "
        f"{data['test_queries']:,} ({data['test_met']:,} met)",
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
        unit = headline_unit(results) if all("intervals" in results[split] for split in QUERY_FILES) else None
        gaps = [_gap_with_interval(results[split], unit) for split in QUERY_FILES]
        seconds, memory = results.get("seconds"), results.get("peak_memory_gb")
        rows.append(
            [name, *gaps, "–" if seconds is None else f"{seconds:,.0f}", "–" if memory is None else f"{memory:.2f}"]
        )
    notes = [
        f"in brackets {100 * LEVEL:g}% intervals; seconds and memory of the whole evaluation; descriptors that an "
        "earlier run left in a store were not made again"
    ]
    header = ["run", *(f"GAP {split}" for split in QUERY_FILES), "seconds", "GB"]
    return TextTable(f"{title}: what each run took", [], header, rows, notes=notes)


def _gap_with_interval(figures: Mapping[str, Any], unit: str | None) -> str:
    if unit is None:
        return _percent(figures["gap"])
    low, high = figures["intervals"][unit]["gap"]
    return f"{_percent(figures['gap'])} ({100 * low:.0f}–{100 * high:.0f})"


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
        how = f"{chosen(run.results['knn'], with_values=False)}; test scored once"
        names.setdefault(how, []).append(name)
        for note in run.results.get("notes", []):
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
