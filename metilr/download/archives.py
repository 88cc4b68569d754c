"""The official archives of the Met dataset: where they are, what is in them, and their unpacking.

Source: http://cmp.felk.cvut.cz/met/. Sizes and digests stand here where they are published; those of the other archives
are recorded at the first download, and a later difference is refused.
"""

import gzip
import shutil
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Literal

from metilr.errors import UserError

OFFICIAL = "http://ptak.felk.cvut.cz/met/dataset/"
MOST_GROWTH = 100  # bytes of files for each of an archive's: JSON shrinks to a fifth, images not at all
LONGEST_NAME = 240  # bytes, as disks take them
LONGEST_READ = 1 << 26  # bytes: a member's header that claims more is no header

DataSet = Literal["queries", "mini", "full"]


@dataclass(frozen=True)
class Archive:
    """One .tar.gz; sizes are in bytes.

    ``depth`` says how many of the last parts of a file's path in the archive say where in the folder it goes:
    ``<id>/<n>.jpg`` of a database image, the name alone of the others.
    """

    name: str
    folder: str  # where its files go, below the data root
    depth: int = 1
    suffix: str = ".jpg"  # of the files that count
    size: int | None = None  # where published, as is sha256
    sha256: str | None = None
    about: int = 0  # roughly, where size is unknown
    growth: float = 1.0  # bytes of its files for each of its own, estimated


_QUERIES = (
    Archive("ground_truth.tar.gz", "ground_truth", suffix=".json", growth=5.0),
    Archive(
        "test_met.tar.gz",
        "images/test_met",
        size=34_048_842,
        sha256="2bc9b2e906d5fc69c4c136860b42604ef867b69ada10f1e08aa49175cbe08a35",
    ),
    Archive("test_other.tar.gz", "images/test_other"),
    Archive("test_noart.tar.gz", "images/test_noart"),
)
_MINI = Archive(
    "small_MET.tar.gz",
    "images/MET",
    depth=2,
    size=2_865_082_125,
    sha256="0cf5736dee3eac8598daa1a929723834abcb037d57d3f0f0f58018f4bfa9a916",
)
_FULL = Archive("MET.tar.gz", "images/MET", depth=2, about=28_000_000_000)

ARCHIVES: dict[DataSet, tuple[Archive, ...]] = {
    "queries": _QUERIES,
    "mini": (*_QUERIES, _MINI),
    "full": (*_QUERIES, _FULL),
}
PUBLISHED_IMAGES = {"full": 397_121, "mini": 38_307, "val": 2_165, "test": 19_319}  # Ypsilantis et al. 2021; its files


def unpack(file: Path, archive: Archive, folder: Path, report: Callable[[int], None] = lambda done: None) -> int:
    """Unpack an archive's files into a folder, in place of those that are there; returns how many there are.

    ``report`` is called with the bytes of the archive read so far. An archive that is damaged, or of which a member
    would leave the folder or is no regular file, is refused with UserError.
    """
    n_files, n_bytes, most = 0, 0, MOST_GROWTH * file.stat().st_size
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with file.open("rb") as raw, gzip.open(raw) as stream:
            with tarfile.open(fileobj=_Bounded(stream), mode="r:") as tar:  # type: ignore[arg-type,call-overload]
                for member in tar:
                    tarfile.data_filter(member, str(folder))  # refuses ways out of the folder, links and devices
                    n_bytes += member.size
                    if n_bytes > most or not (member.isreg() or member.isdir()) or member.issparse():
                        raise tarfile.TarError(f"{member.name!r} is no plain file, or one of absurd size")
                    path = PurePosixPath(member.name)
                    if member.isreg() and path.suffix.lower() == archive.suffix and not path.name.startswith("."):
                        if len(path.parts) < archive.depth:
                            raise tarfile.TarError(f"{member.name!r} lies in another folder than was expected")
                        if len(path.name.encode()) > LONGEST_NAME:
                            raise tarfile.TarError("a file's name is too long for a disk")
                        n_files += 1
                        _write(tar, member, folder, folder.joinpath(*path.parts[-archive.depth :]))
                    report(raw.tell())
            while rest := stream.read(1 << 20):  # a damaged header looks like the end, but for what comes after it
                if rest.strip(b"\0"):
                    raise tarfile.ReadError("damaged before its end")
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError, OverflowError) as error:
        fault = f"cannot be unpacked ({' '.join(str(error).split())[:200]})"
        raise UserError(f"{file}: {fault}; delete it, and the same command downloads it again") from None
    return n_files


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path, target: Path) -> None:
    if not target.parent.resolve().is_relative_to(folder.resolve()):
        raise tarfile.TarError(f"{member.name!r} leads out of {folder} by a link that is there already")
    target.parent.mkdir(parents=True, exist_ok=True)
    content = tar.extractfile(member)
    assert content is not None  # of a regular file there is some
    half = target.with_name(f".{target.name}.member")  # what a killed process leaves, the next one takes up
    with half.open("wb") as stream:
        shutil.copyfileobj(content, stream)
    half.replace(target)


class _Bounded:
    """A stream that refuses to read at once what no header of such an archive has."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream
        self.tell, self.seek = stream.tell, stream.seek

    def read(self, n: int) -> bytes:
        if not 0 <= n <= LONGEST_READ:
            raise tarfile.ReadError(f"a header of {n:,} bytes")
        return self.stream.read(n)
