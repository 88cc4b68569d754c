"""``metilr identify``: which exhibit of a collection each photo shows."""

import base64
import contextlib
import importlib.resources
from collections.abc import Iterator, Sequence
from json import dumps
from math import exp
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from metilr.collection import Identified, PhotoOptions, Threshold, collection_document, named
from metilr.collection.photos import BadPhotoError, TooManyPixelsError
from metilr.data.decode import BadImageError
from metilr.data.folder import find_images
from metilr.data.tables import as_csv
from metilr.errors import UserError
from metilr.files import write_atomically
from metilr.progress import make_console, printable
from metilr.retrieval.knn import N_MATCHES

if TYPE_CHECKING:
    from metilr.collection.collection import Collection

SCHEMA = "metilr.identify/1"
COLUMNS = (
    "photo", "decision", "exhibit", "title", "artist", "date", "link", "rights", "thumbnail", "more", "similarity",
    "log_confidence", "confidence", "error",
)  # fmt: skip


def identify(
    photos: Sequence[Path],
    options: PhotoOptions | None = None,
    matches: int = N_MATCHES,
    json: bool = False,
    page: Path | None = None,
    csv: Path | None = None,
) -> list[Identified]:
    """Say which exhibit each photo shows, or that it shows none.

    A photo that cannot be read is reported and the others are answered; if none can be read, the command fails.

    Args:
        photos: Photos and folders of photos (with their sub-folders).
        options: What photos are compared with, a run or a store.
        matches: Exhibits listed for each photo, with their nearest images.
        json: Print a JSON document and nothing else.
        page: Also write this .html file, one page with the pictures in it.
        csv: Also write this .csv file, a row a photo.

    Returns:
        What was printed: of each photo its answer and the decision, or why there is none.

    Raises:
        UserError: If an option or a file is not usable, or no photo can be read; says which and what to do.
    """
    options = options or PhotoOptions()
    if matches < 1:
        raise UserError(f"{matches}: must be at least 1", "matches")
    if page is not None and Path(page).suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{page}: name a file that ends in .html", "page")
    if csv is not None and Path(csv).suffix.lower() != ".csv":
        raise UserError(f"{csv}: name a file that ends in .csv", "csv")
    photos = [photos] if isinstance(photos, (str, Path)) else photos
    if not photos:
        raise UserError("name one or more photos, or folders of photos")
    listed = _listed(photos)
    _refuse_none([each for each in listed if isinstance(each, Identified)], len(listed))
    from metilr.collection.open_collection import open_with_threshold  # torch, which takes seconds

    console = make_console(quiet=json)
    collection, chosen = open_with_threshold(options)
    console.print(_head(collection, chosen))
    answered = []
    for photo in _answers(collection, chosen, listed, matches, options.max_pixels, page is not None):
        console.print(_lines(photo, collection))
        answered.append(photo)
    if json:
        document = {
            "schema": SCHEMA,
            "collection": collection_document(collection),
            "threshold": chosen.as_json(),
            "photos": [{"photo": photo.name, **photo.as_json(collection)} for photo in answered],
        }
        print(dumps(document, indent=1, allow_nan=False))
    if page is not None:
        write_page(Path(page), collection, chosen, answered)
        console.print(f"wrote {escape(str(page))}")
    if csv is not None:
        Path(csv).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(csv), as_csv([COLUMNS, *map(_cells, answered)]))
        console.print(f"wrote {escape(str(csv))}")
    _refuse_none([photo for photo in answered if photo.answer is None], len(answered))
    return answered


def _listed(photos: Sequence[Path]) -> list[Path | Identified]:
    """The files of photos and folders, and in the place of what gives none why it does not."""
    listed: list[Path | Identified] = []
    for given in map(Path, photos):
        if not given.exists():
            listed.append(Identified(str(given), error="no such file or folder; name a photo, or a folder of photos"))
            continue
        try:
            files, left_aside = find_images(given) if given.is_dir() else ([given], "")
        except UserError as error:
            listed.append(Identified(str(given), error=str(error)))
            continue
        if left_aside:
            remedy = "convert images among them to JPEG, name linked folders"
            listed.append(Identified(str(given), error=f"left aside: {left_aside}; {remedy}"))
        listed += files
    return listed


def _refuse_none(bad: Sequence[Identified], n: int) -> None:
    """Fail if all of n photos are bad."""
    if len(bad) == n:
        raise UserError(f"no photo could be read; the first, {printable(bad[0].name)}: {bad[0].error}")


