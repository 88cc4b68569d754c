"""The descriptor store: a folder of descriptors on disk, what made them, and how far the making got.

``database.npy``, ``val.npy`` and ``test.npy`` hold one unit-length float32 descriptor per image, in ground-truth order.
``<split>.files.npy`` holds, per row, the size in bytes of the image file that it was made from (0: not made yet;
``-size - 1``: the file could not be decoded). ``manifest.json`` holds the settings. An image that is exchanged for one
of another size in bytes is described anew; one of exactly the same size is not noticed.

Descriptors are written where they belong as they are computed, by any number of processes, and marked after that; a
killed run continues with what is not marked. A marked descriptor that is not of unit length (a machine that went down
between the two writes) is made again.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metilr.errors import UserError, one_line
from metilr.files import LOCK, alone_in, map_array, named, remove_leftovers, reserve_array, write_atomically

SCHEMA = "metilr.descriptors/1"
SPLITS = ("database", "val", "test")
CHUNK_ROWS = 8192
OURS = (".manifest.json.", LOCK)  # in a folder where a killed process has got no further
UNIT_TOLERANCE = 1e-3  # float32 descriptors are of unit length to about 1e-6; a torn write is far off


class DescriptorStore:
    """Descriptors of one ground truth made with one set of settings, in a folder that ``prepare`` makes."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def prepare(self, settings: Mapping[str, Any], counts: Mapping[str, int], width: int) -> None:
        """Make the folder and reserve its disk space, or check that it was made with the same settings.

        Args:
            settings: All that can change a descriptor, as JSON types.
            counts: Images by split.
            width: Descriptor dimensions.

        Raises:
            UserError: If the folder holds something else, or was made with other settings, or cannot be written, or
                the disk is too full.
        """
        wanted = {"schema": SCHEMA, "settings": _as_json(settings), "counts": dict(counts), "width": width}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            present = sorted(file.name for file in self.path.iterdir())
            if "manifest.json" not in present:
                foreign = [name for name in present if not name.startswith(OURS)]
                if foreign:
                    raise UserError(f"{self.path}: holds other files ({foreign[0]}); name an empty or new folder")
                self._write_manifest({**wanted, "complete": False})  # first: arrays without it are somebody else's
            manifest = self.manifest()
            decisive = ("settings", "counts", "width")
            differing = _differing({name: manifest[name] for name in decisive}, {n: wanted[n] for n in decisive}, "")
            if differing:
                named_keys = "; ".join(differing[:4]) + ("; ..." if len(differing) > 4 else "")
                raise UserError(f"{self.path}: was made with other settings ({named_keys}); name another folder")
            for split, n in {} if manifest["complete"] else counts.items():
                _reserve(self.path / f"{split}.npy", (n, width), np.float32)
                _reserve(self.path / f"{split}.files.npy", (n,), np.int64)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); name another folder") from None

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Hold the store against other runs while it is filled; of several processes of a run the first one does.

        Raises:
            UserError: If another run fills it now.
        """
        return alone_in(self.path, "another run", "stop it")

    def begin(self, made_with: Mapping[str, Any]) -> None:
        """Mark the store incomplete before it is filled: a run killed now leaves no mixture unnoticed.

        Args:
            made_with: What is worth knowing but changes nothing beyond rounding (versions, device). A run that
                continues with another one adds it.
        """
        manifest, now = self.manifest(), _as_json(made_with)
        before = manifest.get("made_with", [])
        self._write_manifest({**manifest, "complete": False, "made_with": before if now in before else [*before, now]})

    def finish(self) -> None:
        """Mark the store complete."""
        self._write_manifest({**self.manifest(), "complete": True})
        remove_leftovers(self.path)

    @property
    def exists(self) -> bool:
        """Whether the folder is a store, finished or not."""
        return (self.path / "manifest.json").exists()

    @property
    def is_complete(self) -> bool:
        """Whether it was finished."""
        return bool(self.manifest()["complete"])

    def require_complete(self) -> None:
        """Refuse a store that is not finished.

        Raises:
            UserError: If it is not, or the folder is not a store.
        """
        if not self.is_complete:
            raise UserError(f"{self.path}: is not finished; run the evaluation that makes it again to complete it")

    def manifest(self) -> dict[str, Any]:
        """What made the descriptors.

        Raises:
            UserError: If the folder is not a store.
        """
        file = self.path / "manifest.json"
        try:
            manifest = json.loads(file.read_text())
        except FileNotFoundError:
            raise UserError(f"{self.path}: not a descriptor store (it has no manifest.json)") from None
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{file}: cannot be read ({one_line(error)}); {_remedy(file, error)}") from None
        if not _is_manifest(manifest):
            raise UserError(f"{file}: not of the form {SCHEMA}; delete {self.path} to make it again")
        return manifest

    def descriptors(self, split: str) -> np.memmap:
        """Descriptors of a split, float32 ``(n, D)``, memory-mapped, read-only."""
        return self._array(f"{split}.npy", np.float32, 2)

    def files(self, split: str) -> np.ndarray:
        """How far the making got: per row a file size, 0 or a negative mark (see the module), int64 ``(n,)``."""
        return np.array(self._array(f"{split}.files.npy", np.int64, 1))

    def is_valid(self, split: str) -> np.ndarray:
        """Which rows hold a descriptor, bool ``(n,)``; the others are of images that were left out."""
        return self.files(split) > 0

    def pending(self, split: str, sizes: np.ndarray, retry_bad: bool) -> np.ndarray:
        """Which rows are still to be made, bool ``(n,)``.

        Args:
            split: A split's name.
            sizes: Size in bytes of each row's image file now; a row made from a file of another size is pending.
            retry_bad: Whether to try files again that could not be decoded and have not changed.
        """
        files = self.files(split)
        settled = (files == sizes) & (files > 0)
        if not self.is_complete:  # a complete store passed this when it was finished
            descriptors, rows = self.descriptors(split), np.flatnonzero(settled)
            for start in range(0, len(rows), CHUNK_ROWS):
                part = rows[start : start + CHUNK_ROWS]
                settled[part] = has_unit_length(descriptors[part])
        if not retry_bad:
            settled |= files == -sizes - 1
        return ~settled

    def writer(self) -> "RowWriter":
        """A way to write descriptors from this process. Close it."""
        return RowWriter(self)

    def _array(self, name: str, dtype: type, ndim: int) -> np.memmap:
        file = self.path / name
        array = map_array(file, lambda error: _remedy(file, error))
        if array.dtype != dtype or array.ndim != ndim or not array.flags.c_contiguous:
            raise UserError(
                f"{file}: holds {array.dtype} of shape {array.shape}, which is no part of a store; "
                f"delete {self.path} to make it again"
            )
        return array

    def _write_manifest(self, manifest: Mapping[str, Any]) -> None:
        write_atomically(self.path / "manifest.json", json.dumps(manifest, indent=1, sort_keys=True) + "\n")


class RowWriter:
    """Writes descriptors where they belong. Several processes may write different rows at once.

    Plain writes at an offset, not a memory map: a full disk is then an error and not a dead process, and two
    machines that share the folder never write each other's rows.
    """

    def __init__(self, store: DescriptorStore) -> None:
        splits = store.manifest()["counts"]
        arrays = {split: store.descriptors(split) for split in splits}
        arrays |= {f"{split}.files": store._array(f"{split}.files.npy", np.int64, 1) for split in splits}
        self._offsets = {name: array.offset for name, array in arrays.items()}
        self._row_bytes = {name: array[:1].nbytes for name, array in arrays.items()}
        self._files = {name: (store.path / f"{name}.npy").open("r+b", buffering=0) for name in arrays}

    def write(self, split: str, row: int, descriptor: np.ndarray, file_size: int) -> None:
        """Write one descriptor, float32 ``(D,)`` of unit length, then mark its row."""
        self._put(split, row, descriptor.tobytes())
        self._put(f"{split}.files", row, np.int64(file_size).tobytes())

    def mark_bad(self, split: str, row: int, file_size: int) -> None:
        """Note that the row's image cannot be decoded."""
        self._put(f"{split}.files", row, np.int64(-file_size - 1).tobytes())

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


