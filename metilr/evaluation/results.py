"""A model of ``results.json``, by which an evaluation writes it and others read it."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from metilr.data.ground_truth import DatabaseName
from metilr.data.pixels import ImageSize
from metilr.errors import UserError, one_line, shown
from metilr.evaluation.options import MAX_TURNS
from metilr.extraction.options import Precision
from metilr.files import parse_json, regular, write_atomically
from metilr.models import Engine, PoolingName

SCHEMA_VERSION = 2  # 1 does not hold the options: it can be compared, but not repeated
SIZES = ("database_images", "exhibits", "val_queries", "val_met", "test_queries", "test_met")
FIGURES = ("gap", "gap_minus", "acc")
UNITS = ("photographers", "classes", "queries")  # that intervals are drawn over; not every museum has all
LEVEL = 0.95  # of the intervals
MIN_PRECISION = 0.9  # of the accepted answers on val, where nothing else is asked for
FEW_ACCEPTED = 20  # answers: one more or less that is wrong moves their precision by 5 points
PREDICTION_COLUMNS = (
    "path", "exhibit_id", "predicted_id", "log_confidence", "confidence", "similarity", "nearest_path", "correct",
)  # fmt: skip

Text = Annotated[str, Field(pattern=r"^[^\x00]*$")]  # what a file's name can hold
Count = Annotated[int, Field(ge=0, lt=2**63)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Moderate = Annotated[float, Field(gt=-1e100, lt=1e100)]  # so that no product of three overflows
SizeName = Annotated[str, Field(pattern=f"^({'|'.join(SIZES)})$")]
FigureName = Annotated[str, Field(pattern=f"^({'|'.join(FIGURES)})$")]
GateName = Annotated[str, Field(pattern="^(weight|enough)$")]
Ends = Annotated[list[Share], Field(min_length=2, max_length=2)]  # of an interval


class Part(BaseModel):
    """A part of a file that may be somebody else's: checked where it is read; what is not listed is kept."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, frozen=True)

    def recorded(self) -> dict[str, Any]:
        """What the file says, without defaults."""
        return self.model_dump(exclude_unset=True)


class Data(Part):
    """What was measured on."""

    root: Text
    database: DatabaseName
    synthetic: bool
    counts: Annotated[dict[SizeName, Count], Field(min_length=6)]
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
    views: list[dict[str, Any]] = []
    concatenated: list[dict[str, Any]] = []


class Elements(Part, extra="forbid"):
    """What goes beyond the published recipe; the last three are of metilrs that had more of it."""

    visits: Count
    database_views: Literal["none", "rows", "mean"]
    database_rows: Literal["images", "prototypes", "classifier"] = "images"  # a metilr of before had no others
    query_crops: list[Annotated[float, Field(gt=0, lt=1)]]
    crop_similarity: Literal["best", "mean"] = "best"
    dba: Count = 0
    hubness: dict[str, Any] | None = None


class Check(Part):
    """The geometric check."""

    candidates: Annotated[Count, Field(ge=1)]
    reorder: bool
    turns: Annotated[Count, Field(ge=1, le=MAX_TURNS)] = 1  # of the queries; a metilr of before had none
    boost: Annotated[float, Field(ge=0)]
    gate: Annotated[dict[GateName, Annotated[float, Field(ge=0)]], Field(min_length=2)]
    features: dict[str, Any]


class Calibration(Part, extra="forbid"):
    """The fitted model of a calibrated confidence, see ``metilr.retrieval.confidence``."""

    features: Annotated[list[Text], Field(min_length=1)]
    mean: list[Moderate]
    scale: list[Annotated[float, Field(gt=1e-100)]]
    coefficients: list[Moderate]
    intercept: Moderate
    strength: Positive

    @model_validator(mode="after")
    def _is_complete(self) -> "Calibration":
        if {len(self.mean), len(self.scale), len(self.coefficients)} != {len(self.features)}:
            raise ValueError("features, mean, scale and coefficients differ in length")
        return self


