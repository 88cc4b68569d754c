"""The official archives of the Met dataset: where they are, what is in them, what is known of them.

Source: http://cmp.felk.cvut.cz/met/. Sizes and digests stand here where they are known; those of the other archives
are recorded at the first download, and a later difference is refused.
"""

from dataclasses import dataclass
from typing import Literal

from metilr.transfer import MOST

OFFICIAL = "http://ptak.felk.cvut.cz/met/dataset/"

DataSet = Literal["queries", "mini", "full"]


@dataclass(frozen=True)
class Archive:
    """One .tar.gz.

    Attributes:
        name: Its file name.
        folder: Where its files go, below the data root.
        depth: How many of the last parts of a file's path in the archive say where in the folder it goes:
            ``<id>/<n>.jpg`` of a database image, the name alone of the others. What is before them is the
            archive's own top folder, whatever it is called.
        suffix: Ending of the files that count.
        size: Bytes.
        sha256: Its digest.
        about: Bytes, roughly, where ``size`` is unknown.
        growth: Bytes of its files for each of its own, estimated: images are compressed already, and the ground
            truth's JSON text shrinks to a fifth.
    """

    name: str
    folder: str
    depth: int
    suffix: str = ".jpg"
    size: int | None = None
    sha256: str | None = None
    about: int | None = None
    growth: float = 1.0

    @property
    def most(self) -> int:
        """Bytes that it can have: its own, twice the rough number, or ``MOST`` of a file of which nothing is known."""
        return self.size or 2 * (self.about or 0) or MOST


_QUERIES = (
    Archive("ground_truth.tar.gz", "ground_truth", depth=1, suffix=".json", growth=5.0),
    Archive(
        "test_met.tar.gz",
        "images/test_met",
        depth=1,
        size=34_048_842,
        sha256="2bc9b2e906d5fc69c4c136860b42604ef867b69ada10f1e08aa49175cbe08a35",
    ),
    Archive("test_other.tar.gz", "images/test_other", depth=1),
    Archive("test_noart.tar.gz", "images/test_noart", depth=1),
)
_MINI = Archive(
    "small_MET.tar.gz",
    "images/MET",
    depth=2,
    size=2_865_082_125,
    sha256="0cf5736dee3eac8598daa1a929723834abcb037d57d3f0f0f58018f4bfa9a916",
)
_FULL = Archive("MET.tar.gz", "images/MET", depth=2, about=28_000_000_000)

ARCHIVES: dict[DataSet, tuple[Archive, ...]] = {
    "queries": _QUERIES,
    "mini": (*_QUERIES, _MINI),
    "full": (*_QUERIES, _FULL),
}
PUBLISHED_IMAGES = {"full": 397_121, "mini": 38_307, "val": 2_165, "test": 19_319}  # Ypsilantis et al. 2021; its files