def _answers(
    collection: "Collection", threshold: Threshold, listed: Sequence[Path | Identified], n_matches: int,
    max_pixels: int, draw: bool,
) -> Iterator[Identified]:  # fmt: skip
    from metilr.report.page import jpeg_of

    for file in listed:
        if isinstance(file, Identified):
            yield file
            continue
        try:
            photo, answer = collection.answer_file(file, max_pixels, n_matches, draw)
        except BadPhotoError as error:
            hint = ", or raise max_megapixels" if isinstance(error, TooManyPixelsError) else ""
            yield Identified(str(file), error=f"{error}{hint}")
        else:
            picture = jpeg_of(photo.image) if draw else None
            decision = threshold.decide(answer.log_confidence)
            has_val = threshold.figures is not None
            yield Identified(str(file), answer, decision, None, photo.reduced, picture, has_val)


def _head(collection: "Collection", threshold: Threshold) -> str:
    how = "" if collection.search is None else f"[bold]search[/]       {collection.search}\n"
    least = threshold.log_confidence
    value = "none" if least is None else f"{threshold.needed} (log {least:.4g})"
    return (
        f"[bold]collection[/]   {escape(printable(collection.name))}: {len(collection.images):,} images of "
        f"{len(collection.exhibits):,} exhibits, k = {collection.k}, τ = {collection.tau:g}\n"
        f"{how}"
        f"[bold]threshold[/]    {value}: {escape(printable(threshold.origin))}"
    )


def _lines(photo: Identified, collection: "Collection") -> str:
    name, answer = escape(printable(photo.name)), photo.answer
    if answer is None:
        return f"\n[bold]{name}[/]  [red]{escape(printable(photo.headline))}[/]"
    colour = "green" if photo.decision == "exhibit" else "yellow"
    said, detail = escape(printable(photo.headline)), escape(printable(photo.detail))
    log = f" (log {answer.log_confidence:.4g})" if photo.has_val or photo.decision != "undecided" else ""
    lines = [f"\n[bold]{name}[/]  [{colour}]{said}[/]  {detail}{log}"]
    if photo.reduced:
        side = collection.largest_side
        lines.append(f"  reduced to {side} px, the longest side that the collection was described at")
    about = answer.about
    told = [("exhibit", answer.exhibit), ("rights", about.rights), ("link", about.link)]
    told = told if about.caption and photo.decision != "not in the collection" else []
    lines += [f"  {name:<8} {escape(printable(value))}" for name, value in told if value]
    width = max(len(match.exhibit) for match in answer.matches)
    for place, match in enumerate(answer.matches, start=1):
        exhibit, path = printable(match.exhibit), printable(collection.path(match.row))
        inliers = "" if match.inliers is None else f"  inliers {match.inliers:4}"
        similarity = f"similarity {match.similarity:6.3f}{inliers}"
        title = f"  {escape(printable(match.about.caption))}" if match.about.caption else ""
        lines.append(f"  {place}  {similarity}  exhibit {escape(exhibit):<{width}}  {escape(path)}{title}")
    return "\n".join(lines)


def _cells(photo: Identified) -> list[object]:
    """A photo's row of the CSV file: what the JSON document says of it but for the matches."""
    said: dict[str, object] = {"photo": photo.name, "error": photo.error}
    if (answer := photo.answer) is not None:
        confidence = exp(answer.log_confidence) if photo.has_val else None
        said |= {"decision": photo.decision, "exhibit": answer.exhibit, **answer.about.model_dump(exclude={"more"})}
        said["more"] = dumps(answer.about.more, ensure_ascii=False) if answer.about.more else None
        said |= {"similarity": answer.similarity, "log_confidence": answer.log_confidence, "confidence": confidence}
    return [said.get(name) for name in COLUMNS]


def write_page(file: Path, collection: "Collection", threshold: Threshold, photos: Sequence[Identified]) -> None:
    """Write the answers as one page with the pictures in it; names of files and exhibits are escaped."""
    import jinja2
    from markupsafe import Markup

    from metilr.report.page import jpeg_thumbnail

    pictures = {}
    for row in {match.row for photo in photos if photo.answer is not None for match in photo.answer.matches}:
        with contextlib.suppress(BadImageError):  # gone since it was described: the page says so in its place
            pictures[row] = jpeg_thumbnail(collection.image(row))
    templates = jinja2.Environment(loader=jinja2.PackageLoader("metilr.collection"), autoescape=True)
    templates.filters |= {"shown": printable, "data_uri": data_uri, "named": named}
    style = (importlib.resources.files("metilr.collection") / "static" / "style.css").read_text(encoding="utf-8")
    page = templates.get_template("answers.html").render(
        collection=collection, threshold=threshold, photos=photos, pictures=pictures, style=Markup(style)
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, page)


def data_uri(picture: bytes) -> str:
    """A JPEG as an address that holds it."""
    return "data:image/jpeg;base64," + base64.b64encode(picture).decode()
