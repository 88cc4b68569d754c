"""A table of text, for the terminal, Markdown and LaTeX."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich import box
from rich.markup import escape
from rich.table import Table

from metilr.terminal import printable

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
