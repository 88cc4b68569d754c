"""Plots of the figures, as SVG in the text colour of a page that is light or dark, or as PNG."""

import io
import itertools
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from metilr.data.ground_truth import MET, GroundTruth
from metilr.evaluation.results import LEVEL, Results
from metilr.files import write_picture
from metilr.metrics.open_set import calibration_error, precision_recall, reliability, risk_coverage
from metilr.progress import printable
from metilr.report.published import Published
from metilr.report.tables import METRICS

if TYPE_CHECKING:
    from metilr.evaluation.recognition import Recognition
    from metilr.retrieval.knn import Tuning

TEXT = "#010203"  # stands for the page's text colour
DARK = "#333333"  # text and lines on white
COLOURS = ("#2f7fc1", "#e07b28", "#7d8794", "#3a9a6d", "#b45bb0")  # told apart with any colour vision
SPLIT_COLOURS = {"val": COLOURS[1], "test": COLOURS[0]}
ODDS_TICKS = (1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999, 1 - 1e-6, 1 - 1e-9, 1 - 1e-12)
MOST_TICKS = 7
MAX_LOG_ODDS = 40.0  # beyond, float64 has no room for the other classes
LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 9, "labelcolor": TEXT}
BAR = 0.26  # height of one bar, where a run takes 1

Curves = Mapping[str, tuple[np.ndarray, np.ndarray]]  # two arrays (Q,) in rank order, by split
Runs = Mapping[str, Results]  # by name
KnownRows = Mapping[str, Sequence[Published]]  # by name of the run that measured the same


def draw_plots(results: Results, ground_truth: GroundTruth, recognition: "Recognition") -> dict[str, Figure]:
    """Draw the plots of an evaluation, by name."""
    cases, tuning = recognition.cases(ground_truth), recognition.tuning
    curves = {split: precision_recall(*case) for split, case in cases.items()}
    gaps = {split: figures.gap for split, figures in results.splits.items()}
    at_threshold = results.threshold["splits"] if results.threshold else {}
    points = {split: (at["recall"], at["precision"]) for split, at in at_threshold.items() if at and at["n_accepted"]}
    plots = {
        "precision_recall": precision_recall_plot(curves, gaps, points),
        "risk_coverage": risk_coverage_plot({split: risk_coverage(*case) for split, case in cases.items()}),
    }
    for split, (log_confidence, _, _) in cases.items():
        plots[f"confidence_{split}"] = confidence_plot(log_confidence, ground_truth.kinds(split), results.accepted_from)
    if results.confidence is not None:
        errors = {split: calibration_error(*case) for split, case in cases.items()}
        plots["reliability"] = reliability_plot({split: reliability(*case) for split, case in cases.items()}, errors)
    if tuning is not None and tuning.surface.size > 1:
        plots["tuning"] = tuning_plot(tuning)
    return plots


def precision_recall_plot(
    curves: Curves, gaps: Mapping[str, float], threshold_points: Mapping[str, tuple[float, float]]
) -> Figure:
    """Draw precision over recall, whose area is GAP, and recall and precision at the threshold chosen on val."""
    figure, axes = _figure("recall: share of met queries answered right", "precision")
    for split, curve in curves.items():
        colour, (recall, precision) = SPLIT_COLOURS[split], gap_steps(*curve)
        axes.plot(recall, precision, color=colour, linewidth=1.8, label=f"{split}: GAP {100 * gaps[split]:.1f}")
        axes.fill_between(recall, precision, color=colour, alpha=0.12, linewidth=0)
        if split in threshold_points:
            axes.plot(*threshold_points[split], "o", color=colour, markersize=7, markeredgecolor=TEXT, zorder=5)
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(**LEGEND)
    return figure


