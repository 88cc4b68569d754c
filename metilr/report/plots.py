"""Plots of the figures, as SVG in the text colour of a page that is light or dark, or as PNG."""

import io
import itertools
import re
from collections.abc import Mapping, Sequence

import matplotlib
import matplotlib.patches
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metilr.data.ground_truth import MET
from metilr.progress import printable

TEXT = "#010203"  # stands for the page's text colour
COLOURS = ("#2f7fc1", "#e07b28", "#7d8794", "#3a9a6d", "#b45bb0")  # told apart with any colour vision
SPLIT_COLOURS = {"val": COLOURS[1], "test": COLOURS[0]}
ODDS_TICKS = (1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999, 1 - 1e-6, 1 - 1e-9, 1 - 1e-12)
MOST_TICKS = 7
MAX_LOG_ODDS = 40.0  # beyond, float64 has no room for the other classes


def precision_recall_plot(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
    gaps: Mapping[str, float],
    threshold_points: Mapping[str, tuple[float, float]],
) -> Figure:
    """Draw precision over recall, whose area is GAP.

    Args:
        curves: By split, precision and recall in rank order, ``(Q,)`` each.
        gaps: By split.
        threshold_points: By split, recall and precision at the threshold chosen on val.
    """
    figure, axes = _figure()
    for split, (precision, recall) in curves.items():
        colour = SPLIT_COLOURS[split]
        recall, precision = gap_steps(precision, recall)
        axes.plot(recall, precision, color=colour, linewidth=1.8, label=f"{split}: GAP {100 * gaps[split]:.1f}")
        axes.fill_between(recall, precision, color=colour, alpha=0.12, linewidth=0)
        if split in threshold_points:
            axes.plot(*threshold_points[split], "o", color=colour, markersize=7, markeredgecolor=TEXT, zorder=5)
    axes.set(xlabel="recall: share of met queries answered right", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    _legend(axes)
    return figure


def tuning_plot(k_grid: Sequence[int], tau_grid: Sequence[float], val_gap: np.ndarray, k: int, tau: float) -> Figure:
    """Draw GAP on val over the grid ``(len(k_grid), len(tau_grid))``, the chosen point framed."""
    figure, axes = _figure()
    percent = 100 * val_gap
    picture = axes.imshow(percent, aspect="auto", cmap="cividis")
    middle = (percent.min() + percent.max()) / 2
    for i in range(len(k_grid)):
        for j in range(len(tau_grid)):
            colour = "black" if percent[i, j] > middle else "white"
            axes.text(j, i, f"{percent[i, j]:.1f}", ha="center", va="center", color=colour, fontsize=6)
    i, j = list(k_grid).index(k), list(tau_grid).index(tau)
    axes.add_patch(matplotlib.patches.Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, edgecolor="#e0281e", linewidth=3))
    axes.set_xticks(range(len(tau_grid)), [f"{value:g}" for value in tau_grid])
    axes.set_yticks(range(len(k_grid)), [str(value) for value in k_grid])
    axes.set(xlabel="τ", ylabel="k")
    axes.grid(visible=False)
    bar = figure.colorbar(picture)
    bar.set_label("GAP on val, %", color=TEXT)
    bar.ax.tick_params(colors=TEXT, labelsize=9)
    bar.outline.set_visible(False)
    return figure


def confidence_plot(log_confidence: np.ndarray, kinds: Sequence[str], threshold: float | None) -> Figure:
    """Draw how sure the answers are, a histogram a kind of query, on a scale of log-odds."""
    figure, axes = _figure()
    kinds_of = np.array(kinds)
    odds = log_odds(log_confidence)
    answered = np.isfinite(odds)
    present = [MET, *sorted(set(kinds) - {MET})]
    low, high = (odds[answered].min(), odds[answered].max()) if answered.any() else (0.0, 1.0)
    edges = np.linspace(low, max(high, low + 1e-6), 31)
    for kind, colour in zip(present, itertools.cycle(COLOURS), strict=False):
        values = odds[answered & (kinds_of == kind)]
        share = np.histogram(values, edges)[0] / max(1, len(values))
        axes.stairs(share, edges, color=colour, linewidth=1.8, label=plain(f"{kind} ({len(values):,})"))
        axes.stairs(share, edges, color=colour, fill=True, alpha=0.15)
    if threshold is not None:
        at = float(log_odds(np.array([threshold]))[0])
        axes.axvline(at, color=TEXT, linestyle="--", linewidth=1.2, label="threshold from val")
    ticks = _apart([tick for tick in ODDS_TICKS if low <= np.log(tick / (1 - tick)) <= high], (high - low) / MOST_TICKS)
    axes.set_xticks([float(np.log(tick / (1 - tick))) for tick in ticks], [_confidence_name(tick) for tick in ticks])
    axes.set(xlabel="confidence, on a scale of log-odds", ylabel="share of queries")
    _legend(axes)
    return figure


