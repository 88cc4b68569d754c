"""The values of IIIF documents in their forms: ids, types, lists that may be one thing, texts by language."""

from collections.abc import Mapping
from typing import Any

from metilr.data.exhibit import is_address, plain_text
from metilr.sources.fetch import DownloadError

ODD = (AttributeError, KeyError, TypeError, ValueError, RecursionError)  # what values of other types than said lead to


class Malformed(DownloadError):
    """A place in a document that is not as IIIF has it."""


def text_of(value: Any, language: str) -> str:
    """A text of IIIF: a string, a list of them, or by language; in the language, or else in none, or else the first."""
    if isinstance(value, str | int | float):
        return plain_text(str(value))
    if isinstance(value, list):
        tagged = [each for each in value if isinstance(each, dict) and "@language" in each]
        own = [each for each in tagged if _is_in(str(each["@language"]), language)]
        return "; ".join(filter(None, (text_of(each, language) for each in own or tagged[:1] or value)))
    if not isinstance(value, dict):
        return ""
    if "@value" in value:
        return text_of(value["@value"], language)
    own = [each for tag, each in value.items() if _is_in(tag, language)]
    others = [value["none"]] if value.get("none") else list(value.values())
    return text_of((own or others)[0], language) if own or others else ""


def _is_in(tag: str, language: str) -> bool:
    return tag == language or tag.split("-")[0] == language.split("-")[0]


def kind_of(document: Any) -> str:
    """The type of a document; Malformed if it is no object."""
    if not isinstance(document, dict):
        raise Malformed("is no IIIF document: no object")
    return type_of(document)


def type_of(thing: Mapping[str, Any]) -> str:
    """Its type without a prefix: Manifest for sc:Manifest."""
    said = thing.get("type", thing.get("@type", "")) if isinstance(thing, dict) else ""
    return str(as_list(said)[0] if as_list(said) else "").rpartition(":")[2]


def id_of(thing: Any, where: str) -> str:
    """The id of a thing, a web address; Malformed, with where it is, if it has none."""
    found = first_id(thing)
    if found is None:
        raise Malformed(f"{where} has no id")
    if not is_address(found):
        raise Malformed(f"{where}: its id is no web address: {found[:60]}")
    return found


def first_id(thing: Any) -> str | None:
    """The id of a thing, or of the first of a list; a string is one itself."""
    if isinstance(thing, list):
        return first_id(thing[0]) if thing else None
    found = thing.get("id", thing.get("@id")) if isinstance(thing, dict) else thing
    return found if isinstance(found, str) and found else None


def as_list(value: Any) -> list[Any]:
    """A value, or those of a list."""
    return value if isinstance(value, list) else [] if value is None else [value]


def dicts(value: Any) -> list[Any]:
    """The objects among a value or those of a list."""
    return [each for each in as_list(value) if isinstance(each, dict)]


def words_of(thing: Mapping[str, Any], *names: str) -> str:
    """What some of a thing's entries say, as one text to search in."""
    return " ".join(str(each) for name in names for each in as_list(thing.get(name)))
