"""What a museum says of an exhibit: the label beside it."""

import itertools
import re
import unicodedata
from collections.abc import Mapping
from html.parser import HTMLParser

import pydantic

# Under which names catalogues keep each part, in small letters without blanks and signs; of several the first counts.
NAMES = {
    "title": ("title", "objecttitle", "titre", "titel", "titolo", "titulo", "label", "name"),
    "artist": ("artistdisplayname", "artist", "creator", "maker", "author", "painter", "artiste", "kunstler", "auteur"),
    "date": ("objectdate", "date", "datecreated", "creationdate", "dated", "year", "datierung"),
    "link": ("linkresource", "link", "homepage", "objecturl", "permalink"),
    "rights": ("rightsandreproduction", "rights", "license", "licence", "creditline", "attribution"),
    "thumbnail": ("thumbnail", "thumbnailurl", "primaryimagesmall"),
}
ADDRESSES = ("link", "thumbnail")
MOST_LETTERS, MOST_PARTS = 2000, 100  # of a part; of one: pages and terminals show labels, not essays
ADDRESS = re.compile(  # without what would steer a terminal, or no file can hold
    r"https?://[^\s/?#\x00-\x1f\x7f-\x9f\ud800-\udfff][^\x00-\x1f\x7f-\x9f\ud800-\udfff]*", re.IGNORECASE
)


class Exhibit(pydantic.BaseModel):
    """What is known of an exhibit besides its images; ``link`` and ``thumbnail`` are web addresses."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    title: str | None = None
    artist: str | None = None
    date: str | None = None
    link: str | None = None
    rights: str | None = None
    thumbnail: str | None = None
    more: dict[str, str] = pydantic.Field(default_factory=dict)

    @property
    def caption(self) -> str:
        """Title, artist and date in a line; empty if none is known."""
        return ", ".join(part for part in (self.title, self.artist, self.date) if part)

    @pydantic.field_validator(*ADDRESSES)
    @classmethod
    def leads_to_the_web(cls, address: str | None) -> str | None:
        """Refuse what a page must not link to."""
        if address is not None and not is_address(address):
            raise ValueError("must begin with https:// or http://")
        return address


def exhibit_of(values: Mapping[str, str]) -> Exhibit:
    """Sort named values of a catalogue into an exhibit; what has no part of its own is ``more``, empty ones nothing."""
    texts = ((plain_text(name)[:200], plain_text(value)[:MOST_LETTERS]) for name, value in values.items())
    left = dict(itertools.islice(((name, value) for name, value in texts if name and value), MOST_PARTS))
    by_name = {squeezed(name): name for name in reversed(left)}
    parts = {}
    for part, names in NAMES.items():
        for name in names:
            found = by_name.get(name)
            if found in left and (part not in ADDRESSES or is_address(left[found])):
                parts[part] = left.pop(found)
                break
    return Exhibit(**parts, more=left)


def squeezed(name: str) -> str:
    """A name in small letters without blanks, signs and accents: "Object ID" and object_id are one."""
    return re.sub(r"[\W_]", "", unicodedata.normalize("NFKD", name).lower())


def is_address(text: str) -> bool:
    """Whether a text is a web address."""
    return ADDRESS.fullmatch(text) is not None


def plain_text(text: str) -> str:
    """A text in one line; one that is HTML, as IIIF allows, without its tags; half a sign is a question mark."""
    text = text[: 10 * MOST_LETTERS].encode(errors="replace").decode()
    if text.lstrip().startswith("<") and text.rstrip().endswith(">"):
        reader = _Words()
        reader.feed(text)
        reader.close()
        text = " ".join(reader.words)
    return " ".join(text.split())


class _Words(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []

    def handle_data(self, data: str) -> None:
        self.words.append(data)
