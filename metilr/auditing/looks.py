"""What is to be said of an image by itself: whether it can be read, and whether it shows anything."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from metilr.auditing.schema import Look
from metilr.auditing.subject import Found, Subject
from metilr.data.decode import BadImageError, load_image
from metilr.files import file_sha256
from metilr.progress import tracked

READERS = 4
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
    """Decode all images, but for those that were before."""

    def fact(i: int) -> Facts:
        known = found.known.get(str(i))
        return _read(subject, i) if known is None else Facts(*known)

    facts = []
    with ThreadPoolExecutor(READERS) as pool:
        n = len(subject.paths)
        for i, each in enumerate(tracked(pool.map(fact, range(n)), "reading images", n, "images", quiet)):
            if str(i) not in found.known:
                found.add(str(i), each)
            facts.append(each._replace(size=tuple(each.size)))  # type: ignore[arg-type]
    return facts


def _read(subject: Subject, i: int) -> Facts:
    try:
        image = load_image(subject.file(i)).permute(1, 2, 0).numpy()
    except BadImageError as error:
        return Facts(reason=error.reason or str(error))
    grey = image.mean(axis=2)
    height, width = grey.shape
    return Facts(
        sha256=file_sha256(subject.file(i)),
        pixels=hashlib.sha256(f"{height} {width} ".encode() + image.tobytes()).hexdigest(),
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
