"""Ground truth in the Met layout: which images form the database, which are queries, what they show.

``ROOT/ground_truth`` holds ``MET_database.json``, ``mini_MET_database.json``, ``valset.json`` and
``testset.json``; image paths in them are relative to ``ROOT/images``.

Source: Ypsilantis et al., The Met Dataset, NeurIPS 2021 Datasets and Benchmarks; its released files.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from metilr.errors import UserError, one_line, shown
from metilr.files import parse_json, regular
from metilr.metrics import DISTRACTOR

DatabaseName = Literal["full", "mini"]
DATABASE_FILES: dict[DatabaseName, str] = {"full": "MET_database.json", "mini": "mini_MET_database.json"}
QUERY_FILES = {"val": "valset.json", "test": "testset.json"}
NOT_NAMED = -1  # photographer of a query whose entry names none
MET = "met"
DISTRACTOR_KINDS = {"test_other": "other-artwork", "test_noart": "non-art", MET: "distractor"}  # by folder


@dataclass(frozen=True)
class GroundTruth:
    """What a data root says about its images; all lists in file order.

    Exhibit ids are the museum's numbers. Labels are dense: label ``c`` stands for ``exhibit_ids[c]``, and
    smaller labels are smaller ids. A distractor's label is ``DISTRACTOR``.

    Attributes:
        root: Holds ``images/`` and ``ground_truth/``.
        database: ``"full"`` or ``"mini"``.
        paths: Image paths of each split, relative to ``root/images``.
        labels: Labels of each split, int64 ``(n,)``.
        exhibit_ids: The database's exhibits, ascending, int64 ``(n_classes,)``.
        digests: sha256 of each split's JSON file.
        photographers: Who took each query of a split, int64 ``(n,)``, numbered from 0; NOT_NAMED where the file
            does not say.
        folder: Below ``root``, what image paths are relative to.
        photographer_names: Of the numbers.
    """

    root: Path
    database: DatabaseName
    paths: Mapping[str, tuple[str, ...]]
    labels: Mapping[str, np.ndarray]
    exhibit_ids: np.ndarray
    digests: Mapping[str, str]
    photographers: Mapping[str, np.ndarray] = field(default_factory=dict)
    folder: str = "images"
    photographer_names: tuple[str, ...] = ()

    @property
    def query_splits(self) -> list[str]:
        """The query splits that were read: val and test, or val alone for training."""
        return [split for split in self.paths if split != "database"]

    @property
    def n_classes(self) -> int:
        """Number of exhibits in the database."""
        return len(self.exhibit_ids)

    def image(self, path: str) -> Path:
        """Where the image with this ground-truth path lies."""
        return file_below(self.root / self.folder, path)

    def n_met(self, split: str) -> int:
        """Number of queries of ``split`` that show an exhibit of the database."""
        return int((self.labels[split] != DISTRACTOR).sum())

    def kinds(self, split: str) -> list[str]:
        """What each query shows: ``MET``, or the kind of distractor, which its first folder tells."""
        folders = (PurePosixPath(path).parts[:-1] for path in self.paths[split])
        return [
            MET if label != DISTRACTOR else DISTRACTOR_KINDS.get(folder[0], nfc(folder[0])) if folder else "distractor"
            for label, folder in zip(self.labels[split].tolist(), folders, strict=True)
        ]

    def class_sizes(self) -> np.ndarray:
        """Number of database images of each exhibit, int64 ``(n_classes,)``."""
        return np.bincount(self.labels["database"], minlength=self.n_classes)

    def first_images(self) -> np.ndarray:
        """The first database row of each exhibit, int64 ``(n_classes,)``."""
        return np.unique(self.labels["database"], return_index=True)[1]

    def counts(self) -> dict[str, int]:
        """Images, exhibits and queries, for tables and results."""
        return {
            "database_images": len(self.paths["database"]),
            "exhibits": self.n_classes,
            **{f"{split}_queries": len(self.paths[split]) for split in self.query_splits},
            **{f"{split}_met": self.n_met(split) for split in self.query_splits},
        }

    def identity(self) -> dict[str, Any]:
        """What a checkpoint records of it, as JSON types."""
        about = {"root": self.root.resolve().name, "database": self.database}
        return {**about, "counts": self.counts(), "fingerprint": self.fingerprint()}

    def fingerprint(self) -> str:
        """A digest of the JSON files that were read: the same string means the same task."""
        return hashlib.sha256(json.dumps(dict(self.digests), sort_keys=True).encode()).hexdigest()


def load_ground_truth(
    root: Path, database: DatabaseName = "full", queries: Sequence[str] = ("val", "test")
) -> GroundTruth:
    """Read and check the JSON files of a data root; of ``queries`` alone. Opens no image.

    Raises:
        UserError: If a file is missing or malformed, an entry has a wrong type, a path is not inside ``images/`` or is
            listed twice, a query's exhibit is not in the database, or a split has no query that shows an exhibit.
    """
    root = Path(root)
    if database not in DATABASE_FILES:
        raise UserError(f"{database}: choose one of {', '.join(DATABASE_FILES)}", "database")
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; it must hold ground_truth/ and images/", "root")
    names = {"database": DATABASE_FILES[database], **{split: QUERY_FILES[split] for split in queries}}
    files = {split: root / "ground_truth" / name for split, name in names.items()}
    entries, digests = {}, {}
    for split, file in files.items():
        entries[split], digests[split] = _read_entries(file)
    _refuse_repeated_paths(files, entries)

    database_ids = [_exhibit_id(files["database"], i, entry, "id") for i, entry in enumerate(entries["database"])]
    exhibit_ids, database_labels = np.unique(np.array(database_ids, dtype=np.int64), return_inverse=True)
    labels = {"database": database_labels.astype(np.int64).reshape(-1)}
    for split in queries:
        labels[split] = _query_labels(files[split], entries[split], exhibit_ids, database)
    photographers, people = _photographers({split: entries[split] for split in queries})
    paths = {split: tuple(entry["path"] for entry in of_split) for split, of_split in entries.items()}
    return GroundTruth(root, database, paths, labels, exhibit_ids, digests, photographers, photographer_names=people)


def is_text(value: Any) -> bool:
    """Whether it is text that a file's name can hold."""
    return type(value) is str and "\0" not in value and not any("\ud800" <= letter <= "\udfff" for letter in value)


