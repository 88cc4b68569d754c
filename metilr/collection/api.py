"""The documents that ``metilr serve`` answers with, typed, so that ``/openapi.json`` tells programs what to expect."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from metilr.data.exhibit import Exhibit


class MatchDocument(BaseModel):
    """The image of the collection that is nearest to the photo among those of one exhibit."""

    exhibit: str
    named: str = Field(description="The exhibit in words: by its title, artist and date where they are known.")
    about: Exhibit | None = None
    similarity: float = Field(description="Cosine similarity of the photo and the image, 1 for the same picture.")
    inliers: int | None = Field(None, description="Local features that lie alike in both, where that is checked.")
    path: str
    picture: str | None = Field(description="Address of a small picture here; null if the image is gone.")


class AnswerDocument(BaseModel):
    """Which exhibit a photo shows."""

    name: str | None = Field(None, description="The photo's file name, where several were sent.")
    headline: str
    detail: str
    decision: Literal["exhibit", "not in the collection", "undecided"]
    exhibit: str
    about: Exhibit | None = None
    log_confidence: float
    confidence: float | None = Field(None, description="Where photographs with known answers have shown its worth.")
    similarity: float
    above_background: float | None = None
    matches: list[MatchDocument]
    reduced: bool = Field(description="Whether the photo was made smaller first, to the collection's size.")
    regions: str | None = Field(None, description="What photo and exhibit have in common, as a data: URI of a JPEG.")
    threshold: dict[str, Any]
    collection: dict[str, Any]


class ErrorDocument(BaseModel):
    """Why there is no answer."""

    name: str | None = None
    error: str


class AnswersDocument(BaseModel):
    """Answers to several photos, in their order."""

    photos: list[AnswerDocument | ErrorDocument]


class ExhibitDocument(BaseModel):
    """An exhibit of the collection."""

    exhibit: str
    about: Exhibit
    images: list[str] = Field(description="Addresses of small pictures here.")


class HealthDocument(BaseModel):
    """That the server answers, and from what."""

    status: Literal["ok"] = "ok"
    version: str
    collection: dict[str, Any]
    waiting: int = Field(description="Photos and pictures that wait for their turn.")
