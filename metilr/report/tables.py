"""The table that an evaluation ends with, and how its figures came about, in words."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich import box
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from metilr.evaluation.results import KNN, Figures, Results
from metilr.progress import printable

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "τ": r"$\tau$", "⁻": r"$^-$", "−": r"$-$", "–": "--", "—": "---",
}  # fmt: skip


@dataclass(frozen=True)
class TextTable:
    """Columns of text, of which the first ``n_left`` are set to the left and the rest to the right.

    Attributes:
        title: Above the table.
        spans: Headings over several columns, from the left: text (may be empty) and number of columns.
        header: One text a column.
        rows: As many texts each.
        quiet: Numbers of the rows that are set back, because they are not the main thing.
        notes: Lines below the table.
        n_left: Columns of words rather than numbers.
    """

    title: str
    spans: Sequence[tuple[str, int]]
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    quiet: frozenset[int] = frozenset()
    notes: Sequence[str] = field(default_factory=list)
    n_left: int = 1

    def rich(self) -> Table:
        """For the terminal; notes are left to the caller."""
        table = Table(
            title=escape(printable(self.title)),
            title_justify="left",
            box=box.SIMPLE_HEAD,
            show_edge=False,
            padding=(0, 1, 0, 0),
        )
        for i, (span, name) in enumerate(zip(self._spans_by_column(), self.header, strict=True)):
            span, name = printable(span), printable(name)
            head = f"{span}\n{name}" if any(text for text, _ in self.spans) else name
            table.add_column(
                escape(head), justify="left" if i < self.n_left else "right", no_wrap=i > 0, overflow="fold"
            )
        for number, row in enumerate(self.rows):
            table.add_row(
                *(escape(printable(cell)) for cell in row), style="dim italic" if number in self.quiet else None
            )
        return table

    def markdown(self) -> str:
        """As GitHub's Markdown, a span's heading before each of its columns."""
        header = [f"{span} {name}".strip() for span, name in zip(self._spans_by_column(), self.header, strict=True)]
        rule = ["---" if i < self.n_left else "---:" for i in range(len(header))]
        rows = [[_markdown(cell) for cell in row] for row in self.rows]
        rows = [[f"*{cell}*" if cell and i in self.quiet else cell for cell in row] for i, row in enumerate(rows)]
        lines = [f"| {' | '.join(cells)} |" for cells in ([_markdown(cell) for cell in header], rule, *rows)]
        notes = [f"- {_markdown(note)}" for note in self.notes]
        return "\n".join([f"**{_markdown(self.title)}**", "", *lines, *([""] if notes else []), *notes]) + "\n"

    def latex(self) -> str:
        r"""As a ``table`` for ``\usepackage{booktabs}``."""
        columns = "l" * self.n_left + "r" * (len(self.header) - self.n_left)
        rows = [[_latex(cell) for cell in row] for row in self.rows]
        rows = [
            [rf"\textit{{{cell}}}" if cell and i in self.quiet else cell for cell in row] for i, row in enumerate(rows)
        ]
        heads, rules, column = [], [], 1
        for text, n in self.spans:
            heads.append(rf"\multicolumn{{{n}}}{{c}}{{{_latex(text)}}}")
            rules += [rf"\cmidrule(lr){{{column}-{column + n - 1}}}"] if text else []
            column += n
        return "\n".join(
            [
                r"\begin{table}",
                r"\centering",
                rf"\caption{{{_latex(self.title)}}}",
                rf"\begin{{tabular}}{{{columns}}}",
                r"\toprule",
                *([rf"{' & '.join(heads)} \\", " ".join(rules)] if rules else []),
                rf"{' & '.join(map(_latex, self.header))} \\",
                r"\midrule",
                *(rf"{' & '.join(row)} \\" for row in rows),
                r"\bottomrule",
                r"\end{tabular}",
                *(rf"\par\footnotesize {_latex(note)}" for note in self.notes),
                r"\end{table}",
                "",
            ]
        )

    def _spans_by_column(self) -> list[str]:
        return [text for text, n in self.spans for _ in range(n)] or [""] * len(self.header)


def _markdown(text: str) -> str:
    return re.sub(r"([\\|*`<\[\]])", r"\\\1", text)


def _latex(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text)


def print_table(console: Console, results: Results) -> None:
    """Print the figures of val and test in percent, and what must be known to read them."""
    data, knn = results.data, results.knn
    kind = "SYNTHETIC demo museum" if data.synthetic else escape(data.root)
    table = Table(title=f"{kind}, {data.database} database", title_justify="left", box=SIMPLE_HEAD)
    for column in ("split", "met of all", "GAP", "GAP⁻", "ACC"):
        table.add_column(column, justify="left" if column == "split" else "right", no_wrap=True)
    unit = results.unit
    for split, figures in results.splits.items():
        percents = [_with_interval(figures, name, unit) for name in ("gap", "gap_minus", "acc")]
        table.add_row(split, f"{figures.n_met:,} of {figures.n_queries:,}", *percents)
    console.print(table)
    console.print(f"in percent; {chosen(knn)}; test scored once", soft_wrap=True)
    for line in chosen_on_val(results):
        console.print(line, soft_wrap=True)
    if unit is not None and results.bootstrap is not None:
        level = 100 * results.bootstrap.level
        console.print(
            f"in brackets {level:g}% intervals: bootstrap over {unit} and distractors (a lower bound of the doubt)",
            soft_wrap=True,
        )
    for note in results.notes:
        console.print(f"[bold yellow]note:[/] {escape(note)}")


def chosen_on_val(results: Results) -> list[str]:
    """What val chose besides k and tau, in words."""
    lines = []
    check = results.geometric_check
    if check is not None:
        gate = check.gate
        idle = "" if gate.weight or check.boost else ": it has no effect"
        boost = f", boost {check.boost:g}" if check.reorder else ""
        lines.append(
            f"geometric check: gate of weight {gate.weight:g}, enough {gate.enough:g}{boost}, chosen on val{idle}"
        )
    return lines


def chosen(knn: KNN, with_values: bool = True) -> str:
    """How k and tau came about."""
    values = {"k": f"k = {knn.k}", "tau": f"τ = {knn.tau:g}"} if with_values else {"k": "k", "tau": "τ"}
    if knn.grid is None:
        return f"{values['k']}, {values['tau']} given"
    sizes = {"k": len(knn.grid.k), "tau": len(knn.grid.tau)}
    given = [text for key, text in values.items() if sizes[key] == 1]
    tuned = [text for key, text in values.items() if sizes[key] > 1]
    return ", ".join([*(f"{text} given" for text in given), f"{', '.join(tuned)} tuned by GAP on val"])


def _with_interval(figures: Figures, name: str, unit: str | None) -> str:
    value = f"{100 * getattr(figures, name):.2f}"
    if unit is None:
        return value
    low, high = getattr(figures.intervals[unit], name)
    return f"{value} [dim]({100 * low:.0f}–{100 * high:.0f})[/]"