class Confidence(Part):
    """A calibrated confidence: what cross-validation on val saw, and what was fitted, if anything could be."""

    is_used: bool
    plain_gap: Share | None  # on held-out parts of val, of the classifier's confidence; None if none could be fitted
    calibrated_gap: Share | None
    n_background: Count = 0
    calibration: Calibration | None = None
    calibration_error: dict[Text, Share] = {}  # of val and test, expected, in ten bins

    @model_validator(mode="after")
    def _is_complete(self) -> "Confidence":
        if self.is_used != (self.calibration is not None):
            raise ValueError("is_used and calibration contradict each other")
        return self


class Vote(Part):
    """How neighbours vote."""

    k: Annotated[Count, Field(ge=1)]
    tau: Positive


class KNN(Vote):
    """How they voted, and how that was chosen."""

    tuned_on: Literal["val"] | None = None
    grid: dict[str, list[Any]] | None  # k, tau, val_gap (len(k), len(tau))


class Figures(Part):
    """The figures of one split, in [0, 1]; intervals by unit of the resampling."""

    gap: Share
    gap_minus: Share
    acc: Share
    ranking: dict[Text, Share] = {}  # recall@k and map, over exhibits; a metilr of before did not have them
    n_queries: Count
    n_met: Count
    intervals: dict[str, Annotated[dict[FigureName, Ends], Field(min_length=3)]] = {}
    open_set: dict[str, Any] = {}


class Results(Part):
    """``results.json``; the order is the file's."""

    schema_version: Literal[1, 2]
    created: Text | None = None
    command: Text | None = None
    directory: Text = "."
    options: dict[str, Any] | None = None
    seconds: float | None = None
    rows: dict[Literal["all", "reused"], Count] = {}  # descriptors of the run, and those that were there before
    peak_memory_gb: float | None = None
    notes: list[Text] = []
    data: Data
    model: Model
    whitening: dict[str, Any] | None = None
    elements: Elements | None = None
    geometric_check: Check | None = None
    confidence: Confidence | None = None
    classifier: dict[str, Any] | None = None  # the class weights that were searched: sha256, rows
    search: dict[str, Any] = {}
    knn: KNN
    bootstrap: dict[str, Any] = {}  # resamples, level, seed
    threshold: dict[str, Any] | None = None  # the lowest log-confidence that is precise enough on val
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
        """The unit of the intervals to show: of the widest for GAP on test, as few photographers give narrow ones."""
        units = [unit for unit in UNITS if unit in self.val.intervals and unit in self.test.intervals]
        return max(units, key=lambda unit: np.ptp(self.test.intervals[unit]["gap"]), default=None)

    @property
    def accepted_from(self) -> float | None:
        """Log-confidence from which on answers are accepted, chosen on val; None if none is precise enough."""
        return None if self.threshold is None else self.threshold["log_confidence"]

    def write(self, output: Path) -> Path:
        """Write ``results.json``, the last file of a run: it says that all others are there."""
        write_atomically(output / "results.json", json.dumps(self.recorded(), indent=1, allow_nan=False) + "\n")
        return output / "results.json"


def read_results(path: Path) -> Results:
    """Read ``results.json``, the file itself or that of a run's folder."""
    path = Path(path)
    file = path if path.is_file() else path / "results.json"
    if not file.exists():
        reason = "it has no results.json" if path.exists() else "no such folder"
        raise UserError(f"{path}: not a finished evaluation ({reason})")
    with readable(file):
        return Results.model_validate(read_json(file))


@contextlib.contextmanager
def readable(file: Path) -> Iterator[None]:
    """Name the file in what is wrong with it."""
    try:
        yield
    except (OSError, ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{file}: cannot be read ({why(error)}); run the evaluation again") from None


def read_json(file: Path) -> Any:
    """Read a file of JSON, not too deep, with finite numbers and UTF-8; raises ValueError if it is something else."""
    written = regular(file).read_bytes()
    parse_json(written)  # refuses keys that are there twice, which pydantic does not
    content = from_json(written, allow_inf_nan=False)
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
