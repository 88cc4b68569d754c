"""IIIF: the images of a Presentation manifest or collection (2 and 3), each by its Image API service (2 and 3).

After https://iiif.io/api/: a collection leads to manifests, a manifest to canvases, a canvas to an image, an image to
its service. Form 2 says ``@id``, ``sequences`` and ``images`` where form 3 says ``id``, ``items`` and ``items``.
"""

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from metilr.data.exhibit import Exhibit, exhibit_of, is_address, plain_text
from metilr.sources.fetch import DownloadError, Downloads

DEEPEST = 20  # collections within collections
RIGHTS_NAMES = ("rights", "license", "requiredStatement", "attribution")


@dataclass(frozen=True)
class Place:
    """Where an image of an exhibit is to be had: its address, or that of its Image API service."""

    address: str
    exhibit: str
    is_service: bool = False


@dataclass
class Found:
    """What a source names: images, what is said of their exhibits, and what could not be read, by address."""

    name: str = ""
    places: list[Place] = field(default_factory=list)
    exhibits: dict[str, Exhibit] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def add(self, other: "Found") -> None:
        """Append what another part of the source names."""
        self.places.extend(other.places)
        self.exhibits.update(other.exhibits)
        self.failed.update(other.failed)


class Malformed(DownloadError):
    """A place in a document that is not as IIIF has it."""


async def find_in_iiif(document: Any, address: str, downloads: Downloads, limit: int, language: str) -> Found:
    """Follow a manifest or a collection to its images, in their order; at least ``limit``, if it has so many.

    Of a collection each manifest is an exhibit, of a manifest that stands alone each canvas. What cannot be read is
    listed in ``failed``: a manifest, a page, a collection within another, a canvas without an image.

    Raises:
        DownloadError: If the document itself is neither, or no image is found.
    """
    crawl = _Crawl(downloads, limit, language, {address})
    crawl.found.name = text_of(document.get("label"), language) if isinstance(document, dict) else ""
    if _kind(document) == "Manifest":
        crawl.found.add(_canvases(document, _id(document, "the manifest"), language, is_alone=True))
    else:
        await crawl.follow(document)
    if not crawl.found.places:
        first = next((f"; {where}: {why}" for where, why in crawl.found.failed.items()), "")
        raise DownloadError(f"leads to no image{first}")
    return crawl.found


@dataclass
class _Crawl:
    downloads: Downloads
    limit: int
    language: str
    seen: set[str]
    found: Found = field(default_factory=Found)

    async def follow(self, collection: Any, deep: int = 0) -> None:
        """Add what a collection leads to, with its pages and the collections within it."""
        if deep > DEEPEST:
            raise Malformed(f"is a collection within more than {DEEPEST} others")
        page: Any = collection
        while page is not None:
            if _kind(page) not in ("Collection", "CollectionPage"):
                raise Malformed("is neither a manifest nor a collection")
            members = [member for member in dict.fromkeys(_members(page)) if member not in self.seen]
            self.seen.update(members)
            for start in range(0, len(members), n := self.downloads.options.connections):
                some = members[start : start + n]
                if len(self.found.places) >= self.limit:
                    return
                for address, document in zip(some, await self._read(some), strict=True):
                    if document is not None:
                        await self._add(address, document, deep)
            following = _first_id(page.get("next")) or (None if members else _first_id(page.get("first"))) or ""
            [page] = await self._read([following]) if {following} - self.seen - {""} else [None]
            self.seen.add(following)

    async def _add(self, address: str, document: Any, deep: int) -> None:
        try:
            if _kind(document) == "Manifest":
                self.found.add(_canvases(document, _id(document, "the manifest"), self.language, is_alone=False))
            else:
                await self.follow(document, deep + 1)
        except DownloadError as error:
            self.found.failed[address] = str(error)

    async def _read(self, addresses: Sequence[str]) -> list[Any]:
        """The documents at some addresses, None for one that cannot be read."""

        async def read(address: str) -> Any:
            try:
                return await self.downloads.document(address)
            except DownloadError as error:
                self.found.failed[address] = str(error)
                return None

        return await asyncio.gather(*map(read, addresses))


