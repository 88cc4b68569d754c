"""A museum's own images, made ready to answer photos: what photos are asked with, and when an answer is sure enough."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from metilr.data.decode import MAX_PHOTO_MEGAPIXELS, pixels_of
from metilr.errors import UserError, amount
from metilr.evaluation.read_run import Run
from metilr.evaluation.results import FEW_ACCEPTED, MIN_PRECISION, read_results
from metilr.extraction.options import Accelerator
from metilr.metrics.open_set import decision_point
from metilr.models import is_on_hub
from metilr.retrieval.milvus import check_uri

if TYPE_CHECKING:
    from metilr.collection.collection import Answer, Collection, Match

Decision = Literal["exhibit", "not in the collection", "undecided"]


def index_file(path: Path) -> Path:
    """The ``index.json`` of an index's folder; UserError if there is none."""
    file = Path(path) / "index.json"
    if not file.exists():
        reason = "it has no index.json" if Path(path).exists() else "no such folder"
        raise UserError(f"{path}: not an index ({reason}); make one with metilr index")
    return file


@dataclass(frozen=True)
class PhotoOptions:
    """What photos are compared with, and what is said of them.

    Attributes:
        run: Folder that metilr evaluate wrote: its database, its model, its k and tau, and its val for the threshold.
        store: Folder that metilr index wrote, in place of a run.
        ckpt: The checkpoint that made the run or the index, if it was moved, here or to the Hub. No other is taken.
        min_precision: An exhibit is named where at least this share of such answers was right on val of the run.
        threshold: An exhibit is named from this log-confidence on, in place of one chosen on val.
        max_megapixels: A photo of more is not decoded.
        accelerator: Where the model runs; auto takes a GPU if there is one.
        milvus: Search in this Milvus server, such as http://localhost:19530, to which metilr index wrote the store;
            without it in memory, exactly.
    """

    run: Path | None = None
    store: Path | None = None
    ckpt: str | Path | None = None
    min_precision: float = MIN_PRECISION
    threshold: float | None = None
    max_megapixels: float = MAX_PHOTO_MEGAPIXELS
    accelerator: Accelerator = "auto"
    milvus: str | None = None

    def __post_init__(self) -> None:
        if (self.run is None) == (self.store is None):
            raise UserError("give either run (a folder of metilr evaluate) or store (one of metilr index)")
        if self.min_precision != MIN_PRECISION and (self.threshold is not None or self.run is None):
            without = "a threshold; give one" if self.threshold is not None else "an index, which has no val queries"
            raise UserError(f"{self.min_precision}: has no effect with {without}", "min_precision")
        if not 0 < self.min_precision <= 1:
            raise UserError(f"{self.min_precision}: choose a share above 0, at most 1", "min_precision")
        if self.threshold is not None and not -math.inf < self.threshold <= 0:  # NaN neither
            what = "is a log-confidence, at most 0 and finite (log 0.5 is -0.69)"
            raise UserError(f"{self.threshold}: {what}", "threshold")
        pixels_of(self.max_megapixels)
        if self.run is not None and not (Path(self.run) / "results.json").exists():
            read_results(self.run)  # which says why it cannot
        if self.store is not None:
            index_file(self.store)
        if self.milvus is not None:
            if self.store is None:
                raise UserError(f"{self.milvus}: has the rows of an index; give its store", "milvus")
            check_uri(self.milvus)
        if self.ckpt is not None and not is_on_hub(self.ckpt) and not Path(self.ckpt).is_file():
            raise UserError(f"{self.ckpt}: no such file", "ckpt")

    @property
    def max_pixels(self) -> int:
        """Most pixels of a photo."""
        return pixels_of(self.max_megapixels)


def in_percent(log_confidence: float) -> str:
    """A confidence for people to read: never as certain."""
    confidence = math.exp(log_confidence)
    return "> 99.9%" if confidence > 0.999 else f"{confidence:.1%}"


@dataclass(frozen=True)
class Threshold:
    """Least log-confidence to name an exhibit: None where there is none, and then nothing is decided."""

    log_confidence: float | None
    origin: str  # where it comes from, in words, or why there is none
    figures: dict[str, Any] | None = None  # what it gives on the val queries that it was chosen on

    @property
    def needed(self) -> str:
        """The confidence that is needed, in words; only where there is a threshold."""
        assert self.log_confidence is not None
        return f"confidence {in_percent(self.log_confidence)}"

    def decide(self, log_confidence: float) -> Decision:
        """Say what an answer of such log-confidence comes to."""
        if self.log_confidence is None:
            return "undecided"
        return "exhibit" if log_confidence >= self.log_confidence else "not in the collection"

    def as_json(self) -> dict[str, Any]:
        """What documents say about it."""
        return {"log_confidence": self.log_confidence, "origin": self.origin, "on_val": self.figures}


