"""``metilr verify ROOT``: whether a data root is whole: every image of the ground truth there and readable."""

import csv
import io
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from metilr.data.decode import (
    MAX_MEGAPIXELS,
    BadImageError,
    file_size,
    image_shape,
    limit_images,
    load_image,
    max_pixels,
)
from metilr.data.ground_truth import DATABASE_FILES, QUERY_FILES, DatabaseName, load_ground_truth
from metilr.distributed import default_workers, faults_in_one_line, leave_signals_to_the_parent
from metilr.errors import UserError
from metilr.files import write_atomically
from metilr.progress import counted, printable

MISSING, EMPTY = "missing", "empty"
READERS = 8  # threads that read headers: the time goes into waiting for the disk
BATCH = 64  # images that a thread or a process looks at before it answers


def find_fault(file: Path, decode: bool = False, limit: int | None = None) -> str | None:
    """Say in a few words why an image file cannot be used; None if it can.

    Args:
        file: The image.
        decode: Decode all of it; without it the header alone, and a file that is cut short counts as fine.
        limit: See ``load_image``.

    Raises:
        OSError: If the disk, not the file, is at fault.
    """
    size = file_size(file)
    if not size:
        return MISSING if size is None else EMPTY
    try:
        (load_image if decode else image_shape)(file, limit=limit)
    except BadImageError as error:
        return error.reason
    return None


def find_faults(
    files: Sequence[Path], decode: bool = False, num_workers: int | None = None, quiet: bool = False
) -> dict[int, str]:
    """Look at many image files.

    Args:
        files: The images.
        decode: See ``find_fault``; in several processes.
        num_workers: Decoding processes; None for as many as cores are free, 0 for none beside this one.
        quiet: Show no progress.

    Returns:
        What is wrong, by position in ``files``.
    """
    faults: dict[int, str] = {}
    batches = _Batches(files, decode)
    found = _by_processes(batches, num_workers) if decode else _by_threads(batches)
    with counted("decoding" if decode else "reading headers", len(files), "images", quiet) as done:
        start = 0
        with faults_in_one_line():
            for reasons in found:
                faults |= {start + i: reason for i, reason in enumerate(reasons) if reason is not None}
                start += len(reasons)
                done(len(reasons))
    return faults


class _Batches(Dataset[list[str | None]]):
    """Item i is what is wrong with each of the i-th ``BATCH`` files."""

    def __init__(self, files: Sequence[Path], decode: bool) -> None:
        self.files, self.decode = files, decode
        self.limit = max_pixels()  # of this process, taken along to its workers

    def __len__(self) -> int:
        return -(-len(self.files) // BATCH)

    def __getitem__(self, i: int) -> list[str | None]:
        return [find_fault(file, self.decode, self.limit) for file in self.files[i * BATCH : (i + 1) * BATCH]]


def _by_threads(batches: _Batches) -> Iterator[list[str | None]]:
    with ThreadPoolExecutor(READERS) as pool:
        try:
            yield from pool.map(batches.__getitem__, range(len(batches)))
        finally:
            pool.shutdown(cancel_futures=True)


def _by_processes(batches: _Batches, num_workers: int | None) -> Iterable[list[str | None]]:
    workers = default_workers(1) if num_workers is None else num_workers
    return DataLoader(
        batches,
        batch_size=None,
        num_workers=min(workers, len(batches)),
        worker_init_fn=leave_signals_to_the_parent,
    )


PartName = Literal["full", "mini", "val", "test"]
PARTS: tuple[PartName, ...] = ("full", "mini", "val", "test")  # of a data root: both databases and both query splits
FILES: dict[str, str] = {**QUERY_FILES, "full": DATABASE_FILES["full"], "mini": DATABASE_FILES["mini"]}
SHOWN = 10  # faults that are printed


@dataclass(frozen=True)
class Verification:
    """What was looked at, and what is wrong with it.

    Attributes:
        paths: The image paths of each part that was verified, relative to ``images/``.
        faults: Those that are wrong, with the reason.
        left_out: Databases whose ground truth is there, but none of their own images.
        decoded: Whether every image was decoded whole, or its header alone.
    """

    paths: dict[PartName, tuple[str, ...]]
    faults: dict[str, str]
    left_out: tuple[PartName, ...]
    decoded: bool

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
) -> None:
    """Check that every image that the ground truth names is there and readable; exit status 1 if one is not.

    Args:
        root: Folder with ground_truth/ and images/ in the Met layout.
        parts: What to check: full and mini (the databases), val, test. Without it all whose ground truth is there,
            a database only if one of its images is there too; for full, one that the mini database lacks.
        decode: Decode every image whole, in several processes; without it its header alone.
        max_megapixels: An image of more counts as not readable.
        list: CSV file for all that is wrong, with the columns part, path and reason.
        num_workers: Decoding processes; without it as many as cores are free, at most 8.
        quiet: Show no progress.

    Raises:
        UserError: If the ground truth is missing or malformed, or none of its images is there.
    """
    console = Console(highlight=False)
    limit_images(max_megapixels)
    if list is not None and not Path(list).parent.is_dir():
        raise UserError(f"--list {list}: there is no folder {Path(list).parent}; make it, or name another file")
    found = check(Path(root), parts, decode, num_workers, quiet)
    print_verification(console, found, list)
    if list is not None:
        write_faults(found, Path(list))
    if found.faults:
        sys.exit(1)


