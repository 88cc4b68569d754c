"""What is said of an index's exhibits: a file of JSON lines, one each, in the order of their names."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metilr.data.exhibit import Exhibit
from metilr.errors import UserError
from metilr.sources.catalogue import Catalogue


class Labels:
    """What is said of an index's exhibits, each read when it is asked for; without the file nothing is."""

    def __init__(self, file: Path, names: Sequence[str]) -> None:
        self.file, self.names = file, names
        self._lines = self.file.read_bytes().splitlines() if self.file.exists() else None

    def __getitem__(self, label: int) -> Exhibit:
        """What is said of a label's exhibit; UserError if the file is not of this index."""
        if self._lines is None:
            return Exhibit()
        with contextlib.suppress(ValueError, LookupError, AttributeError, TypeError, RecursionError):
            said = json.loads(self._lines[label])
            if said.pop("exhibit") == self.names[label]:
                return Exhibit.model_validate(said)
        raise UserError(f"{self.file}: is not of this index; run the metilr index that made it again")

    @staticmethod
    def content(catalogue: Catalogue) -> bytes:
        """What the file of a catalogue holds."""
        about = ({"exhibit": name, **said(catalogue.about.get(name))} for name in catalogue.names)
        return b"".join(json.dumps(each, ensure_ascii=False).encode() + b"\n" for each in about)


def said(about: Exhibit | None) -> dict[str, Any]:
    """What is said of an exhibit, as JSON types, without what is empty."""
    return {} if about is None else about.model_dump(exclude_defaults=True)