def choose_threshold(run: Run | None, options: PhotoOptions) -> Threshold:
    """Take the log-confidence that was given, or the lowest one that is precise enough on val; an index has no val."""
    min_precision = options.min_precision
    if options.threshold is not None:
        return Threshold(options.threshold, "given by hand")
    if run is None:
        return Threshold(None, "an index has no val queries to choose a threshold on; give one, or use an evaluation")
    val = run.answers["val"]
    case = val.log_confidence, val.predicted_ids, val.exhibit_ids
    is_calibrated = run.results.confidence is not None and run.results.confidence.is_used
    point = decision_point(*case, min_precision, is_calibrated)
    if point is None:
        return Threshold(None, f"no threshold reaches a precision of {min_precision:g} on val; lower it, or give one")
    figures = {**point._asdict(), "min_precision": min_precision, "n_queries": len(val.paths)}
    del figures["threshold"]
    lowest = f"the lowest with a precision of at least {min_precision:g}"
    how = "the probability to be right, fitted" if is_calibrated else lowest
    shaky = ", so few that it may be far off" if point.n_accepted < FEW_ACCEPTED else ""
    accepted = f"{amount(point.n_accepted, 'accepted answer')}{shaky}"
    right = f"right are {round(point.precision * point.n_accepted):,} of {accepted}, recall {point.recall:.3f}"
    return Threshold(point.threshold, f"{how} on val: {right}, {amount(len(val.paths), 'photo')}", figures)


def named(answer: "Answer | Match") -> str:
    """An exhibit in words: by title, artist and date, or else by its name."""
    return answer.about.caption or f"exhibit {answer.exhibit}"


def _about(answer: "Answer | Match") -> dict[str, Any]:
    about = answer.about.model_dump(exclude_defaults=True)
    return {"about": about} if about else {}


@dataclass(frozen=True)
class Identified:
    """One photo's answer with what it comes to, or the ``error`` why there is none."""

    name: str
    answer: "Answer | None" = None
    decision: Decision | None = None
    error: str | None = None
    reduced: bool = False  # it was larger than what was described of the collection, and made smaller
    picture: bytes | None = None  # a small JPEG, where pictures were asked for
    has_val: bool = False  # whether its threshold was chosen on val

    @property
    def headline(self) -> str:
        """The decision in words, or why there is none."""
        if self.answer is None or self.decision == "not in the collection":
            return self.error or str(self.decision)
        return f"{'' if self.decision == 'exhibit' else 'undecided, most likely '}{named(self.answer)}"

    @property
    def detail(self) -> str:
        """How alike the nearest image is, and, where val has shown what a confidence is worth, how sure the answer."""
        if self.answer is None:
            return ""
        shown = f"similarity {self.answer.similarity:.3f}"
        if self.answer.above_background is not None:
            shown += f", {self.answer.above_background:.3f} above the background"
        if self.has_val:
            shown += f", confidence {in_percent(self.answer.log_confidence)}"
        return shown if self.decision != "not in the collection" else f"nearest: {named(self.answer)}, {shown}"

    def as_json(self, collection: "Collection") -> dict[str, Any]:
        """The answer as JSON types, or why there is none."""
        answer = self.answer
        if answer is None:
            return {"error": self.error}
        matches = []
        for match in answer.matches:
            inliers = {} if match.inliers is None else {"inliers": match.inliers}
            path = collection.path(match.row)
            said = {"exhibit": match.exhibit, "similarity": match.similarity, **inliers, "path": path}
            matches.append({**said, **_about(match)})
        return {
            "decision": self.decision, "exhibit": answer.exhibit, **_about(answer),
            "log_confidence": answer.log_confidence,
            **({"confidence": math.exp(answer.log_confidence)} if self.has_val else {}),
            "similarity": answer.similarity,
            **({} if answer.above_background is None else {"above_background": answer.above_background}),
            "matches": matches, "reduced": self.reduced,
        }  # fmt: skip


def collection_document(collection: "Collection") -> dict[str, Any]:
    """A collection as JSON types."""
    return {
        "name": collection.name,
        "images": len(collection.images),
        "exhibits": len(collection.exhibits),
        "k": collection.k,
        "tau": collection.tau,
        **({} if collection.search is None else {"search": collection.search}),
    }
