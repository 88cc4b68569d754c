"""Figures that others have published, each with the split that it was measured on.

The report's Tables 1 and 2 are titled "test", but every ACC in them is a multiple of 1/129: they were measured on
val, and stand here as val.

Sources: *Augmenting Backbone Approaches to Instance-level Recognition for Artworks* ("the report"), Tables 1 (full)
and 2 (mini); Ypsilantis et al., The Met Dataset, NeurIPS 2021 Datasets and Benchmarks ("Met paper"); Oquab et al.,
arXiv:2304.07193 ("DINOv2 paper"); Siméoni et al., arXiv:2508.10104 ("DINOv3 paper"); public logs of a rerun.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from metilr.data.pixels import ImageSize
from metilr.evaluation.results import Model, Results
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
    gap_minus: float | None
    acc: float | None
    pooling: str = "gem"
    image_size: ImageSize | None = None  # of large frozen networks None: not stated


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
        gap, gap_minus, acc = (float(percent) / 100 for percent in percents)
        yield Published(backbone, database, "val", f"report, Table {table}", int(k), float(tau), gap, gap_minus, acc)
    if cells[10:]:
        gap, gap_minus, acc = (float(percent) / 100 for percent in cells[10:])
        yield Published(backbone, "full", "test", "Met paper", None, None, gap, gap_minus, acc)


# Of large frozen networks of timm on test, full database: output, longest side or square, k, τ, and in percent GAP,
# GAP⁻ and ACC, where the source states them. Which output the DINOv3 paper takes of networks without a class token is
# not known here; the row stands beside that of their own attention pooling.
_FROZEN: Sequence[tuple[str, str, str, ImageSize | None, int | None, float | None, Sequence[float]]] = (
    ("DINOv2 paper, Table 9", "vit_small_patch14_dinov2.lvd142m", "cls", None, None, None, (29.4, 54.3, 57.7)),
    ("DINOv2 paper, Table 9", "vit_base_patch14_dinov2.lvd142m", "cls", None, None, None, (36.7, 63.5, 66.1)),
    ("DINOv2 paper, Table 9", "vit_large_patch14_dinov2.lvd142m", "cls", None, None, None, (40.0, 68.9, 71.6)),
    ("DINOv2 paper, Table 9", "vit_giant_patch14_dinov2.lvd142m", "cls", None, None, None, (36.8, 73.6, 76.5)),
    ("DINOv3 paper, Table 9", "vit_giant_patch14_dinov2.lvd142m", "cls", None, None, None, (44.6,)),
    ("DINOv3 paper, Table 9", "vit_7b_patch16_dinov3.lvd1689m", "cls", None, None, None, (55.4,)),
    ("DINOv3 paper, Table 9", "vit_giantopt_patch16_siglip_384.v2_webli", "attention", None, None, None, (13.9,)),
    ("DINOv3 paper, Table 9", "vit_pe_core_gigantic_patch14_448.fb", "attention", None, None, None, (10.6,)),
    ("public logs", "vit_large_patch16_dinov3.lvd1689m", "cls", 512, None, None, (48.16, 72.14, 77.07)),
    ("public logs", "vit_large_patch16_dinov3.lvd1689m", "cls", (512, 512), None, None, (51.34, 72.31, 76.57)),
    ("public logs", "vit_7b_patch16_dinov3.lvd1689m", "cls", None, 5, 20.0, (52.11, 75.46, 81.95)),
)
NARROW = {"timm/vit_small_patch14_dinov2.lvd142m": 384}  # width of networks with less than the whitening's 512


def _frozen() -> Iterator[Published]:
    for source, name, pooling, size, k, tau, percents in _FROZEN:
        gap, *others = (percent / 100 for percent in percents)
        gap_minus, acc = others or (None, None)
        yield Published(f"timm/{name}", "full", "test", source, k, tau, gap, gap_minus, acc, pooling, size)


PUBLISHED = (*(row for line in _ROWS.strip().splitlines() for row in _published(line)), *_frozen())


def published(results: Results) -> tuple[Published, ...]:
    """Return the published figures of what a run measured; none unless it is that very row.

    The row is known if the data has the Met's published counts, the backbone has the official weights, and the rest
    is as published: GeM with p = 3 on the last map, images at their own size, three scales; of large frozen networks
    class token or attention pooling, the size if the source states one, one scale. For all: no projector, whitening
    learned on the database, to 512 or the network's width if that is less, k and τ tuned on val or as published, no
    image left out, no element beyond the recipe.
    """
    data, model, knn, elements = results.data, results.model, results.knn, results.elements
    whitening, tuned = results.whitening or {}, {} if knn.grid is None or knn.tuned_on is None else knn.grid
    is_tuned = min(len(tuned.get(name, ())) for name in ("k", "tau")) > 1
    is_plain = (
        not data.synthetic
        and data.counts == {**MET_COUNTS[data.database], **MET_QUERIES}
        and bool(model.made_with)
        and all(_is_official(session.weights_from, model.backbone) for session in model.made_with)
        and (model.stage, model.projector) == (None, None)
        and whitening.get("source") == "learned on the database"
        and whitening.get("shrinkage") == 1.0
        and whitening.get("dim") == NARROW.get(model.backbone or "", 512)
        and not results.skipped_images
        and not results.geometric_check
        and not (results.confidence and results.confidence.is_used)
        and not (elements and (elements.visits or elements.query_crops or elements.dba or elements.hubness))
        and not (elements and elements.database_rows != "images")
    )
    rows = [row for row in PUBLISHED if (row.backbone, row.database) == (model.backbone, data.database) and is_plain]
    described = [row for row in rows if _is_described_so(model, row)]
    return tuple(row for row in described if is_tuned or (row.k, row.tau) == (knn.k, knn.tau))


def _is_described_so(model: Model, row: Published) -> bool:
    if model.pooling is None or model.pooling.kind != row.pooling:
        return False
    if row.pooling == "gem":
        return (model.pooling.p, model.image_size, tuple(model.scales)) == (3.0, None, SCALES)
    return tuple(model.scales) == (1.0,) and row.image_size in (None, model.image_size)


def _is_official(weights: Mapping[str, Any], backbone: str | None) -> bool:
    """Whether a session that made descriptors had the publisher's file: no training, nothing random."""
    spec = BACKBONES.get(backbone or "")
    if spec is None:  # of timm, which names the place by the model's name
        return weights.get("source") == f"hf-hub:{backbone}"
    return weights.get("source") == spec.url or str(weights.get("file_sha256")).startswith(spec.sha256 or "not stated")
