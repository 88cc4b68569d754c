"""The descriptor store: a folder of descriptors on disk, what made them, and how far the making got.

``database.npy``, ``val.npy`` and ``test.npy`` hold one unit-length float32 descriptor per image, in ground-truth order.
``<split>.files.npy`` holds, per row, the size in bytes of the image file that it was made from (0: not made yet;
``-size - 1``: the file could not be decoded), and ``<split>.crc32.npy`` a checksum of the descriptor and that number.
``manifest.json`` holds the settings. An image that is exchanged for one of another size in bytes is described anew; one
of exactly the same size is not noticed.

Descriptors are written where they belong as they are computed, by any number of processes, and marked after that; a
killed run continues with what is not marked. A row that is not as it was written (a disk's fault, a stranger's hand, a
machine that went down between two writes) is made again. Rows of the first edition have no checksum; they must be of
unit length.
"""

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from metilr.errors import UserError, one_line
from metilr.files import LOCK, alone_in, map_array, named, read_json, remove_leftovers, reserve_array, write_atomically

SCHEMA: Final = "metilr.descriptors/1"
SPLITS = ("database", "val", "test")
CHUNK_ROWS = 8192
OURS = (".manifest.json.", LOCK)  # in a folder where a killed process has got no further
UNIT_TOLERANCE = 1e-3  # float32 descriptors are of unit length to about 1e-6; a torn write is far off


class Manifest(BaseModel):
    """What made a store, and whether it is finished."""

    model_config = ConfigDict(strict=True, extra="allow")

    form: Literal["metilr.descriptors/1"] = Field(default=SCHEMA, alias="schema")
    settings: dict[str, Any]  # all that can change a descriptor, as JSON types
    counts: dict[str, Annotated[int, Field(ge=0, lt=2**63)]]  # images by split
    width: Annotated[int, Field(ge=1)]
    complete: bool
    checksums: bool = False  # whether each row that is marked has one; false for the first edition's
    made_with: list[dict[str, Any]] = []  # worth knowing, but changes nothing beyond rounding (versions, device)

    @property
    def digests(self) -> dict[str, Any]:
        """Of the ground-truth files that it was made for, by split."""
        found = self.settings.get("ground_truth")
        return found if isinstance(found, dict) else {}


