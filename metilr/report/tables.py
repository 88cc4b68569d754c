"""Tables: the one that an evaluation ends with, those of a comparison, and how k and τ came about, in words."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from metilr.evaluation.results import KNN, LEVEL, Confidence, Figures, Results
from metilr.metrics.bootstrap import N_RESAMPLES
from metilr.progress import printable

METRICS = {"gap": "GAP", "gap_minus": "GAP⁻", "acc": "ACC"}
DRAWN = {  # by unit of a bootstrap, in words
    "photographers": "photographers with all their met queries (a query that names none alone)",
    "classes": "exhibits with all their met queries",
    "queries": "single met queries",
}
RANKING = {"recall@1": "recall@1", "recall@5": "recall@5", "recall@10": "recall@10", "map": "mAP"}
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "τ": r"$\tau$", "⁻": r"$^-$", "−": r"$-$", "–": "--", "—": "---", "\N{REPLACEMENT CHARACTER}": "?",
}  # fmt: skip


@dataclass(frozen=True)
class TextTable:
    """Columns of text, the first set to the left and the others to the right."""

    title: str
    spans: Sequence[tuple[str, int]]  # headings over several columns, from the left: text (or none), number of columns
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    quiet: frozenset[int] = frozenset()  # numbers of the rows that are set back, because they are not the main thing
    notes: Sequence[str] = ()  # below the table

    def rich(self) -> Table:
        """For the terminal; notes are left to the caller."""
        title = escape(printable(self.title))
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
        for i, name in enumerate(self._headings("\n")):
            table.add_column(escape(name), justify="right" if i else "left", no_wrap=i > 0, overflow="fold")
        for number, row in enumerate(self.rows):
            style = "dim italic" if number in self.quiet else None
            table.add_row(*(escape(printable(cell)) for cell in row), style=style)
        return table

    def markdown(self) -> str:
        """As GitHub's Markdown, a span's heading before each of its columns."""
        headings = [_markdown(name.strip()) for name in self._headings(" ")]
        lines = [headings, ["---", *("---:" for _ in self.header[1:])], *self._cells(_markdown, "*{}*")]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        notes = "\n".join(f"- {_markdown(note)}" for note in self.notes)
        return f"**{_markdown(self.title)}**\n\n{table}\n" + (f"\n{notes}\n" if notes else "")

    def latex(self) -> str:
        r"""As a ``table`` for ``\usepackage{booktabs}``."""
        heads, rules, column = [], [], 1
        for text, n in self.spans:
            heads.append(rf"\multicolumn{{{n}}}{{c}}{{{_latex(text)}}}")
            rules += [rf"\cmidrule(lr){{{column}-{column + n - 1}}}"] if text else []
            column += n
        lines = [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_latex(self.title)}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(self.header) - 1)}}}",
            r"\toprule",
            *([rf"{' & '.join(heads)} \\", " ".join(rules)] if rules else []),
            rf"{' & '.join(map(_latex, self.header))} \\",
            r"\midrule",
            *(rf"{' & '.join(row)} \\" for row in self._cells(_latex, r"\textit{{{}}}")),
            r"\bottomrule",
            r"\end{tabular}",
            *(rf"\par\footnotesize {_latex(note)}" for note in self.notes),
            r"\end{table}",
        ]
        return "\n".join(lines) + "\n"

    def _headings(self, between: str) -> list[str]:
        """Each column's name, after the span's where there are some."""
        names = [printable(name) for name in self.header]
        spans = [printable(text) for text, n in self.spans for _ in range(n)]
        return [f"{span}{between}{name}" for span, name in zip(spans, names, strict=True)] if spans else names

    def _cells(self, written: Callable[[str], str], set_back: str) -> Iterator[list[str]]:
        for i, row in enumerate(self.rows):
            yield [set_back.format(written(cell)) if cell and i in self.quiet else written(cell) for cell in row]


def _markdown(text: str) -> str:
    return re.sub(r"([\\|*`<\[\]])", r"\\\1", printable(text))


def _latex(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in printable(text))


def print_table(console: Console, results: Results, metrics: Sequence[str] = tuple(METRICS)) -> None:
    """Print figures of val and test in percent, and what must be known to read them.

    ``metrics`` are names of METRICS and RANKING, in the order of the columns.
    """
    kind = "SYNTHETIC demo museum" if results.data.synthetic else escape(results.data.root)
    is_wide = len(metrics) > len(METRICS)  # then in two lines a cell, to fit 80 columns
    how: Any = {"padding": (0, 1, 0, 0), "show_edge": False} if is_wide else {}
    table = Table(title=f"{kind}, {results.data.database} database", title_justify="left", box=SIMPLE_HEAD, **how)
    names = [{**METRICS, **RANKING}[metric] for metric in metrics]
    for column in ("split", "met of all", *(name.replace("@", "\n@") if is_wide else name for name in names)):
        table.add_column(column, justify="left" if column == "split" else "right", no_wrap=column != "met of all")
    unit, check = results.unit, results.geometric_check
    for split, figures in results.splits.items():
        cells = [_cell(figures, metric, unit, "\n" if is_wide else " ") for metric in metrics]
        table.add_row(split, f"{figures.n_met:,} of {figures.n_queries:,}", *cells)
    console.print(table, soft_wrap=False)
    console.print(f"in percent; {chosen(results.knn)}; test scored once")
    if check is not None:
        idle = "" if check.gate["weight"] or check.boost else ": it has no effect"
        gate = f"gate of weight {check.gate['weight']:g}, enough {check.gate['enough']:g}"
        boost = f", boost {check.boost:g}" if check.reorder else ""
        turns = f", turns {check.turns}" if (results.options or {}).get("geometric_turns", 1) > 1 else ""
        console.print(f"geometric check: {gate}{boost}{turns}, chosen on val{idle}")
    if results.confidence is not None:
        console.print(calibrated(results.confidence))
    if unit is not None:
        console.print(f"in brackets {100 * LEVEL:g}% intervals: {interval_in_words(results)}")
    if any(metric in RANKING for metric in metrics):
        console.print("recall and mAP: over exhibits, of the whole ranking by similarity")
    for note in results.notes:
        console.print(f"[bold yellow]note:[/] {escape(note)}")


def _cell(figures: Figures, metric: str, unit: str | None, between: str) -> str:
    """A figure in percent, with its interval if it has one; results of before may not have it."""
    if metric in RANKING:
        value = figures.ranking.get(metric)
        return "–" if value is None else f"{100 * value:.2f}"
    cell = f"{100 * getattr(figures, metric):.2f}"
    if unit is None:
        return cell
    return f"{cell}{between}[dim]({'–'.join(f'{100 * end:.0f}' for end in figures.intervals[unit][metric])})[/]"


def interval_in_words(results: Results) -> str:
    """What the intervals are, and what was drawn for them."""
    n, share = results.bootstrap.get("resamples", N_RESAMPLES), f"{100 * LEVEL:g} of 100"
    return (
        f"the same figure of {share} random resamples of the queries lies within. Each of {n:,} resamples draws, with "
        f"repeats, {DRAWN[results.unit or 'queries']}, and single distractors. Of few photographers, exhibits or "
        "queries the truth lies outside more often than that"
    )


def calibrated(confidence: Confidence) -> str:
    """What became of the wish for a calibrated confidence, in words."""
    if confidence.plain_gap is None or confidence.calibrated_gap is None:
        return "confidence: that of the classifier, as val has too few right or wrong answers to fit another"
    reached, without = (f"{100 * gap:.2f}" for gap in (confidence.calibrated_gap, confidence.plain_gap))
    gaps = f"GAP {reached} on parts of val held out, {without} without"
    return f"confidence: {'calibrated' if confidence.is_used else 'not calibrated, as that gains nothing'}: {gaps}"


def chosen(knn: KNN, with_values: bool = True) -> str:
    """How k and tau came about."""
    values = {"k": f"k = {knn.k}", "tau": f"τ = {knn.tau:g}"} if with_values else {"k": "k", "tau": "τ"}
    tuned = [text for name, text in values.items() if knn.grid and len(knn.grid.get(name, ())) > 1]
    given = [text for text in values.values() if text not in tuned]
    if not tuned:
        return f"{', '.join(given)} fixed"
    return ", ".join([*(f"{text} fixed" for text in given), f"{', '.join(tuned)} tuned by GAP on val"])
