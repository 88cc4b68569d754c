"""``results.json``, read and written in one place: a model of what an evaluation found, and what made it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from metilr.data.decode import MAX_IMAGE_SIZE
from metilr.data.ground_truth import DatabaseName
from metilr.errors import UserError, one_line, shown
from metilr.extraction.options import Precision
from metilr.files import write_atomically
from metilr.models import Engine, PoolingName

SCHEMA_VERSION = 2  # 1 does not hold the options: it can be compared, but not repeated
FIGURES = ("gap", "gap_minus", "acc")
UNITS = ("photographers", "classes", "queries")  # that intervals are drawn over; not every museum has all
LEVEL = 0.95  # of the intervals
MIN_PRECISION = 0.9  # of the accepted answers on val, where nothing else is asked for
FEW_ACCEPTED = 20  # answers: one more or less that is wrong moves their precision by 5 points

Text = Annotated[str, Field(pattern=r"^[^\x00]*$")]  # what a file's name can hold
Count = Annotated[int, Field(ge=0, lt=2**63)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Crop = Annotated[float, Field(gt=0, lt=1)]
ImageSize = Annotated[int, Field(ge=1, le=MAX_IMAGE_SIZE)]  # px


class Part(BaseModel):
    """A part of a file that may be somebody else's: checked where it is read; what is not listed is kept."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, frozen=True)

    def recorded(self) -> dict[str, Any]:
        """What the file says, without defaults."""
        return self.model_dump(exclude_unset=True)


class Counts(Part):
    """Sizes of the data."""

    database_images: Count
    exhibits: Count
    val_queries: Count
    val_met: Count
    test_queries: Count
    test_met: Count


class Data(Part):
    """What was measured on."""

    root: Text
    database: DatabaseName
    synthetic: bool
    counts: Counts
    fingerprint: Text


class Pooling(Part):
    """How a map became a descriptor."""

    kind: PoolingName
    p: Any = None


class Session(Part):
    """Where descriptors were made."""

    weights_from: dict[str, Any] = {}


class Model(Part):
    """What made the descriptors; of several sources, or a descriptors.pkl, next to nothing is known."""

    backbone: Text | None = None
    weights_sha256: Text | None = None
    pooling: Pooling | None = None
    projector: dict[str, Any] | None = None
    stage: int | None = None
    scales: Sequence[float] = ()
    image_size: ImageSize | None = None
    precision: Precision = "32"
    engine: Engine = "torch"
    store: Text | None = None
    made_with: list[Session] = []
    concatenated: list[dict[str, Any]] = []


class Whitening(Part):
    """The whitening that was applied."""

    source: Text | None = None
    sha256: Text | None = None
    dim: Count | None = None
    shrinkage: float | None = None


class Elements(Part, extra="forbid"):
    """What goes beyond the published recipe; the last three are of metilrs that had more of it."""

    visits: Count
    database_views: Literal["none", "rows", "mean"]
    query_crops: list[Crop]
    crop_similarity: Literal["best", "mean"] = "best"
    dba: Count = 0
    hubness: dict[str, Any] | None = None


class Gate(Part):
    """By how much confidence falls where few local features agree."""

    weight: Annotated[float, Field(ge=0)]
    enough: Positive


class Check(Part):
    """The geometric check."""

    candidates: Annotated[Count, Field(ge=1)]
    reorder: bool
    boost: Annotated[float, Field(ge=0)]
    gate: Gate
    features: dict[str, Any]


class Grid(Part):
    """GAP on val, ``(len(k), len(tau))``, of which the largest was chosen."""

    k: list[Count]
    tau: list[float]
    val_gap: list[list[float]] = []


class Vote(Part):
    """How neighbours vote."""

    k: Annotated[Count, Field(ge=1)]
    tau: Positive


class KNN(Vote):
    """How they voted, and how that was chosen."""

    tuned_on: Literal["val"] | None = None
    grid: Grid | None


class Accepted(Part):
    """What the threshold gives on a split."""

    n_accepted: Count
    precision: Share | None
    recall: Share
    false_alarms: Share | None


class Threshold(Part):
    """The lowest log-confidence that is precise enough on val; None where there is none."""

    min_precision: Share
    chosen_on: Literal["val"]
    log_confidence: float | None
    splits: dict[str, Accepted | None]


