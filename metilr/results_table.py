"""The table that an evaluation ends with, and how its figures came about, in words."""

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from metilr.data.ground_truth import QUERY_FILES
from metilr.scoring import headline_unit


def print_table(console: Console, results: Mapping[str, Any]) -> None:
    """Print the figures of val and test in percent, and what must be known to read them."""
    data, knn = results["data"], results["knn"]
    kind = "SYNTHETIC demo museum" if data["synthetic"] else escape(data["root"])
    table = Table(title=f"{kind}, {data['database']} database", title_justify="left", box=SIMPLE_HEAD)
    for column in ("split", "met of all", "GAP", "GAP⁻", "ACC"):
        table.add_column(column, justify="left" if column == "split" else "right", no_wrap=True)
    unit = headline_unit(results)
    for split in QUERY_FILES:
        figures = results[split]
        percents = [_with_interval(figures, name, unit) for name in ("gap", "gap_minus", "acc")]
        table.add_row(split, f"{figures['n_met']:,} of {figures['n_queries']:,}", *percents)
    console.print(table)
    console.print(f"in percent; {chosen(knn)}; test scored once", soft_wrap=True)
    for line in chosen_on_val(results):
        console.print(line, soft_wrap=True)
    if unit is not None:
        level = 100 * results["bootstrap"]["level"]
        console.print(
            f"in brackets {level:g}% intervals: bootstrap over {unit} and distractors (a lower bound of the doubt)",
            soft_wrap=True,
        )
    for note in results["notes"]:
        console.print(f"[bold yellow]note:[/] {escape(note)}")


def chosen_on_val(results: Mapping[str, Any]) -> list[str]:
    """What val chose besides k and tau, in words."""
    lines = []
    hubness, check = results["elements"]["hubness"], results["geometric_check"]
    if hubness is not None:
        idle = "" if hubness["beta"] else ": it has no effect"
        lines.append(f"hubness: a share (beta) of {hubness['beta']:g}, chosen on val{idle}")
    if check is not None:
        gate = check["gate"]
        idle = "" if gate["weight"] or check["boost"] else ": it has no effect"
        boost = f", boost {check['boost']:g}" if check["reorder"] else ""
        lines.append(
            f"geometric check: gate of weight {gate['weight']:g}, enough {gate['enough']:g}{boost}, chosen on val{idle}"
        )
    return lines


def chosen(knn: Mapping[str, Any], with_values: bool = True) -> str:
    """How k and tau came about."""
    values = {"k": f"k = {knn['k']}", "tau": f"τ = {knn['tau']:g}"} if with_values else {"k": "k", "tau": "τ"}
    if knn["grid"] is None:
        return f"{values['k']}, {values['tau']} given"
    given = [text for key, text in values.items() if len(knn["grid"][key]) == 1]
    tuned = [text for key, text in values.items() if len(knn["grid"][key]) > 1]
    return ", ".join([*(f"{text} given" for text in given), f"{', '.join(tuned)} tuned by GAP on val"])


def _with_interval(figures: Mapping[str, Any], name: str, unit: str | None) -> str:
    value = f"{100 * figures[name]:.2f}"
    if unit is None:
        return value
    low, high = figures["intervals"][unit][name]
    return f"{value} [dim]({100 * low:.0f}–{100 * high:.0f})[/]"
