"""Figures that others have published, each with the split that it was measured on.

The report's Tables 1 and 2 are titled "test", but every ACC in them is a multiple of 1/129: they were measured on
val, and stand here as val.

Sources: *Augmenting Backbone Approaches to Instance-level Recognition for Artworks* ("the report"), Tables 1 (full)
and 2 (mini); Ypsilantis et al., The Met Dataset, NeurIPS 2021 Datasets and Benchmarks ("Met paper").
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from metilr.evaluation.results import Results
from metilr.models import SCALES
from metilr.models.zoo import BACKBONES

# What must agree for a database to be the published one, and the query splits.
MET_COUNTS = {
    "full": {"database_images": 397_121, "exhibits": 224_408},
    "mini": {"database_images": 38_307, "exhibits": 33_501},
}
MET_QUERIES = {"val_queries": 2_165, "val_met": 129, "test_queries": 19_319, "test_met": 1_003}


@dataclass(frozen=True)
class Published:
    """One published row; figures in [0, 1]."""

    backbone: str
    database: str
    split: str  # what the figures were measured on, whatever the table's title says
    source: str
    k: int | None  # None where the source does not say, as tau
    tau: float | None
    gap: float
    gap_minus: float
    acc: float


# As published, in percent: of val, on the full and on the mini database, k, τ, GAP, GAP⁻ and ACC; then, where somebody
# has measured it, of test on the full database GAP, GAP⁻ and ACC.
_ROWS = """
r18_in             3  50 27.85 48.01 52.71   2 100 39.10 59.75 62.01  15.9 37.5 42.3
r50_in             7  50 31.58 51.77 55.81   3  50 40.98 62.50 64.34  22.2 41.8 46.4
r50_swav          15  50 41.73 56.49 58.91   5  50 51.08 66.29 68.21
r50_sin            5  50 26.17 44.89 48.06   3  50 40.81 57.75 60.46
r18_swsl           5  50 35.92 56.15 59.68   3  50 47.84 65.79 68.21  24.7 47.0 50.9
r50_swsl           5  50 49.09 69.00 71.31  15  50 60.00 74.95 75.96  30.4 52.9 56.3
rx50_32x4d_swsl    5  50 26.07 50.20 53.48   3  50 40.22 60.15 62.01
rx101_32x4d_swsl   5  50 25.38 49.72 52.71   3  50 37.50 62.47 64.34
rx101_32x8d_swsl  50  50 20.13 39.19 44.18   3  50 32.87 55.95 60.46
rx101_32x16d_swsl  7 100 17.85 42.49 47.28   3  50 25.63 56.50 59.68
"""


def _published(line: str) -> Iterator[Published]:
    backbone, *cells = line.split()
    for database, table, (k, tau, *percents) in (("full", 1, cells[:5]), ("mini", 2, cells[5:10])):
        figures = (float(percent) / 100 for percent in percents)
        yield Published(backbone, database, "val", f"report, Table {table}", int(k), float(tau), *figures)
    if cells[10:]:
        figures = (float(percent) / 100 for percent in cells[10:])
        yield Published(backbone, "full", "test", "Met paper", None, None, *figures)


PUBLISHED = tuple(row for line in _ROWS.strip().splitlines() for row in _published(line))


def published(results: Results) -> tuple[Published, ...]:
    """Return the published figures of what a run measured; none unless it is that very row.

    The row is known if the data has the Met's published counts, the backbone has the official weights, and the rest
    is as published: images at their own size, GeM with p = 3 on the last map, no projector, the three scales,
    whitening to 512 learned on the database, k and τ tuned on val, no image left out, no element beyond the recipe.
    """
    data, model, knn, elements = results.data, results.model, results.knn, results.elements
    pooling, whitening = model.pooling, results.whitening or {}
    tuned = {} if knn.grid is None or knn.tuned_on is None else knn.grid
    is_that_row = (
        not data.synthetic
        and data.counts == {**MET_COUNTS[data.database], **MET_QUERIES}
        and bool(model.made_with)
        and all(_is_official(session.weights_from, model.backbone) for session in model.made_with)
        and (pooling and (pooling.kind, pooling.p)) == ("gem", 3.0)
        and (model.stage, model.projector, model.image_size, tuple(model.scales)) == (None, None, None, SCALES)
        and whitening.get("source") == "learned on the database"
        and (whitening.get("dim"), whitening.get("shrinkage")) == (512, 1.0)
        and min(len(tuned.get(name, ())) for name in ("k", "tau")) > 1
        and not results.skipped_images
        and not results.geometric_check
        and not (results.confidence and results.confidence.is_used)
        and not (elements and (elements.visits or elements.query_crops or elements.dba or elements.hubness))
    )
    rows = PUBLISHED if is_that_row else ()
    return tuple(row for row in rows if (row.backbone, row.database) == (model.backbone, data.database))


def _is_official(weights: Mapping[str, Any], backbone: str | None) -> bool:
    """Whether a session that made descriptors had the publisher's file: no training, nothing random."""
    spec = BACKBONES.get(backbone or "")
    digest = str(weights.get("file_sha256"))
    return spec is not None and (weights.get("source") == spec.url or digest.startswith(spec.sha256 or "not stated"))
