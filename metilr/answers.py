"""Answers in words and as JSON, for the terminal and for pages."""

import math
from dataclasses import dataclass
from typing import Any

from metilr.collection import Answer, Collection
from metilr.threshold import Decision


@dataclass(frozen=True)
class Identified:
    """One photo's answer, or why there is none.

    Attributes:
        name: As the user named it.
        answer: None where it could not be read.
        decision: What the answer comes to.
        error: Why it could not be read.
        reduced: Whether it was larger than what was described of the collection, and made smaller.
        picture: A small JPEG, where pictures were asked for.
    """

    name: str
    answer: Answer | None = None
    decision: Decision | None = None
    error: str | None = None
    reduced: bool = False
    picture: bytes | None = None

    @property
    def headline(self) -> str:
        """The decision in words."""
        if self.answer is None or self.decision is None:
            return self.error or ""
        return headline(self.decision, self.answer)

    @property
    def detail(self) -> str:
        """How sure the answer is."""
        return "" if self.answer is None or self.decision is None else detail(self.decision, self.answer)


def headline(decision: Decision, answer: Answer) -> str:
    """A decision in words."""
    if decision == "exhibit":
        return f"exhibit {answer.exhibit}"
    return decision if decision == "not in the collection" else f"undecided, most likely exhibit {answer.exhibit}"


def detail(decision: Decision, answer: Answer) -> str:
    """How sure an answer is, in words."""
    confidence = f"confidence {math.exp(answer.log_confidence):.1%}"
    return f"nearest: exhibit {answer.exhibit}, {confidence}" if decision == "not in the collection" else confidence


def answer_document(collection: Collection, answer: Answer, decision: Decision) -> dict[str, Any]:
    """An answer as JSON types."""
    return {
        "decision": decision,
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
    }


def collection_document(collection: Collection) -> dict[str, Any]:
    """A collection as JSON types."""
    return {
        "name": collection.name,
        "images": len(collection.images),
        "exhibits": len(collection.exhibits),
        "k": collection.k,
        "tau": collection.tau,
        **({} if collection.search is None else {"search": collection.search}),
    }
