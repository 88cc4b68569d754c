"""Local features on disk, within a limit: computed when first needed, the least recently used thrown away.

One small file an image, named by a digest of everything that determines its features. Several processes may share a
folder: files appear whole, and one that another process removes meanwhile is computed again.
"""

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from metilr.descriptors import settings_fingerprint
from metilr.errors import UserError
from metilr.files import replaced_file
from metilr.geometry import LocalFeatures
from metilr.zip_files import read_npz

LIMIT = 4 << 30  # bytes: 40,000 images by lite0_in, 3,000 by a ResNet-50
SUFFIX = ".local.npz"  # of entries; nothing else in the folder is touched
ROOM = 0.9  # of the limit is left after throwing away, so that not every new entry looks through the folder


class FeatureCache:
    """Gives an image's features from disk, or computes and keeps them.

    Descriptors are kept in float16 and returned as kept even when they are new, so figures do not depend on what was
    there. Those of ``LocalFeatureExtractor`` lose nothing by it.

    Args:
        folder: Where the files lie; made if missing.
        settings: Everything besides the image file that determines features; others are never mixed up.
        limit: Most bytes of all entries in the folder. With several processes at work, each may pass it by a
            hundredth.

    Raises:
        UserError: If the folder cannot be made or read.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], limit: int = LIMIT) -> None:
        self.folder = folder
        self.limit = limit
        self._fingerprint = settings_fingerprint(settings)
        self._new_bytes = 0  # written since the folder was looked through
        self._lock = threading.Lock()  # of the two counts
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._old_bytes = sum(size for _, size, _ in self._entries())
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be used as a cache ({error.strerror}); make it writable, or start in another folder"
            ) from None

    def features(self, image: Path, compute: Callable[[], LocalFeatures]) -> LocalFeatures:
        """Return the features of an image file.

        Args:
            image: The file. One of another size or time of change counts as another image.
            compute: Called where they are not on disk, or damaged there.

        Raises:
            UserError: If they cannot be written.
            OSError: If the image file is missing.
        """
        entry = self._entry(image)
        kept = _read(entry)
        if kept is not None:
            return kept
        computed = compute()
        features = LocalFeatures(computed.positions, computed.descriptors.astype(np.float16))
        try:
            with replaced_file(entry) as stream:
                np.savez(stream, **features._asdict())
            with self._lock:
                self._make_room(entry.stat().st_size)
        except FileNotFoundError:
            pass  # another process has thrown it away already
        except OSError as error:
            raise UserError(f"{entry}: cannot be written ({error.strerror}); free some space") from None
        return _in_float32(features)

    def _entry(self, image: Path) -> Path:
        status = image.stat()
        name = f"{self._fingerprint}\n{image.resolve()}\n{status.st_size}\n{status.st_mtime_ns}"
        return self.folder / (hashlib.sha256(name.encode()).hexdigest()[:32] + SUFFIX)

    def _make_room(self, n_bytes: int) -> None:
        self._new_bytes += n_bytes
        # Others write as well: look again before that can be much.
        if self._old_bytes + self._new_bytes <= self.limit and self._new_bytes <= self.limit / 100:
            return
        entries = sorted(self._entries())
        total = sum(size for _, size, _ in entries)
        if total > self.limit:
            for _, size, file in entries:
                if total <= ROOM * self.limit:
                    break
                file.unlink(missing_ok=True)
                total -= size
        self._old_bytes, self._new_bytes = total, 0

    def _entries(self) -> list[tuple[int, int, Path]]:
        """Time of last use, bytes and path of each entry, those included that a killed process left half written."""
        entries = []
        for file in self.folder.glob(f"*{SUFFIX}*"):
            with contextlib.suppress(FileNotFoundError):  # another process throws away as well
                status = file.stat()
                entries.append((status.st_mtime_ns, status.st_size, file))
        return entries


def _read(entry: Path) -> LocalFeatures | None:
    """Return what an entry holds, and note the use; None if it is missing or damaged."""
    try:
        arrays = read_npz(entry)
        features = LocalFeatures(arrays["positions"], arrays["descriptors"])
    except Exception:  # NumPy and zipfile raise many types on damaged files; each means the same here
        return None
    positions, descriptors = features
    if positions.dtype != np.float32 or positions.ndim != 2 or positions.shape[1] != 2:
        return None
    if descriptors.dtype != np.float16 or descriptors.ndim != 2 or len(descriptors) != len(positions):
        return None
    if not np.isfinite(positions).all() or not np.isfinite(descriptors).all():
        return None
    with contextlib.suppress(OSError):  # thrown away by another process just now, or a folder to read from alone
        os.utime(entry)
    return _in_float32(features)


def _in_float32(features: LocalFeatures) -> LocalFeatures:
    return LocalFeatures(features.positions, features.descriptors.astype(np.float32))