def has_unit_length(descriptors: np.ndarray) -> np.ndarray:
    """Which of ``(n, D)`` are of unit length, bool ``(n,)``; those that are not finite are not."""
    return np.abs(np.linalg.norm(descriptors, axis=1) - 1) < UNIT_TOLERANCE


def differing_settings(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Name each setting that differs between two, with both values in short."""
    return _differing(_as_json(found), _as_json(wanted), "settings")


def settings_fingerprint(settings: Mapping[str, Any]) -> str:
    """Twelve hex digits that change with any setting."""
    return hashlib.sha256(json.dumps(_as_json(settings), sort_keys=True).encode()).hexdigest()[:12]


def row_chunks(arrays: Sequence[np.ndarray], keep: np.ndarray, chunk_rows: int = CHUNK_ROWS) -> Iterator[np.ndarray]:
    """Kept rows of several equally long matrices side by side, a bounded number at a time.

    Args:
        arrays: Each ``(n, D_i)``, memory-mapped or not.
        keep: Which rows, bool ``(n,)``.
        chunk_rows: Most rows read at a time.

    Yields:
        float32 ``(m, sum of D_i)``, ``m <= chunk_rows``, in row order.
    """
    for start in range(0, len(keep), chunk_rows):
        part = slice(start, start + chunk_rows)
        if keep[part].any():
            yield np.concatenate([np.asarray(a[part][keep[part]], dtype=np.float32) for a in arrays], axis=1)


def _is_manifest(found: Any) -> bool:
    kinds = {"schema": str, "settings": dict, "counts": dict, "width": int, "complete": bool}
    return (
        isinstance(found, dict)
        and all(type(found.get(name)) is kind for name, kind in kinds.items())
        and found["schema"] == SCHEMA
        and found["width"] >= 1
        and all(type(n) is int and 0 <= n < 2**63 for n in found["counts"].values())
        and isinstance(found["settings"].get("ground_truth", {}), dict)
        and isinstance(found.setdefault("made_with", []), list)
        and all(isinstance(each, dict) for each in found["made_with"])
    )


def _reserve(file: Path, shape: tuple[int, ...], dtype: type) -> None:
    try:
        reserve_array(file, shape, np.dtype(dtype))
    except OSError as error:
        gigabytes = int(np.prod(shape)) * np.dtype(dtype).itemsize / 1e9
        remedy = "free some, or name a folder on another disk"
        raise UserError(f"{file}: cannot reserve {gigabytes:.2f} GB ({error.strerror}); {remedy}") from None


def _remedy(file: Path, error: Exception) -> str:
    """What to do: descriptors on a disk that fails are not to be thrown away."""
    fails = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
    return "mend that and run the same command again" if fails else f"delete {file.parent} to make it again"


def _differing(found: Any, wanted: Any, name: str) -> list[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = sorted(found.keys() | wanted.keys())
        return [each for key in keys for each in _differing(found.get(key), wanted.get(key), key)]
    there, now = (text if len(text) <= 40 else text[:37] + "..." for text in map(json.dumps, (found, wanted)))
    return [] if found == wanted else [f"{name[:40]}: {there} there, {now} now"]


def _as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What comes back when the settings are read from a file: tuples are lists, paths are strings."""
    return json.loads(json.dumps(settings))
