"""Whether an answer is sure enough to name an exhibit; answers in words and as JSON, for the terminal and for pages."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from metilr.data.decode import MAX_PHOTO_MEGAPIXELS
from metilr.errors import UserError
from metilr.evaluation.results import FEW_ACCEPTED, MIN_PRECISION, Run
from metilr.extraction.options import Accelerator
from metilr.metrics.open_set import threshold_for_precision

if TYPE_CHECKING:
    from metilr.collection.collection import Answer, Collection

Decision = Literal["exhibit", "not in the collection", "undecided"]


@dataclass(frozen=True)
class PhotoOptions:
    """What photos are compared with, and what is said of them.

    Attributes:
        run: Folder that metilr evaluate wrote: its database, its model, its k and tau, and its val for the threshold.
        store: Folder that metilr index wrote, in place of a run.
        ckpt: The checkpoint that made the run or the index, if it was moved. Another one is refused.
        min_precision: An exhibit is named where at least this share of such answers was right on val of the run.
        threshold: An exhibit is named from this log-confidence on, in place of one chosen on val.
        max_megapixels: A photo of more is not decoded.
        accelerator: Where the model runs; auto takes a GPU if there is one.
    """

    run: Path | None = None
    store: Path | None = None
    ckpt: Path | None = None
    min_precision: float = MIN_PRECISION
    threshold: float | None = None
    max_megapixels: float = MAX_PHOTO_MEGAPIXELS
    accelerator: Accelerator = "auto"

    def __post_init__(self) -> None:
        if (self.run is None) == (self.store is None):
            raise UserError("give either run (a folder of metilr evaluate) or store (one of metilr index)")


@dataclass(frozen=True)
class Threshold:
    """Least log-confidence to name an exhibit: None where there is none, and then nothing is decided.

    ``origin`` says in words where it comes from, or why there is none; ``figures`` what it gives on the val queries
    that it was chosen on.
    """

    log_confidence: float | None
    origin: str
    figures: dict[str, Any] | None = None

    @property
    def needed(self) -> str:
        """The confidence that is needed, in words; only where there is a threshold."""
        assert self.log_confidence is not None
        odds = -math.expm1(self.log_confidence)  # 1 - confidence: what tells confidences near 1 apart
        digits = max(1, 1 - math.floor(math.log10(odds)) - 2) if 0 < odds < 0.1 else 1
        return f"a confidence of {100 * math.exp(self.log_confidence):.{digits}f}% (log {self.log_confidence:.4g})"

    def decide(self, log_confidence: float) -> Decision:
        """Say what an answer of such log-confidence comes to."""
        if self.log_confidence is None:
            return "undecided"
        return "exhibit" if log_confidence >= self.log_confidence else "not in the collection"

    def as_json(self) -> dict[str, Any]:
        """What documents say about it."""
        return {"log_confidence": self.log_confidence, "origin": self.origin, "on_val": self.figures}


def choose_threshold(run: Run | None, threshold: float | None, min_precision: float = MIN_PRECISION) -> Threshold:
    """Take the log-confidence that was given, or the lowest one that is precise enough on val of a run.

    An index, without a ``run``, has no val; ``min_precision`` is the least share of right answers among those accepted.

    Raises:
        UserError: If a number is out of range or would have no effect.
    """
    if min_precision != MIN_PRECISION and (threshold is not None or run is None):
        why = "an index, which has no val queries; give a threshold" if threshold is None else "a threshold; give one"
        raise UserError(f"{min_precision}: has no effect with {why}", "min_precision")
    if threshold is not None:
        if not -math.inf < threshold <= 0:  # NaN neither
            what = "is a log-confidence, at most 0 and finite (log 0.5 is -0.69)"
            raise UserError(f"{threshold}: {what}", "threshold")
        return Threshold(threshold, "given by hand")
    if run is None:
        return Threshold(None, "an index has no val queries to choose a threshold on; give one, or use an evaluation")
    if not 0 < min_precision <= 1:
        raise UserError(f"{min_precision}: choose a share above 0, at most 1", "min_precision")
    val = run.answers["val"]
    point = threshold_for_precision(val.log_confidence, val.predicted_ids, val.exhibit_ids, min_precision)
    if point is None:
        return Threshold(None, f"no threshold reaches a precision of {min_precision:g} on val; lower it, or give one")
    figures = {**point._asdict(), "min_precision": min_precision, "n_queries": len(val.paths)}
    del figures["threshold"]
    n_right = round(point.precision * point.n_accepted)
    shaky = ", so few that it may be far off" if point.n_accepted < FEW_ACCEPTED else ""
    return Threshold(
        point.threshold,
        f"the lowest with a precision of at least {min_precision:g} on val: {n_right:,} of {point.n_accepted:,} "
        f"accepted answers were right{shaky}, recall {point.recall:.3f}, {len(val.paths):,} queries",
        figures,
    )


@dataclass(frozen=True)
class Identified:
    """One photo's answer with what it comes to, or the ``error`` why there is none.

    ``reduced`` says whether it was larger than what was described of the collection, and made smaller; ``picture`` is a
    small JPEG, where pictures were asked for.
    """

    name: str
    answer: "Answer | None" = None
    decision: Decision | None = None
    error: str | None = None
    reduced: bool = False
    picture: bytes | None = None

    @property
    def headline(self) -> str:
        """The decision in words, or why there is none."""
        if self.answer is None:
            return self.error or ""
        exhibit = f"exhibit {self.answer.exhibit}"
        return {"exhibit": exhibit, "undecided": f"undecided, most likely {exhibit}"}.get(
            self.decision or "", str(self.decision)
        )

    @property
    def detail(self) -> str:
        """How sure the answer is."""
        if self.answer is None:
            return ""
        confidence = f"confidence {math.exp(self.answer.log_confidence):.1%}"
        named = self.decision != "not in the collection"
        return confidence if named else f"nearest: exhibit {self.answer.exhibit}, {confidence}"

    def as_json(self, collection: "Collection") -> dict[str, Any]:
        """The answer as JSON types, or why there is none."""
        answer = self.answer
        if answer is None:
            return {"error": self.error}
        return {
            "decision": self.decision,
            "exhibit": answer.exhibit,
            "log_confidence": answer.log_confidence,
            "confidence": math.exp(answer.log_confidence),
            "similarity": answer.similarity,
            "matches": [
                {
                    "exhibit": match.exhibit,
                    "similarity": match.similarity,
                    **({} if match.inliers is None else {"inliers": match.inliers}),
                    "path": collection.path(match.row),
                }
                for match in answer.matches
            ],
            "reduced": self.reduced,
        }


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
