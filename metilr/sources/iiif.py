"""IIIF: the images of a Presentation manifest or collection (2 and 3), each by its Image API service (2 and 3).

After https://iiif.io/api/: a collection leads to manifests, a manifest to canvases, a canvas to an image, an image to
its service. Form 2 says ``@id``, ``sequences`` and ``images`` where form 3 says ``id``, ``items`` and ``items``.
"""

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from metilr.data.exhibit import MOST_LETTERS, Exhibit, exhibit_of, is_address
from metilr.errors import one_line
from metilr.sources.fetch import DownloadError, Downloads
from metilr.sources.iiif_values import (
    ODD,
    Malformed,
    as_list,
    dicts,
    first_id,
    id_of,
    kind_of,
    text_of,
    type_of,
    words_of,
)

DEEPEST = 20  # collections within collections
MORE_DOCUMENTS = 10_000  # than images: pages without any may follow each other for ever
RIGHTS_NAMES = ("rights", "license", "attribution")


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


async def find_in_iiif(document: Any, address: str, downloads: Downloads, limit: int, language: str) -> Found:
    """Follow a manifest or a collection to its images, in their order; at least ``limit``, if it has so many.

    Of a collection each manifest is an exhibit, of a manifest that stands alone each canvas. What cannot be read is
    listed in ``failed``: a manifest, a page, a collection within another, a canvas without an image.

    Raises:
        DownloadError: If the document itself is neither, or no image is found.
    """
    crawl = _Crawl(downloads, limit, language, {address})
    try:
        crawl.found.name = text_of(document.get("label"), language) if isinstance(document, dict) else ""
        if kind_of(document) == "Manifest":
            crawl.found.add(_canvases(document, id_of(document, "the manifest"), language, is_alone=True))
        else:
            await crawl.follow(document)
    except ODD as error:
        raise Malformed(f"is malformed ({one_line(error)})") from None
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
    n_read: int = 0

    async def follow(self, collection: Any, deep: int = 0) -> None:
        """Add what a collection leads to, with its pages and the collections within it."""
        if deep > DEEPEST:
            raise Malformed(f"is a collection within more than {DEEPEST} others")
        page: Any = collection
        while page is not None:
            if kind_of(page) not in ("Collection", "CollectionPage"):
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
            following = first_id(page.get("next")) or (None if members else first_id(page.get("first"))) or ""
            [page] = await self._read([following]) if {following} - self.seen - {""} else [None]
            self.seen.add(following)

    async def _add(self, address: str, document: Any, deep: int) -> None:
        try:
            if kind_of(document) != "Manifest":
                await self.follow(document, deep + 1)
            elif (name := id_of(document, "the manifest")) in self.found.exhibits:
                raise Malformed(f"has the id of another manifest, {name}")
            else:
                self.found.add(_canvases(document, name, self.language, is_alone=False))
        except (DownloadError, *ODD) as error:
            is_said = isinstance(error, DownloadError)
            self.found.failed[address] = str(error) if is_said else f"is malformed ({one_line(error)})"

    async def _read(self, addresses: Sequence[str]) -> list[Any]:
        """The documents at some addresses, None for one that cannot be read."""

        async def read(address: str) -> Any:
            try:
                return await self.downloads.document(address)
            except DownloadError as error:
                self.found.failed[address] = str(error)
                return None

        self.n_read += len(addresses)
        if self.n_read > self.limit + MORE_DOCUMENTS:
            raise Malformed(f"leads to more than {self.limit + MORE_DOCUMENTS:,} documents")
        return await asyncio.gather(*map(read, addresses))


def _members(collection: Mapping[str, Any]) -> list[str]:
    names = ("items", "members", "collections", "manifests")
    listed = [each for name in names for each in as_list(collection.get(name))]
    return [id_of(each, f"member {i} of the collection") for i, each in enumerate(listed)]


def _canvases(manifest: Mapping[str, Any], name: str, language: str, is_alone: bool) -> Found:
    """The images of a manifest."""
    about, found = _about(manifest, language), Found()
    sequences = as_list(manifest.get("sequences"))
    canvases = as_list(sequences[0].get("canvases")) if sequences and isinstance(sequences[0], dict) else []
    for i, canvas in enumerate(canvases or as_list(manifest.get("items"))):
        where = f"canvas {i}"
        if not isinstance(canvas, dict):
            raise Malformed(f"{where} is no object")
        exhibit = id_of(canvas, where) if is_alone else name
        try:
            if is_alone and exhibit in found.exhibits:
                raise Malformed(f"{where} has the id of another canvas")
            place = _image(canvas, where, exhibit)
        except DownloadError as error:
            found.failed[f"{id_of(canvas, where)} ({where})"] = str(error)
            continue
        found.places.append(place)
        found.exhibits[exhibit] = _about(canvas, language, about) if is_alone else about
    return found


