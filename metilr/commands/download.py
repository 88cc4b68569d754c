"""``metilr download``: the Met dataset from its official place into a data root, checked."""

import datetime
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pydantic
from rich.markup import escape
from rich.progress import Progress

from metilr.commands.verify import FILES, PartName, check, print_verification
from metilr.download import fetch, remote_size
from metilr.download.archives import ARCHIVES, OFFICIAL, PUBLISHED_IMAGES, Archive, DataSet, unpack
from metilr.errors import UserError, one_line
from metilr.files import alone_in, file_sha256, read_json, write_atomically
from metilr.progress import byte_progress, make_console

PARTS_OF: dict[DataSet, tuple[PartName, ...]] = {
    "queries": ("val", "test"),
    "mini": ("mini", "val", "test"),
    "full": ("full", "mini", "val", "test"),
}
ALL = -1  # members of an archive are unpacked
GZIP = b"\x1f\x8b"  # how all such files begin
REMEDY = "run the same command again, or name a copy of the archives as mirror"


def download(
    root: Path = Path("data/met"),
    queries: bool = False,
    mini: bool = False,
    full: bool = False,
    mirror: str | None = None,
    keep_archives: bool = True,
    quiet: bool = False,
) -> None:
    """Download the Met dataset, check it and unpack it.

    One of three sets: --queries, --mini (what is downloaded without any of them) or --full, each with the ground
    truth and the queries of val and test. Interrupted, the same command continues.

    Args:
        root: Data root to fill: ground_truth/, images/, and archives/ with the archives and downloads.json.
        queries: No database images.
        mini: With the mini database: a download of 3 GB and the queries' archives.
        full: With the full database: a download of 28 GB and the queries' archives.
        mirror: Address of a folder with a copy of the archives, in place of the official one. What was begun
            elsewhere begins anew; digests are checked all the same.
        keep_archives: Keep the archives when all is unpacked and verified; else they are deleted.
        quiet: Show no progress.
    """
    sets: dict[DataSet, bool] = {"queries": queries, "mini": mini or not (queries or full), "full": full}
    chosen, *others = [name for name, wanted in sets.items() if wanted]
    if others:
        raise UserError(f"and {others[0]} exclude each other; choose one", chosen)
    base = OFFICIAL if mirror is None else mirror if mirror.endswith("/") else mirror + "/"
    if not base.startswith(("http://", "https://")):
        raise UserError(f"{mirror}: must be an address such as http://host/folder/", "mirror")
    console, root = make_console(), Path(root)
    folder = root / "archives"
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder, "another download", "stop it"):
        records = Records(folder / "downloads.json")
        if pending := [archive for archive in ARCHIVES[chosen] if not records.is_done(archive)]:
            need = _require_space(pending, root, base)
            names = ", ".join(archive.name for archive in pending)
            console.print(f"[bold]{chosen}[/] from {escape(base)}: {names}; {need}")
            with byte_progress(quiet, console) as progress:
                for archive in pending:
                    obtain(archive, root, base + archive.name, records, progress)
        found = check(root, PARTS_OF[chosen], quiet=quiet)
        print_verification(console, found)
        for part, paths in found.paths.items():
            if len(paths) != (n := PUBLISHED_IMAGES[part]):
                note = f"{FILES[part]} names {len(paths):,} images, {n:,} were published: its figures do not compare"
                console.print(f"[bold yellow]note:[/] {note}")
        if found.faults:
            for archive in ARCHIVES[chosen]:
                folder_name = archive.folder.removeprefix("images/") + "/"
                if archive.name in records.of and any(path.startswith(folder_name) for path in found.faults):
                    records.put(archive.name, records.of[archive.name].model_copy(update={"unpacked": 0}))
            console.print("the same command unpacks these again")
            sys.exit(1)
        if not keep_archives:
            for archive in ARCHIVES[chosen]:
                (folder / archive.name).unlink(missing_ok=True)
    if chosen != "queries":
        console.print(f"now: metilr evaluate --root {escape(str(root))} --database {chosen}")


class Record(pydantic.BaseModel, extra="forbid"):
    """What is known of an archive that was downloaded whole."""

    url: str
    bytes: int = pydantic.Field(ge=0)
    sha256: str
    date: str
    unpacked: int = pydantic.Field(default=0, ge=ALL)  # the first edition counted members