class Intervals(Part):
    """From where to where each figure may lie."""

    gap: Annotated[list[Share], Field(min_length=2, max_length=2)]
    gap_minus: Annotated[list[Share], Field(min_length=2, max_length=2)]
    acc: Annotated[list[Share], Field(min_length=2, max_length=2)]


class Figures(Part):
    """The figures of one split, in [0, 1]; intervals by unit of the resampling."""

    gap: Share
    gap_minus: Share
    acc: Share
    n_queries: Count
    n_met: Count
    intervals: dict[str, Intervals] = {}
    open_set: dict[str, Any] = {}


class Results(Part):
    """``results.json``."""

    schema_version: Literal[1, 2]
    created: Text | None = None
    command: Text | None = None
    directory: Text = "."
    options: dict[str, Any] | None = None
    seconds: float | None = None
    peak_memory_gb: float | None = None
    notes: list[Text] = []
    data: Data
    model: Model
    whitening: Whitening | None = None
    elements: Elements | None = None
    geometric_check: Check | None = None
    search: dict[str, Any] = {}
    knn: KNN
    bootstrap: dict[str, Any] = {}  # resamples, level, seed
    threshold: Threshold | None = None
    val: Figures
    test: Figures
    skipped_images: list[Any] = []
    versions: dict[str, Any] = {}
    machine: dict[str, Any] = {}

    @model_validator(mode="after")
    def _is_complete(self) -> "Results":
        missing = {"whitening", "elements", "geometric_check"} - self.model_fields_set
        if self.schema_version > 1 and missing:
            raise ValueError(f"lacks {', '.join(sorted(missing))}")
        return self

    @property
    def splits(self) -> dict[str, Figures]:
        """The figures by split."""
        return {"val": self.val, "test": self.test}

    @property
    def unit(self) -> str | None:
        """The unit of the intervals to show beside the figures: the one with the widest for GAP on test.

        Of those that both splits have; None without any. A few photographers, or two who took most photos, give
        intervals that are too narrow.
        """
        units = [unit for unit in UNITS if unit in self.val.intervals and unit in self.test.intervals]
        ends = {unit: self.test.intervals[unit].gap for unit in units}
        return max(units, key=lambda unit: ends[unit][1] - ends[unit][0], default=None)

    @property
    def accepted_from(self) -> float | None:
        """Log-confidence from which on answers are accepted, chosen on val; None where there is none."""
        return None if self.threshold is None else self.threshold.log_confidence

    def write(self, output: Path) -> Path:
        """Write ``results.json``, the last file of a run: it says that all others are there."""
        write_atomically(output / "results.json", json.dumps(self.recorded(), indent=1, allow_nan=False) + "\n")
        return output / "results.json"


def read_results(path: Path) -> Results:
    """Read ``results.json``, the file itself or that of a run's folder.

    Raises:
        UserError: If it is missing, malformed, or of another schema.
    """
    path = Path(path)
    file = path if path.is_file() else path / "results.json"
    if not file.exists():
        reason = "it has no results.json" if path.exists() else "no such folder"
        raise UserError(f"{path}: not a finished evaluation ({reason})")
    try:
        return Results.model_validate(read_json(file))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({why(error)}); run the evaluation again") from None


def read_json(file: Path) -> Any:
    """Read a file of JSON: not too deep, numbers finite, text UTF-8.

    Raises:
        ValueError: If it is something else.
        OSError: If it cannot be read.
    """
    content = from_json(file.read_bytes(), allow_inf_nan=False)
    json.dumps(content, allow_nan=False)  # 1e999 is infinite, too
    return content


def why(error: Exception) -> str:
    """What is wrong with a file, in one line: the first field that is, and what it holds."""
    if not isinstance(error, ValidationError):
        return one_line(error)
    first = error.errors(include_url=False)[0]
    field = ".".join(map(str, first["loc"])) or "the file"
    reason = first.get("ctx", {}).get("error") or first["msg"]  # ours, or pydantic's
    held = "" if first["type"] in ("missing", "value_error") else f", is {shown(first['input'])}"
    return one_line(ValueError(f"{field}: {reason}{held}"))