def _members(collection: Mapping[str, Any]) -> list[str]:
    names = ("items", "members", "collections", "manifests")
    listed = [each for name in names for each in _list(collection.get(name))]
    return [_id(each, f"member {i} of the collection") for i, each in enumerate(listed)]


def _canvases(manifest: Mapping[str, Any], name: str, language: str, is_alone: bool) -> Found:
    """The images of a manifest."""
    about, found = _about(manifest, language), Found()
    sequences = _list(manifest.get("sequences"))
    canvases = _list(sequences[0].get("canvases")) if sequences and isinstance(sequences[0], dict) else []
    for i, canvas in enumerate(canvases or _list(manifest.get("items"))):
        where = f"canvas {i}"
        if not isinstance(canvas, dict):
            raise Malformed(f"{where} is no object")
        exhibit = _id(canvas, where) if is_alone else name
        try:
            place = _image(canvas, where, exhibit)
        except DownloadError as error:
            found.failed[_id(canvas, where)] = str(error)
            continue
        found.places.append(place)
        found.exhibits[exhibit] = _about({**canvas}, language, about) if is_alone else about
    return found


def _image(canvas: Mapping[str, Any], where: str, exhibit: str) -> Place:
    """The first image that is painted on a canvas."""
    resources = [note.get("resource") for note in _dicts(canvas.get("images"))]  # of form 2
    for page in _dicts(canvas.get("items")):
        resources += [note.get("body") for note in _dicts(page.get("items")) if _paints(note)]
    for resource in _dicts([part for each in resources for part in _list(each)]):
        for image in _choices(resource):
            if _type(image) not in ("Image", ""):
                continue
            services = _dicts(image.get("service"))
            refuse_login(services)
            for service in services:
                if "image" in _words(service, "@context", "type", "@type", "profile").lower():
                    return Place(_id(service, f"{where}: the service of its image").rstrip("/"), exhibit, True)
            return Place(_id(image, f"{where}: its image"), exhibit)
    raise DownloadError(f"{where} has no image")


def _choices(resource: dict[str, Any]) -> list[dict[str, Any]]:
    """A resource, or what it chooses from or refers to."""
    inner = [resource.get(name) for name in ("default", "source")]
    inner += _list(resource.get("items")) if _type(resource) == "Choice" else []
    return [each for each in inner if isinstance(each, dict)] or [resource]


def _paints(annotation: Mapping[str, Any]) -> bool:
    return any(str(each).endswith("painting") for each in _list(annotation.get("motivation", "painting")))


def refuse_login(services: Sequence[dict[str, Any]]) -> None:
    """Refuse images that only who has logged in may see.

    Raises:
        DownloadError: If one of the services, or one within it, is of the IIIF Authorization API.
    """
    for service in services:
        if "auth" in _words(service, "@context", "type", "@type", "profile").lower():
            raise DownloadError("needs a login (IIIF Authorization), which metilr cannot do")
        refuse_login(_dicts(service.get("service")))


def image_request(info: Any, side: int | None) -> str:
    """The address of an image by its ``info.json``, with a longest side of ``side`` px, or as large as there is.

    A smaller image comes as it is. A service of level 0 gives one of its sizes: the least that is large enough.

    Raises:
        DownloadError: If the document does not say what it must, or wants a login.
    """
    if not isinstance(info, dict):
        raise Malformed("info.json is no object")
    refuse_login(_dicts(info.get("service")))
    base, width, height = _id(info, "info.json").rstrip("/"), info.get("width"), info.get("height")
    if not (isinstance(width, int) and isinstance(height, int) and min(width, height) > 0):
        raise Malformed("info.json says no width and height")
    context = _words(info, "@context", "type", "@type")
    if "image/1" in context or "library.stanford.edu" in context:
        raise DownloadError("is of the Image API 1, which metilr does not read")
    is_third = "ImageService3" in context or "image/3" in context
    whole = "max" if is_third else "full"
    largest = min(each for each in (info.get("maxWidth"), info.get("maxHeight"), side, max(width, height)) if each)
    profiles = [each for each in _list(info.get("profile")) if isinstance(each, str)]
    level = re.search(r"level(\d)|#level(\d)", " ".join(profiles))
    if level is not None and "0" in level.groups():
        fitting = [each for each in _dicts(info.get("sizes")) if side and max(_sides(each)) >= side]
        size = ",".join(map(str, _sides(min(fitting, key=lambda each: max(_sides(each)))))) if fitting else whole
    elif largest >= max(width, height):
        size = whole
    else:
        size = f"{largest}," if width >= height else f",{largest}"
    return f"{base}/full/{size}/0/default.jpg"