def check(
    root: Path,
    parts: Sequence[PartName] = (),
    decode: bool = False,
    num_workers: int | None = None,
    quiet: bool = False,
) -> Verification:
    """Look at the images of a data root; see ``verify``.

    Raises:
        UserError: If the ground truth is missing or malformed, or none of its images is there.
    """
    if num_workers is not None and num_workers < 0:
        raise UserError(f"--num_workers {num_workers}: choose 0 or more")
    named = read_paths(root, parts)
    there = {part: paths for part, paths in named.items() if parts or _is_meant(root, part, named)}
    if not parts and not any(
        file_size(root / "images" / path) is not None for paths in there.values() for path in paths
    ):
        raise UserError(f"{root / 'images'}: none of the images that {root / 'ground_truth'} names is there; put them")
    unique = [*dict.fromkeys(path for paths in there.values() for path in paths)]  # mini's are among full's
    reasons = find_faults([root / "images" / path for path in unique], decode, num_workers, quiet)
    return Verification(
        there,
        {unique[i]: reason for i, reason in reasons.items()},
        tuple(part for part in named if part not in there),
        decode,
    )


def read_paths(root: Path, parts: Sequence[PartName] = ()) -> dict[PartName, tuple[str, ...]]:
    """Image paths of the parts of a data root, from its ground truth; by default of all whose file is there.

    Raises:
        UserError: If a file is missing or malformed; see ``load_ground_truth``.
    """
    wanted = [part for part in PARTS if (part in parts if parts else (root / "ground_truth" / FILES[part]).is_file())]
    queries = [part for part in wanted if part in QUERY_FILES]
    databases: list[DatabaseName] = [name for name in DATABASE_FILES if name in wanted]
    if not databases:  # queries are understood with a database; either will do
        is_mini = (root / "ground_truth" / DATABASE_FILES["mini"]).is_file()
        databases = ["mini" if is_mini else "full"]
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
    mini = frozenset(named.get("mini", ()) if part == "full" else ())
    own = [path for path in named[part] if path not in mini] or named[part]
    return any(file_size(root / "images" / path) is not None for path in own)


def write_faults(found: Verification, file: Path) -> None:
    """Write everything that is wrong as CSV.

    Raises:
        UserError: If that cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("part", "path", "reason"))
    for part in found.paths:
        writer.writerows((part, path, reason) for path, reason in found.faults_of(part).items())
    try:
        write_atomically(file, text.getvalue())
    except OSError as error:
        raise UserError(f"--list {file}: cannot be written ({error.strerror}); name another file") from error


def print_verification(console: Console, found: Verification, list_file: Path | None = None) -> None:
    """Print the counts of each part, and the first faults."""
    table = Table(title="decoded whole" if found.decoded else "headers read", title_justify="left")
    table.add_column("")
    for column in ("images", "fine", MISSING, EMPTY, "not readable"):
        table.add_column(column, justify="right")
    for part, paths in found.paths.items():
        reasons = [*found.faults_of(part).values()]
        missing, empty = reasons.count(MISSING), reasons.count(EMPTY)
        counts = (len(paths), len(paths) - len(reasons), missing, empty, len(reasons) - missing - empty)
        table.add_row(part, *(f"{n:,}" for n in counts))
    console.print(table)
    for part in found.left_out:
        console.print(f"{part}: not verified, {FILES[part]} is there and none of its own images")
    for path, reason in [*found.faults.items()][:SHOWN]:
        console.print(f"  {escape(printable(path))}: {escape(printable(reason))}", soft_wrap=True)
    n = len(found.faults)
    if n > SHOWN:
        rest = "--list FILE writes all" if list_file is None else f"all are in {escape(str(list_file))}"
        console.print(f"  and {n - SHOWN:,} more; {rest}", soft_wrap=True)
    console.print("[bold]nothing is wrong[/]" if not n else f"[bold red]{n:,} images are wrong[/]")