def is_place_below(path: Any) -> bool:
    """Whether a path, relative to a folder, names a file that can lie below it."""
    parts = PurePosixPath(path) if is_text(path) else PurePosixPath()
    return bool(parts.name) and not parts.is_absolute() and ".." not in parts.parts


def nfc(name: str) -> str:
    """A name in the form that names are compared in: a Mac writes é as two signs, Windows as one."""
    return unicodedata.normalize("NFC", name)


def as_name(text: str) -> str:
    """A name in one form for all texts that look alike: in NFC, blanks of any kind as one, without invisible signs."""
    return " ".join(re.sub("[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]", "", nfc(text)).split())


def file_below(folder: Path, path: str) -> Path:
    """Where a file lies by its path, whose accents may be written in another form on disk than here."""
    return folder / path if path.isascii() else _accented(folder, path)


@functools.cache
def _accented(folder: Path, path: str) -> Path:
    if os.path.lexists(folder / path):
        return folder / path
    places = [folder]
    for part in PurePosixPath(path).parts:
        places = [place / name for place in places for name in _names_in(place).get(nfc(part), ())]
    return min(places, default=folder / path)


@functools.lru_cache(64)
def _names_in(folder: Path) -> Mapping[str, Sequence[str]]:
    """The names in a folder by their form to compare; of a folder that cannot be listed none."""
    names: dict[str, list[str]] = {}
    with contextlib.suppress(OSError):
        for file in folder.iterdir():
            names.setdefault(nfc(file.name), []).append(file.name)
    return names