def risk_coverage_plot(curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """Draw the share of wrong answers over the share of queries answered, the surest first."""
    figure, axes = _figure()
    for split, (coverage, risk) in curves.items():
        shown = shown_points(len(coverage))
        axes.plot(coverage[shown], risk[shown], color=SPLIT_COLOURS[split], linewidth=1.8, label=split)
    axes.set(
        xlabel="coverage: share of all queries answered", ylabel="risk: share of answers wrong",
        xlim=(0, 1), ylim=(0, 1.02),
    )  # fmt: skip
    _legend(axes)
    return figure


def as_svg(figure: Figure, name: str) -> str:
    """Return a plot as an element of a page: texts stay texts, and ids differ between plots by name."""
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    document = stream.getvalue()
    document = re.sub(r'(\bid="|"#|url\(#)', rf"\1{name}-", document)
    return document[document.index("<svg") :].replace(TEXT, "currentColor")


def as_png(figure: Figure) -> bytes:
    """Return a plot as a PNG file on white."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=160, facecolor="white")
    return stream.getvalue()


def gap_steps(precision: np.ndarray, recall: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return recall and precision of the corners of the steps whose area is GAP, from rank order.

    Each right answer moves recall on, at the precision that it reaches; wrong answers move nothing.
    """
    before = np.concatenate([[0.0], recall[:-1]])
    is_right = recall > before
    corners = np.stack([before[is_right], recall[is_right]], axis=1).ravel()
    return corners, np.repeat(precision[is_right], 2)


def plain(text: str) -> str:
    """A text from a file name, without what matplotlib would read as a formula or as no label."""
    text = "\n".join(map(printable, text.split("\n"))).replace("$", r"\$")  # or a warning passes it to the terminal
    return f"\N{ZERO WIDTH SPACE}{text}" if text.startswith("_") else text


def shown_points(n: int) -> np.ndarray:
    """The places in a curve of n points that are drawn: the first ones, where it is steep, and 1,000 in all."""
    return np.unique(np.concatenate([np.arange(min(n, 200)), np.linspace(0, n - 1, 800).astype(int)]))


def log_odds(log_confidence: np.ndarray) -> np.ndarray:
    """Return log(c / (1 - c)) of c = exp(log_confidence), cut at MAX_LOG_ODDS."""
    with np.errstate(divide="ignore", invalid="ignore"):
        odds = log_confidence - np.log(-np.expm1(log_confidence))
    return np.minimum(odds, MAX_LOG_ODDS)


def _apart(ticks: Sequence[float], least: float) -> list[float]:
    """Those of ascending ticks whose log-odds are at least so far apart."""
    kept: list[float] = []
    for tick in ticks:
        if not kept or np.log(tick / (1 - tick)) - np.log(kept[-1] / (1 - kept[-1])) >= least:
            kept.append(tick)
    return kept


def _confidence_name(tick: float) -> str:
    return f"{100 * tick:g}%" if tick < 0.99995 else f"1−{1 - tick:.0e}".replace("e-", "e−").replace("−0", "−")


def _figure(width: float = 4.6) -> tuple[Figure, Axes]:
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(width, 3.5), layout="constrained")
        axes = figure.add_subplot()
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    axes.grid(color=TEXT, alpha=0.12)
    axes.set_axisbelow(True)
    axes.tick_params(colors=TEXT, labelsize=9)
    for spine in axes.spines.values():
        spine.set_color(TEXT)
    axes.xaxis.label.set_color(TEXT)
    axes.yaxis.label.set_color(TEXT)
    return figure, axes


def _legend(axes: Axes) -> None:
    axes.legend(frameon=False, fontsize=9, labelcolor=TEXT)
