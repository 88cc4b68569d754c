"""A bar plot of runs: GAP, GAP⁻ and ACC on val and on test, published figures as marks on their own split's bars."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from metilr.data.ground_truth import QUERY_FILES
from metilr.files import write_picture
from metilr.published import Published
from metilr.report.plots import COLOURS, plain
from metilr.scoring import LEVEL, headline_unit

METRICS = {"gap": "GAP", "gap_minus": "GAP⁻", "acc": "ACC"}
BAR = 0.26  # height of one bar, where a run takes 1
TEXT = "#333333"


def plot_comparison(
    groups: Mapping[str, Mapping[str, Mapping[str, Any]]],
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
            first = next(iter(runs.values()))[split]
            queries = f"{split}: {first['n_met']:,} met of {first['n_queries']:,} queries"
            axes.set_title(plain(f"{title if column == 0 else ''}\n{queries}"), fontsize=9, loc="left")
            axes.set_yticks(range(len(runs)), [plain(name) if column == 0 else "" for name in runs])
    for axes in panels[-1]:
        axes.set_xlabel("%")
    figure.legend(handles=_legend(groups, published), loc="outside upper center", ncols=5, frameon=False, fontsize=9)
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text stays text
        for file in files:
            write_picture(file, partial(figure.savefig, format=file.suffix[1:]))


def _draw_bars(
    axes: Axes, split: str, runs: Mapping[str, Mapping[str, Any]], published: Mapping[str, Sequence[Published]]
) -> None:
    for y, (name, results) in enumerate(runs.items()):
        unit = _unit(results)
        for i, (metric, colour) in enumerate(zip(METRICS, COLOURS, strict=False)):
            place, value = y + (i - 1) * BAR, 100 * results[split][metric]
            axes.barh(place, value, height=0.92 * BAR, color=colour)
            if unit is not None:
                interval = [100 * end for end in results[split]["intervals"][unit][metric]]
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


def _legend(
    groups: Mapping[str, Mapping[str, Mapping[str, Any]]], published: Mapping[str, Sequence[Published]]
) -> list[Any]:
    handles: list[Any] = [
        Patch(color=colour, label=label) for label, colour in zip(METRICS.values(), COLOURS, strict=False)
    ]
    units = {_unit(results) for runs in groups.values() for results in runs.values()} - {None}
    if units:
        label = f"{100 * LEVEL:g}% interval, bootstrap over {' or '.join(sorted(map(str, units)))}"
        handles.append(Line2D([], [], color=TEXT, linewidth=0.9, label=label))
    if any(published.values()):
        mark = {"marker": "D", "linestyle": "", "markerfacecolor": "white", "markeredgecolor": TEXT}
        handles.append(Line2D([], [], label="published, on the same split", **mark))  # type: ignore[arg-type]
    return handles


def _unit(results: Mapping[str, Any]) -> str | None:
    """What the intervals in ``results.json`` draw; None where it has none, as of an older metilr."""
    return headline_unit(results) if all("intervals" in results[split] for split in QUERY_FILES) else None