def gap_steps(precision: np.ndarray, recall: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return recall and precision of the corners of the steps whose area is GAP, from rank order.

    Each right answer moves recall on, at the precision that it reaches; wrong answers move nothing.
    """
    before = np.concatenate([[0.0], recall[:-1]])
    is_right = recall > before
    corners = np.stack([before[is_right], recall[is_right]], axis=1).ravel()
    return corners, np.repeat(precision[is_right], 2)


def risk_coverage_plot(curves: Curves) -> Figure:
    """Draw the share of wrong answers over the share of queries answered, the surest first."""
    figure, axes = _figure("coverage: share of all queries answered", "risk: share of answers wrong")
    for split, (coverage, risk) in curves.items():
        n = len(coverage)  # of which the first ones are drawn, where it is steep, and 1,000 in all
        shown = np.unique(np.concatenate([np.arange(min(n, 200)), np.linspace(0, n - 1, 800).astype(int)]))
        axes.plot(coverage[shown], risk[shown], color=SPLIT_COLOURS[split], linewidth=1.8, label=split)
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(**LEGEND)
    return figure


def reliability_plot(
    bins: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]], errors: Mapping[str, float]
) -> Figure:
    """Draw the share of right answers over confidence, a point a bin, whose area is its number of answers."""
    figure, axes = _figure("confidence", "share of answers that are right")
    axes.plot([0, 1], [0, 1], color=TEXT, alpha=0.5, linestyle="--", linewidth=1.2)
    for split, (confidence, right, counts) in bins.items():
        colour = SPLIT_COLOURS[split]
        axes.plot(confidence, right, color=colour, linewidth=1.2, label=f"{split}: error {100 * errors[split]:.1f}")
        areas = 15 + 385 * counts / counts.sum()
        axes.scatter(confidence, right, areas, color=colour, alpha=0.7, linewidths=0, clip_on=False, zorder=3)
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(**LEGEND)
    return figure


def tuning_plot(tuning: "Tuning") -> Figure:
    """Draw GAP on val over the grid, the chosen point framed."""
    figure, axes = _figure("τ", "k")
    percent = 100 * tuning.surface
    picture = axes.imshow(percent, aspect="auto", cmap="cividis")
    middle = (percent.min() + percent.max()) / 2
    for (i, j), value in np.ndenumerate(percent):
        colour = "black" if value > middle else "white"
        axes.text(j, i, f"{value:.1f}", ha="center", va="center", color=colour, fontsize=6)
    i, j = tuning.k_grid.index(tuning.k), tuning.tau_grid.index(tuning.tau)
    axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, edgecolor="#e0281e", linewidth=3))
    axes.set_xticks(range(len(tuning.tau_grid)), [f"{value:g}" for value in tuning.tau_grid])
    axes.set_yticks(range(len(tuning.k_grid)), [str(value) for value in tuning.k_grid])
    axes.grid(visible=False)
    bar = figure.colorbar(picture)
    bar.set_label("GAP on val, %", color=TEXT)
    bar.ax.tick_params(colors=TEXT, labelsize=9)
    bar.outline.set_visible(False)
    return figure


def confidence_plot(log_confidence: np.ndarray, kinds: Sequence[str], threshold: float | None) -> Figure:
    """Draw how sure the answers are, a histogram a kind of query, on a scale of log-odds."""
    figure, axes = _figure("confidence, on a scale of log-odds", "share of queries")
    odds = _log_odds(log_confidence)
    answered = np.isfinite(odds)
    low, high = (odds[answered].min(), odds[answered].max()) if answered.any() else (0.0, 1.0)
    edges = np.linspace(low, max(high, low + 1e-6), 31)
    for kind, colour in zip([MET, *sorted(set(kinds) - {MET})], itertools.cycle(COLOURS), strict=False):
        values = odds[answered & (np.array(kinds) == kind)]
        share = np.histogram(values, edges)[0] / max(1, len(values))
        axes.stairs(share, edges, color=colour, linewidth=1.8, label=_plain(f"{kind} ({len(values):,})"))
        axes.stairs(share, edges, color=colour, fill=True, alpha=0.15)
    if threshold is not None:
        at = float(_log_odds(np.array([threshold]))[0])
        axes.axvline(at, color=TEXT, linestyle="--", linewidth=1.2, label="threshold from val")
    ticks: dict[float, str] = {}  # those in range that are far enough apart
    for confidence in ODDS_TICKS:
        at = float(np.log(confidence / (1 - confidence)))
        if low <= at <= high and (not ticks or at - max(ticks) >= (high - low) / MOST_TICKS):
            near_1 = f"1−{1 - confidence:.0e}".replace("e-", "e−").replace("−0", "−")
            ticks[at] = f"{100 * confidence:g}%" if confidence < 0.99995 else near_1
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.legend(**LEGEND)
    return figure


def _log_odds(log_confidence: np.ndarray) -> np.ndarray:
    """Return log(c / (1 - c)) of c = exp(log_confidence), cut at MAX_LOG_ODDS."""
    with np.errstate(divide="ignore", invalid="ignore"):
        odds = log_confidence - np.log(-np.expm1(log_confidence))
    return np.minimum(odds, MAX_LOG_ODDS)


def as_svg(figure: Figure, name: str) -> str:
    """Return a plot as an element of a page: texts stay texts, and ids differ between plots by name."""
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    document = re.sub(r'(\bid="|"#|url\(#)', rf"\1{name}-", stream.getvalue())
    return document[document.index("<svg") :].replace(TEXT, "currentColor")


def _plain(text: str) -> str:
    """A text from a file name, without what matplotlib would read as a formula or as no label."""
    text = "\n".join(map(printable, text.split("\n"))).replace("$", r"\$")  # or a warning passes it to the terminal
    return f"\N{ZERO WIDTH SPACE}{text}" if text.startswith("_") else text


def _figure(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.6, 3.5), layout="constrained")
    axes = figure.add_subplot()
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    axes.grid(color=TEXT, alpha=0.12)
    axes.set_axisbelow(True)
    axes.tick_params(colors=TEXT, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set_color(TEXT)
    axes.set_xlabel(xlabel, color=TEXT)
    axes.set_ylabel(ylabel, color=TEXT)
    return figure, axes


def plot_comparison(groups: Mapping[str, Runs], published: KnownRows, files: Sequence[Path]) -> None:
    """Draw runs as groups of bars, val on the left and test on the right, runs on other data in a row of their own.

    ``groups`` are by title of the data; ``files`` end in .png or .svg.
    """
    heights = [len(runs) for runs in groups.values()]
    figure = Figure(figsize=(9, 1.1 + 0.62 * sum(heights) + 0.55 * len(groups)), dpi=160, layout="constrained")
    panels = figure.subplots(len(groups), 2, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})
    for (title, runs), (left, right) in zip(groups.items(), panels, strict=True):
        for split, axes in (("val", left), ("test", right)):
            _draw_bars(axes, split, runs, published)
            first = next(iter(runs.values())).splits[split]
            queries = f"{split}: {first.n_met:,} met of {first.n_queries:,} queries"
            axes.set_title(_plain(f"{title if split == 'val' else ''}\n{queries}"), fontsize=9, loc="left")
            axes.set_yticks(range(len(runs)), [_plain(name) if split == "val" else "" for name in runs])
    for axes in panels[-1]:
        axes.set_xlabel("%")
    handles: list[Any] = [Patch(color=COLOURS[i], label=label) for i, label in enumerate(METRICS.values())]
    units = {results.unit for runs in groups.values() for results in runs.values() if results.unit is not None}
    if units:
        drawn = sorted("exhibits" if unit == "classes" else unit for unit in units)
        label = f"{100 * LEVEL:g}% interval, resampled: {' or '.join(drawn)}"
        handles.append(Line2D([], [], color=DARK, linewidth=0.9, label=label))
    if any(published.values()):
        mark = Line2D([], [], marker="D", linestyle="", markerfacecolor="white", markeredgecolor=DARK)
        mark.set_label("published, on the same split")
        handles.append(mark)
    figure.legend(handles=handles, loc="outside upper center", ncols=5, frameon=False, fontsize=9)
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text stays text
        for file in files:
            write_picture(file, partial(figure.savefig, format=file.suffix[1:]))


def _draw_bars(axes: Axes, split: str, runs: Runs, published: KnownRows) -> None:
    for y, (name, results) in enumerate(runs.items()):
        figures, unit = results.splits[split], results.unit
        for i, metric in enumerate(METRICS):
            place, value = y + (i - 1) * BAR, 100 * getattr(figures, metric)
            axes.barh(place, value, height=0.92 * BAR, color=COLOURS[i])
            if unit is not None:
                interval = [100 * end for end in figures.intervals[unit][metric]]
                axes.plot(interval, [place, place], color=DARK, linewidth=0.9, solid_capstyle="butt")
            marks = [getattr(row, metric) for row in published[name] if row.split == split]
            for mark in [100 * mark for mark in marks if mark is not None]:
                axes.plot(mark, place, "D", markersize=5.5, markerfacecolor="white", markeredgecolor=DARK, zorder=3)
            axes.text(102, place, f"{value:.1f}", va="center", fontsize=7.5, color=DARK)  # a column beside the bars
    axes.set(xlim=(0, 100), ylim=(len(runs) - 0.5, -0.5))
    axes.set_xticks(range(0, 101, 20))
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
