"""What is to be said of an image by itself: whether it can be read, and whether it shows anything."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from metilr.auditing.schema import Look
from metilr.auditing.subject import Found, Subject
from metilr.data.decode import BadImageError, load_image, max_pixels
from metilr.files import file_sha256
from metilr.progress import counted

READERS, CHUNK = 4, 1000  # threads; images that they are given at a time
SIDE = 512  # px of the longer side, for what is counted
LEAST_SIDE = 64  # px
LONGEST = 5.0  # times as long as wide
FLAT, NEARLY, SHARE = 2.0, 8, 0.95  # deviation of one colour; levels about the median that so many pixels keep to
DARK = 40  # of 255: 95% of the pixels are darker


class Facts(NamedTuple):
    """An image, decoded once."""

    sha256: str = ""  # of the file
    pixels: str = ""  # digest of height, width and RGB
    size: tuple[int, int] = (0, 0)  # width, height
    deviation: float = 0.0  # of grey, of 255
    near_median: float = 0.0  # share of pixels
    bright: float = 0.0  # grey that 95% of pixels are below
    reason: str = ""  # why it cannot be read


def read_facts(subject: Subject, found: Found, quiet: bool) -> list[Facts]:
    """Decode all images, but for those that were before and have not changed since."""
    facts, n = [], len(subject.paths)
    with ThreadPoolExecutor(READERS) as pool, counted("reading images", n, "images", quiet) as done:
        for start in range(0, n, CHUNK):
            some = range(start, min(start + CHUNK, n))
            keys = [_key(subject.file(i)) for i in some]
            read = pool.map(lambda i, key: found.known.get(key) or _read(subject.file(i)), some, keys)
            for key, each in zip(keys, read, strict=True):
                if key not in found.known:
                    found.add(key, each)
                facts.append(Facts(*each))
                done(1)
    return facts


def _key(file: Path) -> str:
    """What tells an image from one that stands in its place later, or is read within another limit."""
    try:
        status = file.stat()
    except OSError:
        return f"{file} is missing"
    return f"{file} {status.st_size} {status.st_mtime_ns} {max_pixels()}"


def _read(file: Path) -> Facts:
    try:
        image = load_image(file)
    except BadImageError as error:
        return Facts(reason=error.reason or str(error))
    height, width = image.shape[1:]
    digest = hashlib.sha256(f"{height} {width} ".encode())
    digest.update(image.contiguous().numpy().data)
    factor = min(1.0, SIDE / max(height, width))
    small = (max(1, round(width * factor)), max(1, round(height * factor)))
    pixels = cv2.cvtColor(image.permute(1, 2, 0).contiguous().numpy(), cv2.COLOR_RGB2GRAY)
    grey = cv2.resize(pixels, small, interpolation=cv2.INTER_AREA).astype(np.float32)
    return Facts(
        sha256=file_sha256(file),
        pixels=digest.hexdigest(),
        size=(width, height),
        deviation=float(grey.std()),
        near_median=float((np.abs(grey - np.median(grey)) <= NEARLY).mean()),
        bright=float(np.quantile(grey, 0.95)),
    )


def looks_of(facts: Facts) -> Iterator[tuple[Look, str]]:
    """What kinds of doubt an image gives, each with a reason."""
    if facts.reason:
        yield "unreadable", facts.reason
        return
    width, height = facts.size
    if min(facts.size) < LEAST_SIDE:
        yield "tiny", f"{width} x {height} px"
    if max(facts.size) > LONGEST * min(facts.size):
        yield "shape", f"{width} x {height} px"
    if facts.deviation < FLAT:
        yield "blank", f"deviation of {facts.deviation:.1f} of 255 levels"
    elif facts.bright < DARK:
        yield "dark", f"95% of the pixels darker than {facts.bright:.0f} of 255"
    elif facts.near_median > SHARE:
        yield "uniform", f"{facts.near_median:.0%} of the pixels within {NEARLY} levels"
