"""``metilr download``: the Met dataset from its official place into a data root, checked."""

import sys
import urllib.parse
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from metilr.commands.verify import FILES, PartName, Verification, check, print_verification
from metilr.data.archives import ARCHIVES, OFFICIAL, PUBLISHED_IMAGES, DataSet
from metilr.data.disk_space import find_need, require_space
from metilr.data.download_records import DownloadRecords
from metilr.data.obtain import Workplace, is_unpacked, obtain_all
from metilr.errors import UserError
from metilr.locks import alone_in
from metilr.progress import byte_progress

PARTS_OF: dict[DataSet, tuple[PartName, ...]] = {
    "queries": ("val", "test"),
    "mini": ("mini", "val", "test"),
    "full": ("full", "mini", "val", "test"),
}


def download(
    root: Path = Path("data/met"),
    queries: bool = False,
    mini: bool = False,
    full: bool = False,
    mirror: str | None = None,
    keep_archives: bool = True,
    quiet: bool = False,
) -> None:
    """Download the Met dataset, check it and unpack it; interrupted, the same command continues.

    One of three sets: --queries, --mini (what is downloaded without any of them) or --full, each with the ground
    truth and the queries of val and test.

    Args:
        root: Data root to fill: ground_truth/, images/, and archives/ with the archives and downloads.json.
        queries: No database images.
        mini: With the mini database: a download of 3 GB and the queries' archives.
        full: With the full database: a download of 28 GB and the queries' archives.
        mirror: Address of a folder with a copy of the archives, in place of the official one. What was begun
            elsewhere begins anew; digests are checked all the same.
        keep_archives: Keep the archives when all is unpacked and verified; else they are deleted.
        quiet: Show no progress.

    Raises:
        UserError: If an archive cannot be had or is not what it should be, or the disk is too small.
    """
    chosen = _chosen(queries, mini, full)
    base = OFFICIAL if mirror is None else _checked_address(mirror)
    console = Console(highlight=False)
    root = Path(root)
    folder = root / "archives"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (root / "images").mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"--root {root}: cannot be written ({error.strerror}); name another folder") from error
    with alone_in(folder, "another download", "stop it"):
        records = DownloadRecords(folder / "downloads.json")
        pending = [each for each in ARCHIVES[chosen] if not is_unpacked(records.get(each.name), each)]
        if pending:
            need = find_need(pending, root, folder, base)
            names = ", ".join(each.name for each in pending)
            console.print(f"[bold]{chosen}[/] from {escape(base)}: {names}; {need.described()}", soft_wrap=True)
            require_space(need, folder, root / "images")
            with byte_progress(quiet, console) as progress:
                obtain_all(pending, Workplace(root, base, records, progress))
        found = check(root, PARTS_OF[chosen], quiet=quiet)
        print_verification(console, found)
        _note_other_counts(console, found)
        if found.faults:
            _unpack_again(records, found, chosen)
            console.print("the same command unpacks the archives of these again")
            sys.exit(1)
        if not keep_archives:
            for each in ARCHIVES[chosen]:
                (folder / each.name).unlink(missing_ok=True)
    if chosen != "queries":
        console.print(f"now: metilr evaluate --root {escape(str(root))} --database {chosen}", soft_wrap=True)


def _chosen(queries: bool, mini: bool, full: bool) -> DataSet:
    sets: dict[DataSet, bool] = {"queries": queries, "mini": mini, "full": full}
    chosen = [name for name, wanted in sets.items() if wanted]
    if len(chosen) > 1:
        raise UserError(f"{' and '.join(f'--{name}' for name in chosen)} exclude each other; choose one")
    return chosen[0] if chosen else "mini"


def _checked_address(mirror: str) -> str:
    """Return a mirror's address with a slash at its end.

    Raises:
        UserError: If it is none of HTTP.
    """
    try:
        parts = urllib.parse.urlsplit(mirror)
        well_formed = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        (parts.hostname or "").encode("idna")  # as it is done to find the host
    except ValueError:  # a port that is no number, a name that none can have
        well_formed = False
    if not well_formed or not mirror.isascii() or not mirror.isprintable() or " " in mirror:
        raise UserError(f"--mirror {mirror}: must be an address such as http://host/folder/")
    return mirror if mirror.endswith("/") else mirror + "/"


def _note_other_counts(console: Console, found: Verification) -> None:
    for part, paths in found.paths.items():
        if len(paths) != PUBLISHED_IMAGES[part]:
            console.print(
                f"[bold yellow]note:[/] {FILES[part]} names {len(paths):,} images, {PUBLISHED_IMAGES[part]:,} were "
                "published: figures measured on it are not comparable",
                soft_wrap=True,
            )


def _unpack_again(records: DownloadRecords, found: Verification, chosen: DataSet) -> None:
    """Have the archives unpacked anew from which something is missing or broken."""
    for archive in ARCHIVES[chosen]:
        folder = archive.folder.removeprefix("images/") + "/"
        if records.get(archive.name) and any(path.startswith(folder) for path in found.faults):
            records.set_unpacked(archive.name, 0)
