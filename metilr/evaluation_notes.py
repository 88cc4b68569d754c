"""What the reader of an evaluation must know: notes on its figures, and images that were left out."""

from pathlib import Path

import numpy as np

from metilr.data.ground_truth import GroundTruth
from metilr.data.transforms import BadImageError, load_image
from metilr.descriptors import SPLITS
from metilr.knn import K_GRID
from metilr.recognition import Recognition
from metilr.sources import Descriptors
from metilr.whitening import DEFAULT_DIM, LearnedWhitening


def notes_of(
    opened: Descriptors,
    recognition: Recognition,
    synthetic: bool,
    whitening_dim: int | None,
    skipped_images: list[dict[str, str]],
) -> list[str]:
    """What a reader must know so as not to misread the figures."""
    notes = []
    if synthetic:
        notes.append("the demo museum is synthetic: its figures say nothing about real exhibits")
    sessions = [session for origin in opened.origins for session in origin.get("made_with", [])]
    if any(session.get("weights_from", {}).get("source") == "random" for session in sessions):
        notes.append("RANDOM WEIGHTS: the backbone was not trained, its figures mean nothing")
    made = [part for origin in opened.origins for part in (origin, *origin.get("views", []))]
    if any(len(part.get("made_with", [])) > 1 for part in made):
        notes.append("the descriptors were made in several goes with different devices or library versions")
    whitening = recognition.whitening
    if (
        whitening_dim is None
        and whitening is not None
        and not isinstance(whitening, LearnedWhitening)
        and whitening.dim == whitening.supported_dim < min(DEFAULT_DIM, opened.width)
    ):
        notes.append(
            f"whitened to {whitening.dim} dimensions instead of {DEFAULT_DIM}: "
            f"{whitening.n:,} database images support no more"
        )
    if (
        recognition.tuning is not None
        and recognition.tuning.k_grid[-1] < K_GRID[-1]
        and len(recognition.tuning.k_grid) > 1
    ):
        notes.append(f"the grid of k ends at {recognition.tuning.k_grid[-1]}: a larger k passes the database's rows")
    if skipped_images:
        counts = {split: int((~opened.made[split]).sum()) for split in SPLITS}
        parts = ", ".join(f"{n:,} of {len(opened.made[split]):,} in {split}" for split, n in counts.items() if n)
        notes.append(f"images that are missing or cannot be decoded were left out: {parts} (see skipped_images)")
    return notes


def skipped_images_of(opened: Descriptors, ground_truth: GroundTruth) -> list[dict[str, str]]:
    """Each image that is missing or cannot be decoded: its split, path and reason."""
    skipped = []
    for split, paths in ground_truth.paths.items():
        for i in np.flatnonzero(~opened.made[split]):
            path = paths[i]
            skipped.append({"split": split, "path": path, "reason": _why_bad(ground_truth.image(path))})
    return skipped


def _why_bad(file: Path) -> str:
    try:
        load_image(file)
    except BadImageError as error:
        return str(error).rpartition("; ")[0]  # without the advice to skip it
    return "could not be decoded when its descriptor was made"
