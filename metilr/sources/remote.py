"""A catalogue of images elsewhere: downloaded first, from a table of addresses or from IIIF."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from metilr.data.decode import BadImageError, begins_as_image, load_image
from metilr.data.exhibit import is_address
from metilr.data.ground_truth import as_name
from metilr.errors import UserError, one_line, shown
from metilr.files import read_json
from metilr.progress import counted
from metilr.sources.catalogue import Catalogue, Row, about_rows, from_rows, refuse_one_exhibit, rows_of, with_images
from metilr.sources.fetch import DownloadError, DownloadOptions, Downloads, run_downloads
from metilr.sources.iiif import Found, Place, find_in_iiif, image_request
from metilr.sources.iiif_values import ODD

NOT_ASKED = "more than max_images; raise it"
INFO_MEGABYTES = 1.0  # of an image's info.json, which has a few kB
DECODING = threading.Lock()  # one at a time: each may take half a gigabyte


def read_source(
    source: str | Path, folder: Path, options: DownloadOptions | None = None, side: int | None = None,
    language: str = "en", ask_again: bool = False, quiet: bool = False,
) -> Catalogue:  # fmt: skip
    """Read a museum's catalogue that is no folder, and download its images where they are elsewhere.

    Args:
        source: A table of images, CSV or Parquet, or a IIIF manifest or collection, as a file or at an address. What it
            is its content tells.
        folder: Where downloads go.
        options: How they are made.
        side: Longest side in px that is asked of a IIIF image service; None for the largest that there is.
        language: Of texts in IIIF that come in several.
        ask_again: Whether what was downloaded before is asked for again, to be exchanged where it has changed.
        quiet: Without progress.

    Raises:
        UserError: If the source cannot be read, or leads to fewer than 2 exhibits. Single images that cannot be had
            are listed in ``failed`` of the catalogue.
    """
    options = options or DownloadOptions()
    if not is_address(str(source)):
        source = Path(source)
        if not source.is_file():
            raise UserError(f"{source}: no such file or folder; name images, a table or a IIIF document", "source")
        if not _is_json(source, str(source)):
            rows = rows_of(source)
            if not is_address(with_images(source, rows)[0].image):
                catalogue = from_rows(source.absolute().parent, source, rows)
                refuse_one_exhibit(catalogue, str(source), "list more")
                return catalogue
    try:
        return run_downloads(_downloaded(str(source), folder, options, side, language, ask_again, quiet))
    except DownloadError as error:
        raise UserError(f"{source}: {error}") from None


async def _downloaded(
    source: str, folder: Path, options: DownloadOptions, side: int | None, language: str, ask_again: bool, quiet: bool
) -> Catalogue:
    async with Downloads(folder, options, ask_again) as downloads:
        file = Path(source)
        if is_address(source):
            file = await downloads.file(source, lambda file: None, is_source=True)
        if _is_json(file, source):
            try:
                document = read_json(file)
            except ValueError as error:
                raise DownloadError(f"is no JSON ({error})") from None
            found = await find_in_iiif(document, source, downloads, options.max_images, language)
        else:
            found = _of_rows(with_images(source, rows_of(file)), source)
        found.failed.update(dict.fromkeys((place.address for place in found.places[options.max_images :]), NOT_ASKED))
        places = found.places[: options.max_images]
        with counted("downloading images", len(places), "images", quiet) as done:
            files = await _images(places, downloads, side, done)
    for address in dict.fromkeys(downloads.kept):
        found.failed[address] = "gave no answer; what it gave before is kept"
    return _catalogue(folder, source, places, files, found)


async def _images(
    places: Sequence[Place], downloads: Downloads, side: int | None, done: Callable[[int], None]
) -> list[Path | str]:
    """Download each image, some at a time; in the place of one that cannot be had why."""
    files: list[Path | str] = [""] * len(places)
    left = iter(enumerate(places))

    async def work() -> None:
        for i, place in left:
            try:
                address = place.address
                if place.is_service:
                    info = await downloads.document(f"{address}/info.json", INFO_MEGABYTES)
                    address = image_request(info, side)
                files[i] = await downloads.file(address, _check_image)
            except DownloadError as error:
                files[i] = str(error)
            except ODD as error:
                files[i] = f"its info.json is malformed ({one_line(error)})"
            done(1)

    await asyncio.gather(*(work() for _ in range(downloads.options.connections)))
    return files


def _catalogue(
    folder: Path, source: str, places: Sequence[Place], files: Sequence[Path | str], found: Found
) -> Catalogue:
    shown_by: dict[str, str] = {}
    for place, file in zip(places, files, strict=True):
        exhibit = as_name(place.exhibit)
        if isinstance(file, str):
            found.failed[place.address] = file
        elif (other := shown_by.setdefault(file.name, exhibit)) != exhibit:
            found.failed[place.address] = f"is of exhibit {exhibit} and of {other}; taken for the latter's"
    if not shown_by:
        where, why = next(iter(found.failed.items()))
        raise UserError(f"{source}: none of its images can be had; the first, {where}: {why}")
    names = {*shown_by.values()}
    about = {as_name(name): exhibit for name, exhibit in found.exhibits.items() if as_name(name) in names}
    paths, exhibits = tuple(shown_by), tuple(shown_by.values())
    catalogue = Catalogue(folder.absolute(), paths, exhibits, about, found.name, failed=found.failed)
    refuse_one_exhibit(catalogue, source, "name a collection, or a manifest of several canvases")
    return catalogue


def _of_rows(rows: Sequence[Row], source: str) -> Found:
    """The places of a table of addresses."""
    for row in rows:
        if not is_address(row.image):
            fault = f"{shown(row.image)} is no web address, as others here are; use one kind"
            raise UserError(f"{source}: line {row.line}: {fault}")
    return Found(Path(source).stem, [Place(row.image, row.exhibit) for row in rows], about_rows([*rows]))


def _is_json(file: Path, source: str) -> bool:
    """Whether a source's file is JSON by its first bytes; UserError if it is neither that nor a table."""
    with file.open("rb") as stream:
        head = stream.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith((b"<", b"%PDF")):
        raise UserError(f"{source}: is a page or a document; name a IIIF manifest (JSON) or a table (CSV, Parquet)")
    return head[:1] in (b"{", b"[")


def _check_image(file: Path) -> None:
    if not begins_as_image(file):
        raise DownloadError("is no image")
    try:
        with DECODING:
            load_image(file)
    except BadImageError as error:
        raise DownloadError(f"cannot be decoded ({error.reason})") from None
