"""Tables: the one that an evaluation ends with, those of a comparison, and how k and τ came about, in words."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from metilr.evaluation.results import KNN, LEVEL, Results
from metilr.progress import printable

METRICS = {"gap": "GAP", "gap_minus": "GAP⁻", "acc": "ACC"}
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


def print_table(console: Console, results: Results) -> None:
    """Print the figures of val and test in percent, and what must be known to read them."""
    kind = "SYNTHETIC demo museum" if results.data.synthetic else escape(results.data.root)
    table = Table(title=f"{kind}, {results.data.database} database", title_justify="left", box=SIMPLE_HEAD)
    for column in ("split", "met of all", *METRICS.values()):
        table.add_column(column, justify="left" if column == "split" else "right", no_wrap=True)
    unit, check = results.unit, results.geometric_check
    for split, figures in results.splits.items():
        cells = [f"{100 * getattr(figures, metric):.2f}" for metric in METRICS]
        if unit is not None:
            ends = ["–".join(f"{100 * end:.0f}" for end in figures.intervals[unit][metric]) for metric in METRICS]
            cells = [f"{cell} [dim]({interval})[/]" for cell, interval in zip(cells, ends, strict=True)]
        table.add_row(split, f"{figures.n_met:,} of {figures.n_queries:,}", *cells)
    console.print(table, soft_wrap=False)
    console.print(f"in percent; {chosen(results.knn)}; test scored once")
    if check is not None:
        idle = "" if check.gate["weight"] or check.boost else ": it has no effect"
        gate = f"gate of weight {check.gate['weight']:g}, enough {check.gate['enough']:g}"
        boost = f", boost {check.boost:g}" if check.reorder else ""
        console.print(f"geometric check: {gate}{boost}, chosen on val{idle}")
    if unit is not None:
        drawn = f"bootstrap over {unit} and distractors (a lower bound of the doubt)"
        console.print(f"in brackets {100 * LEVEL:g}% intervals: {drawn}")
    for note in results.notes:
        console.print(f"[bold yellow]note:[/] {escape(note)}")


def chosen(knn: KNN, with_values: bool = True) -> str:
    """How k and tau came about."""
    values = {"k": f"k = {knn.k}", "tau": f"τ = {knn.tau:g}"} if with_values else {"k": "k", "tau": "τ"}
    tuned = [text for name, text in values.items() if knn.grid and len(knn.grid.get(name, ())) > 1]
    given = [text for text in values.values() if text not in tuned]
    if not tuned:
        return f"{', '.join(given)} given"
    return ", ".join([*(f"{text} given" for text in given), f"{', '.join(tuned)} tuned by GAP on val"])