def _image(canvas: Mapping[str, Any], where: str, exhibit: str) -> Place:
    """The first image that is painted on a canvas."""
    resources = [note.get("resource") for note in dicts(canvas.get("images"))]  # of form 2
    for page in dicts(canvas.get("items")):
        resources += [note.get("body") for note in dicts(page.get("items")) if _paints(note)]
    for resource in dicts([part for each in resources for part in as_list(each)]):
        for image in _choices(resource):
            if type_of(image) not in ("Image", ""):
                continue
            services = dicts(image.get("service"))
            refuse_login(services)
            for service in services:
                if "image" in words_of(service, "@context", "type", "@type", "profile").lower():
                    return Place(id_of(service, f"{where}: the service of its image").rstrip("/"), exhibit, True)
            return Place(id_of(image, f"{where}: its image"), exhibit)
    raise DownloadError(f"{where} has no image")


def _choices(resource: dict[str, Any]) -> list[dict[str, Any]]:
    """A resource, or what it chooses from or refers to."""
    inner = [resource.get(name) for name in ("default", "full", "source")]
    inner += as_list(resource.get("items")) if type_of(resource) == "Choice" else []
    return [each for each in inner if isinstance(each, dict)] or [resource]


def _paints(annotation: Mapping[str, Any]) -> bool:
    return any(str(each).endswith("painting") for each in as_list(annotation.get("motivation", "painting")))


def refuse_login(services: Sequence[dict[str, Any]]) -> None:
    """Refuse images that only who has logged in may see.

    Raises:
        DownloadError: If one of the services, or one within it, is of the IIIF Authorization API.
    """
    for service in services:
        if re.search(r"/auth/|Auth\w*Service", words_of(service, "@context", "type", "@type", "profile")):
            raise DownloadError("needs a login (IIIF Authorization), which metilr cannot do")
        refuse_login(dicts(service.get("service")))


def image_request(info: Any, side: int | None) -> str:
    """The address of an image by its ``info.json``, with a longest side of ``side`` px, or as large as there is.

    A smaller image comes as it is. A service of level 0 gives one of its sizes: the least that is large enough.

    Raises:
        DownloadError: If the document does not say what it must, or wants a login.
    """
    if not isinstance(info, dict):
        raise Malformed("info.json is no object")
    refuse_login(dicts(info.get("service")))
    base, width, height = id_of(info, "info.json").rstrip("/"), info.get("width"), info.get("height")
    if not (isinstance(width, int) and isinstance(height, int) and min(width, height) > 0):
        raise Malformed("info.json says no width and height")
    context = words_of(info, "@context", "type", "@type")
    if "image/1" in context or "library.stanford.edu" in context:
        raise DownloadError("is of the Image API 1, which metilr does not read")
    is_third = "ImageService3" in context or "image/3" in context
    whole = "max" if is_third else "full"
    largest = min(each for each in (info.get("maxWidth"), info.get("maxHeight"), side, max(width, height)) if each)
    profiles = [each for each in as_list(info.get("profile")) if isinstance(each, str)]
    level = re.search(r"level(\d)|#level(\d)", " ".join(profiles))
    if level is not None and "0" in level.groups():
        fitting = [each for each in dicts(info.get("sizes")) if side and max(_sides(each)) >= side]
        width, height = min(map(_sides, fitting), key=max, default=(0, 0))
        size = (f"{width},{height}" if is_third else f"{width},") if fitting else whole  # as each form is canonical
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
    values = {} if whole is None else whole.model_dump(exclude={"more"}, exclude_none=True)
    if whole is not None and len(str(whole.more)) < MOST_LETTERS:  # or each of many canvases would repeat a book
        values |= whole.more
    own: dict[str, list[str]] = {}
    for pair in dicts(thing.get("metadata")):
        own.setdefault(text_of(pair.get("label"), language), []).append(text_of(pair.get("value"), language))
    values |= {name: "; ".join(filter(None, texts)) for name, texts in own.items()}
    if label := text_of(thing.get("label"), language):
        values["title"] = label
    for stated in dicts(thing.get("requiredStatement")):
        values[text_of(stated.get("label"), language) or "Statement"] = text_of(stated.get("value"), language)
    rights = (text_of(thing.get(name), language) for name in RIGHTS_NAMES)
    values.setdefault("rights", next(filter(None, rights), ""))
    for part, names in (("link", ("homepage", "related")), ("thumbnail", ("thumbnail",))):
        address = next(filter(None, (first_id(thing.get(name)) for name in names)), "")
        if is_address(address):
            values[part] = address
    return exhibit_of(values)
