"""What there is to see: ``metilr dataset`` counts and shows a data root, ``metilr visits`` shows simulated visits."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.markup import escape

from metilr.data.decode import BadImageError, file_size, load_image
from metilr.data.folder import find_images
from metilr.data.ground_truth import MET, NOT_NAMED, QUERY_FILES, DatabaseName, GroundTruth, load_ground_truth
from metilr.errors import UserError
from metilr.evaluation.runs import make_output
from metilr.files import write_atomically, write_picture
from metilr.metrics import DISTRACTOR
from metilr.progress import make_console, printable
from metilr.report.tables import TextTable

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

CLASS_SIZES = {"1": (1, 1), "2-3": (2, 3), "4-10": (4, 10), "11+": (11, np.inf)}  # images of an exhibit, both ends in
MAX_LINEAR_SIZE = 40  # images of an exhibit up to which each size gets a bar of its own
MAX_LABELLED_BARS = 16  # beyond, their numbers would run into each other
MAX_KINDS = 4  # of distractors on the sheet: the most frequent
SAMPLE_SIDE, VISIT_SIDE = 400, 500  # px that images of a sheet are read at; a visit's source as large as the Met's own
CELL, MARGIN = 200, 6  # px of a sheet: longest side that an image is reduced to, and between images


def dataset(root: Path, database: DatabaseName = "full", output: Path | None = None, images: int = 6) -> dict[str, Any]:
    """Show what a data root holds: counts, class sizes, sample images.

    Writes counts.json, class_sizes.png and samples.jpg; without images there is no sheet, and the command says so.

    Args:
        root: Folder with ground_truth/ and, for the sheet, images/ in the Met layout.
        database: Count MET_database.json (full) or mini_MET_database.json (mini).
        output: Folder for the files; without it a dated one under runs/.
        images: Images in each row of the sheet.
    """
    if images < 1:
        raise UserError(f"{images}: choose 1 or more", "images")
    console = make_console()
    ground_truth = load_ground_truth(Path(root), database)
    counts = count(ground_truth)
    folder = make_output(output, "dataset")
    _print(console, counts)

    written, sizes = [folder / "counts.json"], ground_truth.class_sizes()
    write_atomically(written[0], json.dumps(counts, indent=1) + "\n")
    if sizes.max() > 1:
        written.append(folder / "class_sizes.png")
        _plot_class_sizes(sizes, written[-1])
    else:
        console.print("no plot of class sizes: each exhibit has one image")
    rows, left_out = _sample_rows(ground_truth, images)
    if rows:
        written.append(folder / "samples.jpg")
        sheet = arrange(list(rows.values()), list(rows))
        write_picture(written[-1], partial(sheet.save, format="JPEG", quality=90))
    else:
        console.print(f"no sheet of samples: none of the images lie in {escape(str(ground_truth.image('')))}")
    for reason in left_out:
        console.print(f"[bold yellow]note:[/] left out of the sheet: {escape(printable(reason))}")
    for file in written:
        console.print(f"wrote {escape(str(file))}")
    return counts


def count(ground_truth: GroundTruth) -> dict[str, Any]:
    """What counts.json says: exhibits by their number of images, queries by kind, photographers of met ones."""
    sizes = ground_truth.class_sizes()
    largest = int(sizes.argmax())
    counts: dict[str, Any] = {
        "root": ground_truth.root.resolve().name,
        "synthetic": (ground_truth.root / "demo.json").exists(),
        "fingerprint": ground_truth.fingerprint(),
        "database": {
            "name": ground_truth.database,
            "images": int(sizes.sum()),
            "exhibits": ground_truth.n_classes,
            "class_sizes": {
                name: int(((sizes >= low) & (sizes <= high)).sum()) for name, (low, high) in CLASS_SIZES.items()
            },
            "share_with_one_image": float((sizes == 1).mean()),
            "largest": {"exhibit_id": int(ground_truth.exhibit_ids[largest]), "images": int(sizes[largest])},
        },
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
    title = f"{'SYNTHETIC demo museum' if counts['synthetic'] else counts['root']}, {database['name']} database"
    rows = [["images", f"{database['images']:,}", *(f"{part['queries']:,}" for part in parts.values())]]
    for kind in dict.fromkeys(kind for part in parts.values() for kind in part["kinds"]):
        rows.append([f"  {kind}", "", *(f"{part['kinds'].get(kind, 0):,}" for part in parts.values())])
    rows.append(["exhibits", f"{database['exhibits']:,}", *(f"{part['exhibits']:,}" for part in parts.values())])
    photographers = [part["photographers"] for part in parts.values()]
    rows.append(["photographers of met", "", *("not named" if n is None else f"{n:,}" for n in photographers)])
    console.print(TextTable(title, [], ["", "database", *parts], rows).rich(), soft_wrap=False)

    sizes = [
        [name.replace("-", "–"), f"{n:,}", f"{100 * n / database['exhibits']:.1f}%"]
        for name, n in database["class_sizes"].items()
    ]
    console.print(TextTable("Images of an exhibit", [], ["images", "exhibits", "share"], sizes).rich(), soft_wrap=False)
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
    axes.set_title(f"{len(sizes):,} exhibits, {(sizes == 1).mean():.1%} with one image", loc="left", fontsize=11)
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
    pairs: dict[int, tuple[Path, ...]] = {}  # by exhibit one query and one database image
    by_kind: dict[str, list[tuple[Path, ...]]] = {}
    first_row = ground_truth.first_images()
    for split in ground_truth.query_splits:
        labels, kinds = ground_truth.labels[split].tolist(), ground_truth.kinds(split)
        for path, label, kind in zip(ground_truth.paths[split], labels, kinds, strict=True):
            query = ground_truth.image(path)
            if label != DISTRACTOR:
                pairs.setdefault(label, (query, ground_truth.image(ground_truth.paths["database"][first_row[label]])))
            else:
                by_kind.setdefault(kind, []).append((query,))
    left_out: list[str] = []
    read = list(_take([*pairs.values()], n, left_out))
    rows = {
        "met queries": [images[0] for images in read],
        "their exhibits in the database": [images[1] for images in read],
    }
    for kind in sorted(by_kind, key=lambda kind: -len(by_kind[kind]))[:MAX_KINDS]:
        rows[f"distractors: {kind}"] = [images[0] for images in _take(by_kind[kind], n, left_out)]
    return {caption: images for caption, images in rows.items() if images}, left_out


def _take(candidates: Sequence[tuple[Path, ...]], n: int, left_out: list[str]) -> "Iterator[list[Tensor]]":
    """Read ``n`` of those whose files are all there, spread evenly; say of undecodable ones why they are left out."""
    there = [files for files in candidates if all(file_size(file) is not None for file in files)]
    for files in _spread(there, n):
        try:
            yield [load_image(file, SAMPLE_SIDE) for file in files]
        except BadImageError as error:
            left_out.append(str(error))


def _spread(items: Sequence[T], n: int) -> Sequence[T]:
    """Choose at most ``n``, evenly."""
    return [items[i * len(items) // n] for i in range(n)] if len(items) > n else items


def write_contact_sheet(
    folder: Path,
    output: Path,
    preset: Literal["mild", "medium", "severe"] = "medium",
    visits: int = 5,
    images: int = 8,
    seed: int = 0,
) -> Path:
    """Draw simulated visits to a folder's images on one sheet.

    A row an image: first the image itself, then its visits. A chosen image that cannot be decoded ends the command by
    name: a sheet with gaps would pass for the whole folder.

    Args:
        folder: Folder of images, searched with its subfolders.
        output: File to write, .png or .jpg.
        preset: How strong the visits are.
        visits: Visits per image.
        images: At most so many images, spread evenly over the folder in the order of their paths.
        seed: Another seed, from 0 up, gives other visits.
    """
    from metilr.data.visits import PRESETS, derive_seed, refuse_bad_seed, simulate_visit  # torch, too slow for --help

    folder, output = Path(folder), Path(output)
    for name, number in (("visits", visits), ("images", images)):
        if number < 1:
            raise UserError(f"{number}: choose 1 or more", name)
    kind = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}.get(output.suffix.lower())
    if kind is None:
        raise UserError(f"{output}: end the sheet's name with .png or .jpg", "output")
    refuse_bad_seed(seed)

    paths, left_aside = find_images(folder)
    rows = []
    for path in _spread(paths, images):
        try:
            image = load_image(path)
            image = load_image(path, VISIT_SIDE) if max(image.shape) > VISIT_SIDE else image
        except BadImageError as error:
            raise UserError(f"{path}: cannot be decoded ({error.reason}); move it out of {folder}") from None
        name = path.relative_to(folder).as_posix()
        seeds = [derive_seed(seed, name, visit) for visit in range(visits)]
        rows.append([image, *(simulate_visit(image, PRESETS[preset], each) for each in seeds)])
    output.parent.mkdir(parents=True, exist_ok=True)
    write_picture(output, partial(arrange(rows).save, format=kind))
    print(f"wrote {output}" + (f"; left aside: {left_aside}" if left_aside else ""))
    return output


def arrange(rows: "Sequence[Sequence[Tensor]]", captions: Sequence[str] = ()) -> Image.Image:
    """Lay rows of images, uint8 ``(3, H, W)`` each, out on a white sheet, each under its caption if there is one."""
    line = 24 if captions else 0
    columns = max(len(images) for images in rows)
    height = MARGIN + len(rows) * (line + CELL + MARGIN)
    sheet = Image.new("RGB", (MARGIN + columns * (CELL + MARGIN), height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=16)
    for row, images in enumerate(rows):
        row_top = MARGIN + row * (line + CELL + MARGIN)
        if captions:
            draw.text((MARGIN, row_top), captions[row], fill="black", font=font)
        for column, image in enumerate(images):
            tile = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
            tile.thumbnail((CELL, CELL))
            left = MARGIN + column * (CELL + MARGIN) + (CELL - tile.width) // 2
            sheet.paste(tile, (left, row_top + line + (CELL - tile.height) // 2))
    return sheet