class DescriptorStore:
    """Descriptors of one ground truth made with one set of settings, in a folder that ``prepare`` makes."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.n_made = 0  # rows that describe_images made, and did not find, when it gave this

    def prepare(self, settings: Mapping[str, Any], counts: Mapping[str, int], width: int) -> None:
        """Make the folder and reserve its disk space, or check that it was made with the same settings.

        Raises:
            UserError: If the folder holds something else, or was made with other settings, or the disk is too full.
        """
        wanted = Manifest(settings=_as_json(settings), counts=dict(counts), width=width, complete=False, checksums=True)
        self.path.mkdir(parents=True, exist_ok=True)
        if not self.exists:
            foreign = [file.name for file in sorted(self.path.iterdir()) if not file.name.startswith(OURS)]
            if foreign:
                raise UserError(f"{self.path}: holds other files ({foreign[0]}); name an empty or new folder")
            self._write_manifest(wanted)  # first: arrays without it are somebody else's
        manifest = self.manifest()
        decisive = {"settings", "counts", "width"}
        differing = _differing(manifest.model_dump(include=decisive), wanted.model_dump(include=decisive), "")
        if differing:
            several = "; ".join(differing[:4]) + ("; ..." if len(differing) > 4 else "")
            raise UserError(f"{self.path}: was made with other settings ({several}); name another folder")
        for split, n in {} if manifest.complete else counts.items():
            try:
                reserve_array(self.path / f"{split}.npy", (n, width), np.dtype(np.float32))
                reserve_array(self.path / f"{split}.files.npy", (n,), np.dtype(np.int64))
                reserve_array(self.path / f"{split}.crc32.npy", (n,), np.dtype(np.uint32))
            except OSError as error:
                message = f"{self.path}: cannot reserve {n * (4 * width + 8) / 1e9:.2f} GB ({error.strerror})"
                raise UserError(f"{message}; free some, or name a folder on another disk") from None

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Hold the store against other runs while it is filled; of several processes of a run the first one does."""
        return alone_in(self.path, "another run", "stop it")

    def begin(self, made_with: Mapping[str, Any]) -> None:
        """Mark the store incomplete before it is filled: a run killed now leaves no mixture unnoticed.

        What it is ``made_with`` is added if a run continues with something else.
        """
        manifest, now = self.manifest(), _as_json(made_with)
        made = manifest.made_with if now in manifest.made_with else [*manifest.made_with, now]
        self._write_manifest(manifest.model_copy(update={"complete": False, "made_with": made}))

    def finish(self) -> None:
        """Mark the store complete."""
        self._write_manifest(self.manifest().model_copy(update={"complete": True}))
        remove_leftovers(self.path)

    @property
    def exists(self) -> bool:
        """Whether the folder is a store, finished or not."""
        return (self.path / "manifest.json").exists()

    @property
    def is_complete(self) -> bool:
        """Whether it was finished."""
        return self.manifest().complete

    def require_complete(self) -> None:
        """Refuse a store that is not finished, and what is no store."""
        if not self.is_complete:
            raise UserError(f"{self.path}: is not finished; run the evaluation that makes it again to complete it")

    def manifest(self) -> Manifest:
        """What made the descriptors; UserError if the folder is not a store."""
        file = self.path / "manifest.json"
        try:
            return Manifest.model_validate(read_json(file))
        except FileNotFoundError:
            raise UserError(f"{self.path}: not a descriptor store (it has no manifest.json)") from None
        except ValueError as error:
            fault = f"not of the form {SCHEMA} ({one_line(error)})"
            raise UserError(f"{file}: {fault}; delete {self.path} to make it again") from None

    def descriptors(self, split: str) -> np.memmap:
        """Descriptors of a split, float32 ``(n, D)``, memory-mapped, read-only."""
        return self._array(f"{split}.npy", np.float32, 2)

    def files(self, split: str) -> np.ndarray:
        """How far the making got: per row a file size, 0 or a negative mark (see the module), int64 ``(n,)``."""
        return np.array(self._array(f"{split}.files.npy", np.int64, 1))

    def is_valid(self, split: str) -> np.ndarray:
        """Which rows hold a descriptor, bool ``(n,)``; the others are of images that were left out."""
        return self.files(split) > 0

    def damaged(self, split: str) -> np.ndarray:
        """Which rows are not as they were written, bool ``(n,)``; reads all of them, a second per million."""
        rows, files = self.descriptors(split), self.files(split)
        has_checksums = (self.path / f"{split}.crc32.npy").exists()
        known = self._array(f"{split}.crc32.npy", np.uint32, 1) if has_checksums else np.zeros(len(rows), np.uint32)
        all_have_one = self.manifest().checksums
        if not len(rows) == len(files) == len(known):
            raise UserError(f"{self.path}: its {split} files do not belong together; delete it to make it again")
        damaged = (files == 0) & self.is_complete
        for start in range(0, len(rows), CHUNK_ROWS):
            marked = start + np.flatnonzero(files[start : start + CHUNK_ROWS])  # the others hold nothing to read
            block, marks, checksums = rows[marked], files[marked], known[marked]
            found = np.fromiter(map(_checksum, block, marks), np.uint32, len(block))
            is_unchecked = (checksums == 0) & (not all_have_one)
            damaged[marked] = ~np.where(is_unchecked, (marks < 0) | has_unit_length(block), checksums == found)
        return damaged

    def pending(self, split: str, sizes: np.ndarray, retry_bad: bool) -> np.ndarray:
        """Which rows are still to be made, bool ``(n,)``: not made yet, damaged, or of a file of another size.

        Args:
            split: A split's name.
            sizes: Size in bytes of each row's image file now.
            retry_bad: Whether to try files again that could not be decoded and have not changed.
        """
        files = self.files(split)
        settled = (files == sizes) & (files > 0)
        if not retry_bad:
            settled |= files == -sizes - 1
        return ~settled | self.damaged(split)

    def writer(self) -> "RowWriter":
        """A way to write descriptors from this process. Close it."""
        return RowWriter(self)

    def _array(self, name: str, dtype: type, ndim: int) -> np.memmap:
        again = f"delete {self.path} to make it again"
        array = map_array(self.path / name, again)
        if array.dtype != dtype or array.ndim != ndim or not array.flags.c_contiguous:
            found = f"{array.dtype} of shape {array.shape}"
            raise UserError(f"{self.path / name}: holds {found}, which is no part of a store; {again}")
        return array

    def _write_manifest(self, manifest: Manifest) -> None:
        content = json.dumps(manifest.model_dump(by_alias=True), indent=1, sort_keys=True)
        write_atomically(self.path / "manifest.json", content + "\n")