def _read_entries(file: Path) -> tuple[list[dict[str, Any]], str]:
    if not file.exists():
        names = ", ".join(f"ground_truth/{name}" for name in QUERY_FILES.values())
        layout = f"ground_truth/{DATABASE_FILES['full']} (or {DATABASE_FILES['mini']}), {names} and images/"
        raise UserError(f"{file}: no such file; a data root holds {layout}")
    try:
        content = regular(file).read_bytes()
        entries = parse_json(content)
    except ValueError as error:  # also a number with more digits than Python reads
        raise UserError(f"{file}: not valid JSON ({one_line(error)}); download or write it again") from None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{file}: must be a non-empty JSON list of objects")
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise UserError(f"{file}: entry {i} must be an object with a 'path', found {shown(entry)}")
        if not is_place_below(entry.get("path")):
            found = shown(entry.get("path"))
            raise UserError(f"{file}: entry {i}: 'path' must name a file inside images/, found {found}")
    return entries, hashlib.sha256(content).hexdigest()


def _exhibit_id(file: Path, i: int, entry: dict[str, Any], key: str) -> int:
    exhibit_id = entry.get(key)
    if isinstance(exhibit_id, bool) or not isinstance(exhibit_id, int) or not 0 <= exhibit_id < 2**63:
        raise UserError(f"{file}: entry {i}: '{key}' must be a whole number >= 0, found {shown(exhibit_id)}")
    return exhibit_id


def _refuse_repeated_paths(files: Mapping[str, Path], entries: Mapping[str, list[dict[str, Any]]]) -> None:
    """An image listed twice, in one file or in two, would count twice or leak from one split to another."""
    seen: dict[str, tuple[Path, int]] = {}
    for split, file in files.items():
        for i, entry in enumerate(entries[split]):
            same = nfc(str(PurePosixPath(entry["path"])))  # ./a.jpg is a.jpg
            other_file, other = seen.setdefault(same, (file, i))
            if (other_file, other) != (file, i):
                where = f"entry {other}" if other_file == file else f"{other_file}, entry {other}"
                path = shown(entry["path"])
                raise UserError(f"{file}: entry {i}: path {path} is listed already ({where}); remove one")


def _query_labels(
    file: Path, entries: list[dict[str, Any]], exhibit_ids: np.ndarray, database: DatabaseName
) -> np.ndarray:
    label_of = {int(exhibit_id): label for label, exhibit_id in enumerate(exhibit_ids)}
    labels = np.full(len(entries), DISTRACTOR, dtype=np.int64)
    unknown = []
    for i, entry in enumerate(entries):
        if "MET_id" in entry:
            exhibit_id = _exhibit_id(file, i, entry, "MET_id")
            labels[i] = label_of.get(exhibit_id, DISTRACTOR)
            if exhibit_id not in label_of:
                unknown.append(f"{entry['path'][:100]} (exhibit {exhibit_id})")
        elif misspelt := [key for key in entry if re.sub(r"[\W_]", "", key).lower() in ("metid", "id")]:
            raise UserError(f"{file}: entry {i}: has {shown(misspelt[0])}, a query's exhibit is 'MET_id'; rename it")
    if unknown:
        several = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        remedy = "use database full" if database == "mini" else "add their images"
        fault = f"{len(unknown):,} met queries show exhibits that are not in {DATABASE_FILES[database]}: {several}"
        raise UserError(f"{file}: {fault}; {remedy}, or remove them (a distractor has no 'MET_id')")
    if (labels == DISTRACTOR).all():
        raise UserError(f"{file}: no query has a 'MET_id', so GAP and ACC are undefined; add met queries")
    return labels


def _photographers(entries: Mapping[str, list[dict[str, Any]]]) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Of each split's queries the photographer's number, the same in all splits, and the names of the numbers."""
    said = {
        split: [nfc(name) if isinstance(name := entry.get("photographer"), str) else "" for entry in of]
        for split, of in entries.items()
    }
    names = tuple(sorted({name for of in said.values() for name in of} - {""}))
    number_of = {name: i for i, name in enumerate(names)}
    return {split: np.array([number_of.get(name, NOT_NAMED) for name in of]) for split, of in said.items()}, names