def _sides(size: Mapping[str, Any]) -> tuple[int, int]:
    width, height = size.get("width"), size.get("height")
    if not (isinstance(width, int) and isinstance(height, int)):
        raise Malformed("info.json lists a size without width and height")
    return width, height


def _about(thing: Mapping[str, Any], language: str, whole: Exhibit | None = None) -> Exhibit:
    """What a manifest or canvas says of itself, and for the rest what its manifest says."""
    values = {} if whole is None else whole.model_dump(exclude={"more"}, exclude_none=True) | whole.more
    for pair in _dicts(thing.get("metadata")):
        values[text_of(pair.get("label"), language)] = text_of(pair.get("value"), language)
    if label := text_of(thing.get("label"), language):
        values["title"] = label
    for name in RIGHTS_NAMES:
        if name in thing and "rights" not in values:
            stated = thing[name].get("value") if name == "requiredStatement" else thing[name]
            values["rights"] = text_of(stated, language)
    for part, names in (("link", ("homepage", "related")), ("thumbnail", ("thumbnail",))):
        address = next(filter(None, (_first_id(thing.get(name)) for name in names)), "")
        if is_address(address):
            values[part] = address
    return exhibit_of(values)


def text_of(value: Any, language: str) -> str:
    """A text of IIIF: a string, a list of them, or by language; in the language, or else in none, or else the first."""
    if isinstance(value, str):
        return plain_text(value)
    if isinstance(value, dict):
        if "@value" in value:
            return text_of(value["@value"], language)
        own = [each for tag, each in value.items() if tag.split("-")[0] == language]
        return text_of((own + _list(value.get("none") or list(value.values())[:1]))[:1], language)
    if isinstance(value, list):
        tagged = [each for each in value if isinstance(each, dict) and "@language" in each]
        own = [each for each in tagged if str(each["@language"]).split("-")[0] == language]
        return "; ".join(filter(None, (text_of(each, language) for each in own or tagged[:1] or value)))
    return ""


def _kind(document: Any) -> str:
    if not isinstance(document, dict):
        raise Malformed("is no IIIF document: no object")
    return _type(document)


def _type(thing: Mapping[str, Any]) -> str:
    """Its type without a prefix: Manifest for sc:Manifest."""
    said = thing.get("type", thing.get("@type", "")) if isinstance(thing, dict) else ""
    return str(_list(said)[0] if _list(said) else "").rpartition(":")[2]


def _id(thing: Any, where: str) -> str:
    found = _first_id(thing)
    if found is None:
        raise Malformed(f"{where} has no id")
    if not is_address(found):
        raise Malformed(f"{where}: its id is no web address: {found[:60]}")
    return found


def _first_id(thing: Any) -> str | None:
    """The id of a thing, or of the first of a list; a string is one itself."""
    if isinstance(thing, list):
        return _first_id(thing[0]) if thing else None
    found = thing.get("id", thing.get("@id")) if isinstance(thing, dict) else thing
    return found if isinstance(found, str) and found else None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _dicts(value: Any) -> list[Any]:
    return [each for each in _list(value) if isinstance(each, dict)]


def _words(thing: Mapping[str, Any], *names: str) -> str:
    return " ".join(str(each) for name in names for each in _list(thing.get(name)))
