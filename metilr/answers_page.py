"""``metilr identify --page``: the answers as one HTML file, with the pictures in it."""

import base64
import importlib.resources
from collections.abc import Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

from metilr.answers import Identified
from metilr.collection import Collection
from metilr.data.transforms import BadImageError
from metilr.errors import UserError
from metilr.files import write_atomically
from metilr.terminal import printable
from metilr.threshold import Threshold
from metilr.thumbnails import jpeg_thumbnail


def write_page(file: Path, collection: Collection, threshold: Threshold, photos: Sequence[Identified]) -> None:
    """Write the page; names of files and exhibits come from anywhere and are escaped.

    Args:
        file: The page; its folder is made if need be.
        collection: Knows the pictures of the matches; those that are missing are left out.
        threshold: What the decisions were made by.
        photos: The answers, each with its picture.

    Raises:
        UserError: If the file cannot be written.
    """
    templates = jinja2.Environment(loader=jinja2.PackageLoader("metilr.serve"), autoescape=True)
    templates.filters |= {"shown": printable, "data_uri": data_uri}
    page = templates.get_template("answers.html").render(
        collection=collection,
        threshold=threshold,
        photos=photos,
        pictures=_pictures(collection, photos),
        style=Markup((importlib.resources.files("metilr.serve") / "static" / "style.css").read_text(encoding="utf-8")),
    )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, page)
    except OSError as error:
        raise UserError(f"--page {file}: cannot be written ({error.strerror}); name another file") from None


def _pictures(collection: Collection, photos: Sequence[Identified]) -> dict[int, bytes]:
    rows = {match.row for photo in photos if photo.answer is not None for match in photo.answer.matches}
    pictures = {}
    for row in rows:
        try:
            pictures[row] = jpeg_thumbnail(collection.image(row))
        except BadImageError:  # gone since it was described: the page says so in its place
            continue
    return pictures


def data_uri(picture: bytes) -> str:
    """A JPEG as an address that holds it."""
    return "data:image/jpeg;base64," + base64.b64encode(picture).decode()
