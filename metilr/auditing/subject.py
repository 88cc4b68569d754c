"""What is audited: the images of all splits in one row, their descriptors, and what long work has found so far."""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metilr.auditing.schema import Image
from metilr.data.ground_truth import GroundTruth
from metilr.evaluation.database import as_compared
from metilr.extraction.descriptors import Descriptors
from metilr.extraction.store import CHUNK_ROWS
from metilr.metrics import DISTRACTOR


@dataclass(frozen=True, eq=False)
class Subject:
    """Images of all splits one after another, n of them; an index has a database alone."""

    name: str
    truth: GroundTruth
    names: Sequence[str]  # of each label's exhibit
    descriptors: Descriptors

    @property
    def splits(self) -> list[str]:
        """Names of the splits; the first is the database."""
        return list(self.truth.paths)

    @functools.cached_property
    def split_of(self) -> np.ndarray:
        """Place in ``splits`` of each image, int64 ``(n,)``."""
        return np.repeat(np.arange(len(self.splits)), [len(paths) for paths in self.truth.paths.values()])

    @functools.cached_property
    def paths(self) -> list[str]:
        """Of each image."""
        return [path for paths in self.truth.paths.values() for path in paths]

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """Label of each image, int64 ``(n,)``; DISTRACTOR where no exhibit is shown."""
        return np.concatenate([self.truth.labels[split] for split in self.splits])

    @functools.cached_property
    def is_valid(self) -> np.ndarray:
        """Which images have a descriptor, bool ``(n,)``."""
        return np.concatenate([self.descriptors.is_valid[split] for split in self.splits])

    def file(self, image: int) -> Path:
        """Where an image lies."""
        return self.truth.image(self.paths[image])

    def said(self, image: int) -> Image:
        """An image as the document names it."""
        label = int(self.labels[image])
        exhibit = None if label == DISTRACTOR else self.names[label]
        return Image(split=self.splits[self.split_of[image]], path=self.paths[image], exhibit=exhibit)

    def rows(self, file: Path) -> np.ndarray:
        """Descriptors of unit length, float32 ``(n, D)``, zeros where there is none; in a file, not in memory."""
        if not file.exists():
            unfinished = file.with_suffix(".unfinished")
            shape = (len(self.paths), self.descriptors.width)
            rows, start = np.lib.format.open_memmap(unfinished, "w+", np.float32, shape), 0
            for split in self.splits:
                parts = self.descriptors.parts[split]
                for first in range(0, len(parts[0]), CHUNK_ROWS):
                    chunk = np.concatenate([part[first : first + CHUNK_ROWS] for part in parts], axis=1)
                    is_valid = self.descriptors.is_valid[split][first : first + CHUNK_ROWS]
                    rows[start : start + len(chunk)] = as_compared(np.where(is_valid[:, None], chunk, 0), None)
                    start += len(chunk)
            rows.flush()
            unfinished.rename(file)
        return np.load(file, mmap_mode="r")


class Found:
    """What long work has found, a line of JSON each, so that an interrupted run continues."""

    def __init__(self, file: Path) -> None:
        self.known: dict[str, Any] = {}
        if file.exists():
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]  # a kill cuts the last one off
            self.known = {key: value for key, value in map(json.loads, whole)}
            if len(whole) < len(lines):
                file.write_text("".join(whole), encoding="utf-8")
        self._stream = file.open("a", encoding="utf-8")

    def add(self, key: str, value: Any) -> None:
        """Keep what was found for a key."""
        self.known[key] = value
        self._stream.write(json.dumps([key, value]) + "\n")
        self._stream.flush()
