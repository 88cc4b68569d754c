"""``metilr verify ROOT``: whether a data root is whole: every image of the ground truth there and readable."""

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from metilr.data.decode import MAX_MEGAPIXELS, BadImageError, file_size, image_shape, limit_images, load_image
from metilr.data.ground_truth import DATABASE_FILES, QUERY_FILES, DatabaseName, file_below, load_ground_truth, nfc
from metilr.data.pixels import ImageSize
from metilr.data.tables import as_csv
from metilr.distributed import default_workers
from metilr.errors import UserError, amount_is
from metilr.extraction.options import ImageShape, size_of
from metilr.files import write_atomically
from metilr.models import RANDOM, UnfitSizeError
from metilr.progress import counted, make_console, printable

PartName = Literal["full", "mini", "val", "test"]
PARTS: tuple[PartName, ...] = ("full", "mini", "val", "test")  # of a data root: both databases and both query splits
FILES: dict[str, str] = {**QUERY_FILES, "full": DATABASE_FILES["full"], "mini": DATABASE_FILES["mini"]}
MISSING, EMPTY = "missing", "empty"
READERS = 8  # threads that read headers: the time goes into waiting for the disk
SHOWN = 10  # faults that are printed


@dataclass(frozen=True)
class Verification:
    """What was looked at, and what is wrong with it."""

    paths: dict[PartName, tuple[str, ...]]  # of the images of each part that was verified, relative to images/
    faults: dict[str, str]  # by path the reason
    left_out: tuple[PartName, ...]  # databases whose ground truth is there, but none of their own images
    decoded: bool  # every image whole; else its header alone
    backbone: str | None = None  # whose smallest size they were held against

    def faults_of(self, part: PartName) -> dict[str, str]:
        """The faults of one part."""
        return {path: self.faults[path] for path in self.paths[part] if path in self.faults}


def verify(
    root: Path,
    parts: Sequence[PartName] = (),
    decode: bool = False,
    max_megapixels: float = MAX_MEGAPIXELS,
    list: Path | None = None,
    num_workers: int | None = None,
    quiet: bool = False,
    backbone: str | None = None,
    scales: Sequence[float] | None = None,
    image_size: int | None = None,
    image_shape: ImageShape = "keep",
) -> None:
    """Check that every image of a ground truth is there and readable.

    The exit status is 1 if one is not.

    Args:
        root: Folder with ground_truth/ and images/ in the Met layout.
        parts: What to check: full and mini (the databases), val, test. Without it all whose ground truth is there,
            a database only if one of its images is there too; for full, one that the mini database lacks.
        decode: Decode every image whole, several at once; without it its header alone, and a file that is cut short
            counts as fine.
        max_megapixels: An image of more counts as not readable.
        list: CSV file for all that is wrong, with the columns part, path and reason.
        num_workers: Images that are decoded at once; without it as many as cores are free, at most 8.
        quiet: Show no progress.
        backbone: An image that is too small for this one counts as wrong, too; a name, as in an evaluation.
        scales: Relative sizes at which the backbone sees an image; without it an evaluation's.
        image_size: Longest side in px that images are resized to for the backbone; without it as they are.
        image_shape: As in an evaluation.
    """
    limit_images(max_megapixels)
    if list is not None and not Path(list).parent.is_dir():
        raise UserError(f"{list}: there is no folder {Path(list).parent}; make it, or name another file", "list")
    found = check(Path(root), parts, decode, num_workers, quiet, backbone, scales, size_of(image_size, image_shape))
    print_verification(make_console(), found, list)
    if list is not None:
        rows = ((part, *fault) for part in found.paths for fault in found.faults_of(part).items())
        write_atomically(Path(list), as_csv([("part", "path", "reason"), *rows]))
    if found.faults:
        sys.exit(1)


def check(
    root: Path,
    parts: Sequence[PartName] = (),
    decode: bool = False,
    num_workers: int | None = None,
    quiet: bool = False,
    backbone: str | None = None,
    scales: Sequence[float] | None = None,
    image_size: ImageSize | None = None,
) -> Verification:
    """Look at the images of a data root; see ``verify``."""
    check_size = _size_check(backbone, scales, image_size)
    if num_workers is not None and num_workers < 0:
        raise UserError(f"{num_workers}: choose 0 or more", "num_workers")
    named = _read_paths(root, parts)
    there = {part: paths for part, paths in named.items() if parts or _is_meant(root, part, named)}
    unique = [*dict.fromkeys(path for paths in there.values() for path in paths)]  # mini's are among full's
    files = [file_below(root / "images", path) for path in unique]
    if not parts and not any(map(file_size, files)):
        raise UserError(f"{root / 'images'}: none of the images that {root / 'ground_truth'} names is there; put them")
    threads = READERS if not decode else default_workers(1) if num_workers is None else max(1, num_workers)
    title = "decoding" if decode else "reading headers"
    faults: dict[str, str] = {}
    with counted(title, len(files), "images", quiet) as done, ThreadPoolExecutor(threads) as pool:
        try:
            find = partial(find_fault, decode=decode, image_size=image_size, check_size=check_size)
            for path, reason in zip(unique, pool.map(find, files), strict=True):
                if reason is not None:
                    faults[path] = reason
                done(1)
        finally:
            pool.shutdown(cancel_futures=True)
    return Verification(there, faults, tuple(part for part in named if part not in there), decode, backbone)


