"""``metilr describe ROOT``: what a data root holds, before anything is computed from it."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from metilr.commands.visits import arrange
from metilr.data.decode import BadImageError, file_size, load_image
from metilr.data.ground_truth import MET, NOT_NAMED, QUERY_FILES, DatabaseName, GroundTruth, load_ground_truth
from metilr.errors import UserError
from metilr.evaluation.runs import make_output
from metilr.files import write_atomically, write_picture
from metilr.metrics import DISTRACTOR
from metilr.progress import printable

if TYPE_CHECKING:
    from torch import Tensor

CLASS_SIZES = {"1": (1, 1), "2-3": (2, 3), "4-10": (4, 10), "11+": (11, np.inf)}  # images of an exhibit, both ends in
MAX_LINEAR_SIZE = 40  # images of an exhibit up to which each size gets a bar of its own
MAX_LABELLED_BARS = 16  # beyond, their numbers would run into each other
MAX_KINDS = 4  # of distractors on the sheet: the most frequent
SAMPLE_SIDE = 400  # px: a sheet shows less


def describe(
    root: Path, database: DatabaseName = "full", output: Path | None = None, images: int = 6
) -> dict[str, Any]:
    """Show what a data root holds: counts, class sizes, sample images.

    Writes counts.json, class_sizes.png and samples.jpg; without images there is no sheet, and the command says so.

    Args:
        root: Folder with ground_truth/ and, for the sheet, images/ in the Met layout.
        database: Describe MET_database.json (full) or mini_MET_database.json (mini).
        output: Folder for the files; without it a dated one under runs/.
        images: Images in each row of the sheet.

    Returns:
        What counts.json says.

    Raises:
        UserError: If the ground truth is missing or malformed, ``images`` is below 1, or the output cannot be written.
    """
    if images < 1:
        raise UserError(f"{images}: choose 1 or more", "images")
    console = Console(highlight=False)
    ground_truth = load_ground_truth(Path(root), database)
    counts = count(ground_truth)
    folder = make_output(output, "describe")
    _print(console, counts)

    written = [folder / "counts.json", folder / "class_sizes.png"]
    write_atomically(written[0], json.dumps(counts, indent=1) + "\n")
    _plot_class_sizes(ground_truth.class_sizes(), written[1])
    rows, left_out = _sample_rows(ground_truth, images)
    if rows:
        written.append(folder / "samples.jpg")
        sheet = arrange(list(rows.values()), list(rows))
        write_picture(written[-1], partial(sheet.save, format="JPEG", quality=90))
    else:
        console.print(f"no sheet of samples: none of the images lie in {escape(str(ground_truth.image('')))}")
    for reason in left_out:
        console.print(f"[bold yellow]note:[/] left out of the sheet: {escape(printable(reason))}", soft_wrap=True)
    console.print("wrote " + ", ".join(escape(str(file)) for file in written), soft_wrap=True)
    return counts


def count(ground_truth: GroundTruth) -> dict[str, Any]:
    """Count images, exhibits and photographers of the database and of each query split, as JSON types.

    ``class_sizes`` counts exhibits by their number of images; queries are counted by kind (``met``,
    ``other-artwork``, ...); photographers are those of the met queries, None where none is named.
    """
    sizes = ground_truth.class_sizes()
    largest = int(sizes.argmax())
    within = {name: (sizes >= low) & (sizes <= high) for name, (low, high) in CLASS_SIZES.items()}
    database = {
        "name": ground_truth.database,
        "images": int(sizes.sum()),
        "exhibits": ground_truth.n_classes,
        "class_sizes": {name: int(are.sum()) for name, are in within.items()},
        "share_with_one_image": float((sizes == 1).mean()),
        "largest": {"exhibit_id": int(ground_truth.exhibit_ids[largest]), "images": int(sizes[largest])},
    }
    counts: dict[str, Any] = {
        "root": ground_truth.root.resolve().name,
        "synthetic": (ground_truth.root / "demo.json").exists(),
        "fingerprint": ground_truth.fingerprint(),
        "database": database,
    }
    for split in ground_truth.query_splits:
        labels = ground_truth.labels[split]
        is_met = labels != DISTRACTOR
        photographers = ground_truth.photographers[split][is_met]
        kinds = Counter(ground_truth.kinds(split))
        counts[split] = {
            "queries": len(labels),
            "kinds": {MET: kinds.pop(MET), **dict(kinds.most_common())},
            "exhibits": len(np.unique(labels[is_met])),
            "photographers": len(np.unique(photographers[photographers != NOT_NAMED])) or None,
        }
    return counts


def _print(console: Console, counts: dict[str, Any]) -> None:
    database, parts = counts["database"], {split: counts[split] for split in QUERY_FILES if split in counts}
    kind_of_data = "SYNTHETIC demo museum" if counts["synthetic"] else escape(counts["root"])
    table = Table(title=f"{kind_of_data}, {database['name']} database", title_justify="left")
    table.add_column("")
    for column in ("database", *parts):
        table.add_column(column, justify="right")
    table.add_row("images", f"{database['images']:,}", *(f"{part['queries']:,}" for part in parts.values()))
    for kind in dict.fromkeys(kind for part in parts.values() for kind in part["kinds"]):
        numbers = (part["kinds"].get(kind, 0) for part in parts.values())
        table.add_row(f"  {escape(printable(kind))}", "", *(f"{n:,}" for n in numbers))
    table.add_row("exhibits", f"{database['exhibits']:,}", *(f"{part['exhibits']:,}" for part in parts.values()))
    photographers = [part["photographers"] for part in parts.values()]
    table.add_row("photographers of met", "", *("not named" if n is None else f"{n:,}" for n in photographers))
    console.print(table)

    table = Table(title="Images of an exhibit", title_justify="left")
    for column in ("images", "exhibits", "share"):
        table.add_column(column, justify="right")
    for name, n in database["class_sizes"].items():
        table.add_row(name.replace("-", "–"), f"{n:,}", f"{100 * n / database['exhibits']:.1f}%")
    console.print(table)
    largest = database["largest"]
    console.print(f"most images: {largest['images']:,}, of exhibit {largest['exhibit_id']}")


def _plot_class_sizes(sizes: np.ndarray, file: Path) -> None:
    """Draw how many exhibits have how many images, the number of exhibits on a log scale."""
    from matplotlib.figure import Figure

    from metilr.report.plots import COLOURS

    figure = Figure(figsize=(7, 3.6), dpi=160, layout="constrained")
    axes = figure.subplots()
    edges = _size_edges(int(sizes.max()))
    if sizes.max() > MAX_LINEAR_SIZE:
        axes.set_xscale("log")
    n, _ = np.histogram(sizes, edges)
    bars = axes.bar(edges[:-1], n, np.diff(edges), align="edge", color=COLOURS[0], edgecolor="white", linewidth=0.8)
    if len(edges) <= MAX_LABELLED_BARS:
        axes.bar_label(bars, [f"{each:,.0f}" if each else "" for each in n], padding=2, fontsize=9)
    axes.set(xlim=(edges[0], edges[-1]), yscale="log", ylim=(0.7, 2 * n.max()))  # from below 1: one exhibit is seen
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(xlabel="images of an exhibit", ylabel="exhibits (log scale)")
    share = 100 * (sizes == 1).mean()
    axes.set_title(f"{len(sizes):,} exhibits, {share:.1f}% with one image", loc="left", fontsize=11)
    write_picture(file, partial(figure.savefig, format="png"))


def _size_edges(largest: int) -> np.ndarray:
    """Edges of the bars: one a size as long as they are few, then wider ones, never narrower than the one before."""
    edges = [1]
    while edges[-1] <= largest:
        edges.append(edges[-1] + (1 if largest <= MAX_LINEAR_SIZE else max(1, edges[-1] // 6)))
    return np.array(edges) - 0.5


def _sample_rows(ground_truth: GroundTruth, n: int) -> "tuple[dict[str, list[Tensor]], list[str]]":
    """Read at most ``n`` images a row, by caption: met queries, an image of each one's exhibit, distractors by kind.

    Those that cannot be had are left out; the second part says why.
    """
    left_out: list[str] = []
    pairs = list(_take(_met_pairs(ground_truth), n, left_out))
    rows = {
        "met queries": [images[0] for images in pairs],
        "their exhibits in the database": [images[1] for images in pairs],
    }
    by_kind: dict[str, list[tuple[Path, ...]]] = {}
    for split in ground_truth.query_splits:
        for path, kind in zip(ground_truth.paths[split], ground_truth.kinds(split), strict=True):
            if kind != MET:
                by_kind.setdefault(kind, []).append((ground_truth.image(path),))
    for kind in sorted(by_kind, key=lambda kind: -len(by_kind[kind]))[:MAX_KINDS]:
        rows[f"distractors: {kind}"] = [images[0] for images in _take(by_kind[kind], n, left_out)]
    return {caption: images for caption, images in rows.items() if images}, left_out


def _met_pairs(ground_truth: GroundTruth) -> list[tuple[Path, ...]]:
    """One met query and one database image of every exhibit that is queried."""
    first_row = ground_truth.first_images()
    pairs: dict[int, tuple[Path, ...]] = {}
    for split in ground_truth.query_splits:
        for path, label in zip(ground_truth.paths[split], ground_truth.labels[split].tolist(), strict=True):
            if label != DISTRACTOR:
                database_path = ground_truth.paths["database"][first_row[label]]
                pairs.setdefault(label, (ground_truth.image(path), ground_truth.image(database_path)))
    return list(pairs.values())


def _take(candidates: Sequence[tuple[Path, ...]], n: int, left_out: list[str]) -> "Iterator[list[Tensor]]":
    """Read ``n`` of those whose files are all there, spread evenly; say of undecodable ones why they are left out."""
    there = [files for files in candidates if all(file_size(file) is not None for file in files)]
    chosen = [there[i * len(there) // n] for i in range(n)] if len(there) > n else there
    for files in chosen:
        try:
            yield [load_image(file, SAMPLE_SIDE) for file in files]
        except BadImageError as error:
            left_out.append(str(error))