class Records:
    """downloads.json of a folder of archives."""

    def __init__(self, file: Path) -> None:
        self.file, self._type = file, pydantic.TypeAdapter(dict[str, Record])
        try:
            self.of = self._type.validate_python(read_json(file)) if file.exists() else {}
        except ValueError as error:
            raise UserError(f"{file}: not readable ({one_line(error)}); delete it, then all is checked anew") from None

    def is_done(self, archive: Archive) -> bool:
        """Whether an archive is unpacked, all of it, and was the published one."""
        record = self.of.get(archive.name)
        return record is not None and record.unpacked == ALL and archive.sha256 in (None, record.sha256)

    def put(self, name: str, record: Record) -> None:
        """Write the record of an archive."""
        self.of[name] = record
        write_atomically(self.file, self._type.dump_json(self.of, indent=1).decode() + "\n")


def obtain(archive: Archive, root: Path, url: str, records: Records, progress: Progress) -> None:
    """Download an archive, check its digest and unpack it, as far as that is not done."""
    path = records.file.parent / archive.name
    task = progress.add_task(archive.name, total=None)

    def show(what: str, done: int, total: int | None) -> None:
        progress.update(task, description=f"{what} {archive.name}", completed=done, total=total)

    if not path.is_file():
        fetch(url, path, REMEDY, size=archive.size, sha256=archive.sha256, report=partial(show, "downloading"))
    with path.open("rb") as file:
        is_gzip = file.read(2) == GZIP
    if not is_gzip:  # networks that want a log-in send a page in its place
        path.unlink()
        raise UserError(f"{url}: what came is no .tar.gz and was thrown away; {REMEDY}")
    size = path.stat().st_size
    record = _checked(archive, path, url, file_sha256(path, lambda done: show("checking", done, size)), records)
    folder = root / archive.folder
    n = unpack(path, archive, folder, lambda done: show("unpacking", done, size))
    records.put(archive.name, record.model_copy(update={"unpacked": ALL}))
    progress.console.print(f"{archive.name}: {n:,} files in {escape(str(folder))}")


def _checked(archive: Archive, path: Path, url: str, digest: str, records: Records) -> Record:
    """Refuse what is not the published archive or not the one that was here before; record a new one."""
    record = records.of.get(archive.name)
    if archive.sha256 is not None:
        if digest != archive.sha256:
            raise UserError(
                f"{path}: its sha256 is {digest}, the published archive's {archive.sha256}; delete it, and the same "
                "command downloads it again"
            )
    elif record is not None and record.sha256 != digest:
        raise UserError(
            f"{path}: its sha256 is {digest}, but {record.sha256} was recorded on {record.date}; delete it to "
            f"download it again, or, if the publisher has changed it, its entry in {records.file}"
        )
    if record is None or record.sha256 != digest:
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        record = Record(url=url, bytes=path.stat().st_size, sha256=digest, date=date)
        records.put(archive.name, record)
    return record


def _require_space(archives: Sequence[Archive], root: Path, base: str) -> str:
    """Say what will be written, asking the server where no size is published; refuse it where there is no room."""
    to_load = to_unpack = 0
    unknown = []
    for archive in archives:
        path = root / "archives" / archive.name
        part = path.with_name(path.name + ".part")
        have = next((file.stat().st_size for file in (path, part) if file.is_file()), 0)
        size = have if path.is_file() else archive.size or remote_size(base + archive.name) or archive.about
        unknown += [] if size else [archive.name]
        to_load += max(0, size - have)
        unpacked = sum(file.lstat().st_size for file in (root / archive.folder).rglob("*") if file.is_file())
        to_unpack += max(0, int(size * archive.growth) - unpacked)
    need = f"{to_load / 1e9:.1f} GB of archives, about {to_unpack / 1e9:.1f} GB of files"
    need += f", {' and '.join(unknown)} of unknown size and not counted" if unknown else ""
    free = shutil.disk_usage(root).free
    if to_load + to_unpack > free:
        raise UserError(f"{root}: {free / 1e9:.1f} GB free, needed are {need}; name a place with room", "root")
    return need