def _size_check(
    backbone: str | None, scales: Sequence[float] | None, image_size: ImageSize | None
) -> Callable[[int, int], None] | None:
    """What refuses a size that is too small for a backbone: its weights do not matter."""
    if backbone is None:
        for name, value in (("scales", scales), ("image_size", image_size)):
            if value is not None:
                raise UserError("has no effect without backbone; leave it out", name)
        return None
    from metilr.models.embedder import build_embedder  # seconds to import

    embedder = build_embedder(backbone, RANDOM, scales=scales)
    embedder.check_image_size(image_size)
    return embedder.check_size


def find_fault(
    file: Path,
    decode: bool = False,
    image_size: ImageSize | None = None,
    check_size: Callable[[int, int], None] | None = None,
) -> str | None:
    """Say in a few words why an image file cannot be used; None if it can. A failing disk raises OSError."""
    size = file_size(file)
    if not size:
        return MISSING if size is None else EMPTY
    try:
        height, width = load_image(file, image_size).shape[1:] if decode else image_shape(file, image_size)
        if check_size is not None:
            check_size(height, width)
    except BadImageError as error:
        return error.reason
    except UnfitSizeError as error:
        return str(error)
    return None


def _read_paths(root: Path, parts: Sequence[PartName]) -> dict[PartName, tuple[str, ...]]:
    """Image paths of the parts of a data root, from its ground truth; by default of all whose file is there."""
    wanted = [part for part in PARTS if (part in parts if parts else (root / "ground_truth" / FILES[part]).is_file())]
    queries = [part for part in wanted if part in QUERY_FILES]
    databases: list[DatabaseName] = [name for name in DATABASE_FILES if name in wanted]
    if not databases:  # queries are understood with a database; either will do
        databases = ["mini" if (root / "ground_truth" / DATABASE_FILES["mini"]).is_file() else "full"]
    paths: dict[str, tuple[str, ...]] = {}
    for database in databases:
        ground_truth = load_ground_truth(root, database, queries)
        paths |= {**ground_truth.paths, database: ground_truth.paths["database"]}
        queries = []
    return {part: paths[part] for part in wanted}


def _is_meant(root: Path, part: PartName, named: dict[PartName, tuple[str, ...]]) -> bool:
    """Queries are; of the databases, whose ground truth comes together, those that have an image of their own."""
    if part in QUERY_FILES:
        return True
    mini = frozenset(map(nfc, named.get("mini", ()) if part == "full" else ()))
    own = [path for path in named[part] if nfc(path) not in mini] or named[part]
    return any(file_size(file_below(root / "images", path)) is not None for path in own)


def print_verification(console: Console, found: Verification, list_file: Path | None = None) -> None:
    """Print the counts of each part, and the first faults."""
    others = "not readable" if found.backbone is None else "not readable or too small"
    columns = (Column(name, justify="right") for name in ("images", "fine", MISSING, EMPTY, others))
    table = Table("", *columns, title="decoded whole" if found.decoded else "headers read", title_justify="left")
    for part, paths in found.paths.items():
        reasons = [*found.faults_of(part).values()]
        missing, empty = reasons.count(MISSING), reasons.count(EMPTY)
        counts = (len(paths), len(paths) - len(reasons), missing, empty, len(reasons) - missing - empty)
        table.add_row(part, *(f"{n:,}" for n in counts))
    console.print(table, soft_wrap=False)
    for part in found.left_out:
        console.print(f"{part}: not verified, {FILES[part]} is there and none of its own images")
    for path, reason in [*found.faults.items()][:SHOWN]:
        console.print(f"  {escape(printable(path))}: {escape(printable(reason))}")
    n = len(found.faults)
    if n > SHOWN:
        rest = "--list FILE writes all" if list_file is None else f"all are in {escape(str(list_file))}"
        console.print(f"  and {n - SHOWN:,} more; {rest}")
    console.print("[bold]nothing is wrong[/]" if not n else f"[bold red]{amount_is(n, 'image')} wrong[/]")