class RowWriter:
    """Writes descriptors where they belong. Several processes may write different rows at once.

    Plain writes at an offset, not a memory map: a full disk is then an error and not a dead process, and two
    machines that share the folder never write each other's rows.
    """

    def __init__(self, store: DescriptorStore) -> None:
        arrays: dict[str, np.memmap] = {}
        for split, n in store.manifest().counts.items():
            reserve_array(store.path / f"{split}.crc32.npy", (n,), np.dtype(np.uint32))  # of the first edition: none
            arrays[split] = store.descriptors(split)
            arrays[f"{split}.crc32"] = store._array(f"{split}.crc32.npy", np.uint32, 1)
            arrays[f"{split}.files"] = store._array(f"{split}.files.npy", np.int64, 1)
        self._offsets = {name: array.offset for name, array in arrays.items()}
        self._row_bytes = {name: array[:1].nbytes for name, array in arrays.items()}
        self._files = {name: (store.path / f"{name}.npy").open("r+b", buffering=0) for name in arrays}

    def write(self, split: str, row: int, descriptor: np.ndarray, file_size: int) -> None:
        """Write one descriptor, float32 ``(D,)`` of unit length, then mark its row."""
        self._put(split, row, descriptor.tobytes())
        self._mark(split, row, descriptor, np.int64(file_size))

    def mark_bad(self, split: str, row: int, file_size: int) -> None:
        """Note that the row's image cannot be decoded."""
        self._mark(split, row, np.empty(0), np.int64(-file_size - 1))

    def _mark(self, split: str, row: int, descriptor: np.ndarray, mark: np.int64) -> None:
        self._put(f"{split}.crc32", row, np.uint32(_checksum(descriptor, mark)).tobytes())
        self._put(f"{split}.files", row, mark.tobytes())

    def close(self) -> None:
        """Push what was written to the disk; a second call does nothing."""
        files, self._files = self._files, {}
        with contextlib.ExitStack() as all_are_closed:  # even if one disk is gone
            for file in files.values():
                all_are_closed.enter_context(file)
            for file in files.values():
                with named(file.name):
                    os.fsync(file.fileno())

    def _put(self, name: str, row: int, content: bytes) -> None:
        file = self._files[name]
        assert len(content) == self._row_bytes[name], f"{name}: a row of another width or type"
        file.seek(self._offsets[name] + row * len(content))
        with named(file.name):
            while content:  # a nearly full disk takes a part and refuses the rest at the next call
                content = content[file.write(content) :]


def _checksum(descriptor: np.ndarray, mark: np.int64) -> int:
    return zlib.crc32(mark.tobytes(), zlib.crc32(descriptor.data) if mark > 0 else 0)


def has_unit_length(descriptors: np.ndarray) -> np.ndarray:
    """Which of ``(n, D)`` are of unit length, bool ``(n,)``; those that are not finite are not."""
    return np.abs(np.linalg.norm(descriptors.astype(np.float64), axis=1) - 1) < UNIT_TOLERANCE


def row_chunks(arrays: Sequence[np.ndarray], keep: np.ndarray, chunk_rows: int = CHUNK_ROWS) -> Iterator[np.ndarray]:
    """Rows to ``keep``, bool ``(n,)``, of several ``(n, D_i)`` side by side: float32 ``(m, sum of D_i)``, in order.

    At most ``chunk_rows`` rows are read at a time; memory-mapped arrays stay on disk.
    """
    for start in range(0, len(keep), chunk_rows):
        part = slice(start, start + chunk_rows)
        if keep[part].any():
            yield np.concatenate([np.asarray(a[part][keep[part]], dtype=np.float32) for a in arrays], axis=1)


def settings_fingerprint(settings: Mapping[str, Any] | Sequence[Any]) -> str:
    """Twelve hex digits that change with any setting."""
    return hashlib.sha256(json.dumps(_as_json(settings), sort_keys=True).encode()).hexdigest()[:12]


def differing_settings(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Name each setting that differs between two, with both values in short."""
    return _differing(_as_json(found), _as_json(wanted), "settings")


def _differing(found: Any, wanted: Any, name: str) -> list[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = sorted(found.keys() | wanted.keys())
        return [each for key in keys for each in _differing(found.get(key), wanted.get(key), key)]
    there, now = (text if len(text) <= 40 else text[:37] + "..." for text in map(json.dumps, (found, wanted)))
    return [] if found == wanted else [f"{name[:40]}: {there} there, {now} now"]


def _as_json(settings: Mapping[str, Any] | Sequence[Any]) -> Any:
    """What comes back when the settings are read from a file: tuples are lists, paths are strings."""
    return json.loads(json.dumps(settings))
