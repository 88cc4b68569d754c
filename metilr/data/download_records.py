"""downloads.json: where each archive of a data root came from, and how far it is unpacked."""

import datetime
import json
import threading
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from metilr.errors import UserError, one_line
from metilr.files import write_atomically

ALL = -1  # members unpacked: every one


@dataclass(frozen=True)
class DownloadRecord:
    """What is known of an archive that was downloaded whole.

    Attributes:
        url: Where it came from.
        bytes: Its size.
        sha256: Its digest, which a later download must have as well.
        date: When it was recorded, UTC.
        unpacked: Members of it that are unpacked; ``ALL`` when all are.
    """

    url: str
    bytes: int
    sha256: str
    date: str
    unpacked: int = 0


def _is_sound(record: DownloadRecord) -> bool:
    texts, numbers = (record.url, record.sha256, record.date), (record.bytes, record.unpacked)
    return all(type(text) is str for text in texts) and all(type(n) is int and n >= ALL for n in numbers)


class DownloadRecords:
    """The records of a folder of archives; several threads may use them, each for an archive of its own.

    Args:
        file: downloads.json; need not be there.

    Raises:
        UserError: If the file is not readable as one.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._lock = threading.Lock()
        try:
            content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
            self._records = {str(name): DownloadRecord(**entry) for name, entry in content.items()}
            if not all(map(_is_sound, self._records.values())):
                raise ValueError("a value is of a wrong kind")
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{file}: not readable ({one_line(error)}); delete it, then all archives are checked anew"
            ) from None

    def get(self, name: str) -> DownloadRecord | None:
        """The record of an archive; None if there is none."""
        return self._records.get(name)

    def add(self, name: str, url: str, size: int, sha256: str) -> None:
        """Record an archive that is here whole, none of it unpacked."""
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        self._put(name, DownloadRecord(url, size, sha256, date))

    def set_unpacked(self, name: str, members: int) -> None:
        """Record how many members of an archive are unpacked."""
        self._put(name, replace(self._records[name], unpacked=members))

    def forget(self, name: str) -> None:
        """Remove the record of an archive that turned out not to be whole."""
        self._put(name, None)

    def _put(self, name: str, record: DownloadRecord | None) -> None:
        with self._lock:
            if record is None:
                self._records.pop(name, None)
            else:
                self._records[name] = record
            content = {each: asdict(entry) for each, entry in sorted(self._records.items())}
            write_atomically(self.file, json.dumps(content, indent=1) + "\n")
