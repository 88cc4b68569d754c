"""How descriptors are compared, and what an evaluation leaves behind."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from metilr.errors import UserError, check_choices, shown
from metilr.retrieval.knn import check_tau
from metilr.retrieval.search import SearchDevice
from metilr.retrieval.whitening import PAIR_SHRINKAGE

DatabaseViews = Literal["none", "rows"]
DatabaseRows = Literal["images", "prototypes", "classifier"]
ConfidenceName = Literal["softmax", "calibrated"]
Metric = Literal["gap", "gap_minus", "acc", "recall@1", "recall@5", "recall@10", "map"]
WandbMode = Literal["auto", "online", "offline", "off"]
MAX_VISITS = 1000
MAX_TURNS = 36  # of a query, 10 degrees apart
VISITS = 6  # of each database image, where some are needed and nothing is said: two scenes
PROJECT = "metilr"  # in Weights & Biases


@dataclass(frozen=True)
class ComparisonOptions:
    """How photos are compared with images.

    Attributes:
        whitening: pca learns it on the database; learned from pairs of a database image and its simulated visits (and
            of images of one exhibit); none goes without; else a whitening.npz of another run, or a checkpoint that
            metilr pack or push wrote, here or on the Hub as of ckpt.
        whitening_dim: Dimensions after whitening; without it 512 (pca) or all (learned), or as many as the database
            supports.
        whitening_shrinkage: Of pca: 1 is whitening, 0 is plain PCA.
        pair_shrinkage: Of learned: weight of the identity in the covariance of pairs' differences, above 0, at most 1.
        visits: Simulated visitors' photographs of each database image to describe, which takes as many times as long;
            without it 6 where learned whitening or database_views need them, else none.
        database_views: rows makes the visits further rows of their exhibit.
        database_rows: What is searched: images; prototypes, one row an exhibit, the mean of its images; or classifier,
            the class weights of a checkpoint that was trained with one.
        query_crops: Search these middle parts of each query too, such as 0.8 0.65 0.5 of its height and width: zooms
            that drop wall and frame; the best counts.
        k: Number of neighbours; without it 10, with database_views rows as many for each row of an image, or as many
            as there are; 1 where database_rows has one row an exhibit.
        tau: Inverse temperature of the confidence; without it 50.
    """

    whitening: str = "pca"
    whitening_dim: int | None = None
    whitening_shrinkage: float = 1.0
    pair_shrinkage: float = PAIR_SHRINKAGE
    visits: int | None = None
    database_views: DatabaseViews = "none"
    database_rows: DatabaseRows = "images"
    query_crops: Sequence[float] = ()
    k: int | None = None
    tau: float | None = None

    @property
    def is_learned(self) -> bool:
        """Whether the whitening is learned from pairs."""
        return self.whitening == "learned"

    @property
    def n_visits(self) -> int:
        """Simulated visits of each database image."""
        needed = self.is_learned or self.database_views == "rows"
        return (VISITS if needed else 0) if self.visits is None else self.visits

    @property
    def rows_per_image(self) -> int:
        """Searched rows of each database image."""
        return 1 + self.n_visits if self.database_views == "rows" else 1

    def __post_init__(self) -> None:
        """Refuse what is out of range whatever the data, or would have no effect: recorded, it would lie."""
        check_choices(self)
        crops, rows = list(self.query_crops), self.database_views == "rows"
        are_shares = all(0 < share < 1 for share in crops) and len(set(crops)) == len(crops)
        for name, is_right, choose in (
            ("whitening_shrinkage", 0 <= self.whitening_shrinkage <= 1, "a number from 0 (PCA) to 1 (whitening)"),
            ("pair_shrinkage", 0 < self.pair_shrinkage <= 1, "a number above 0, at most 1"),
            ("visits", 0 <= self.n_visits <= MAX_VISITS, f"0 (off) to {MAX_VISITS:,}"),
            ("database_views", self.n_visits or not rows, f"none, or visits such as {VISITS}"),
            ("query_crops", are_shares, "shares between 0 and 1, each once (the whole is searched as well)"),
        ):
            if not is_right:
                raise UserError(f"{getattr(self, name)}: choose {choose}", name)
        for name, off, has_effect, needed in (
            ("whitening_dim", None, self.whitening in ("pca", "learned"), "whitening pca or learned"),
            ("whitening_shrinkage", 1, self.whitening == "pca", "whitening pca"),
            ("pair_shrinkage", PAIR_SHRINKAGE, self.is_learned, "whitening learned"),
            ("visits", 0, self.visits is None or self.is_learned or rows, "whitening learned or database_views rows"),
        ):
            if getattr(self, name) != off and not has_effect:
                raise UserError(f"has no effect without {needed}; leave it out", name)
        if self.database_rows != "images":
            searched = f"database_rows {self.database_rows}"
            if rows:
                raise UserError(f"rows: adds rows to images, not to {searched}; leave one out", "database_views")
            if self.k not in (None, 1):
                raise UserError(
                    f"{self.k}: {searched} has rows of which the nearest alone counts; choose 1, or leave it out", "k"
                )
            if self.database_rows == "classifier" and self.whitening != "none":
                reason = "class weights are compared as they were learned; choose none"
                raise UserError(f"{self.whitening}: {reason} (to train them whitened: projector_dim)", "whitening")
        if self.tau is not None:
            check_tau(self.tau)


@dataclass(frozen=True)
class MethodOptions(ComparisonOptions):
    """How descriptors are compared. The defaults are the published recipe.

    Attributes:
        k: Number of neighbours; without it chosen on val.
        tau: Inverse temperature of the confidence; without it chosen on val.
        geometric_check: Compare local features of each query with those of so many nearest exhibits, such as 50; where
            few agree about one transform, confidence falls, by how much is chosen on val; 0 is off.
        geometric_reorder: With geometric_check: let agreeing local features decide between the exhibits, as far as val
            gains by it.
        geometric_turns: With geometric_check: look at each query turned, too, in so many steps of a full circle, such
            as 8, where val gains by it: for photographs at any angle; it takes up to as many times as long.
        confidence: softmax is that of the classifier; calibrated is the probability that the answer is right, fitted on
            val, which also sees how similar a photo is to val's distractors. It is kept only where cross-validation on
            val sees it rank better.
        search_device: Where the exact search runs; without it on all GPUs if FAISS sees some and the
            accelerator is not cpu, else on the CPU.
    """

    geometric_check: int = 0
    geometric_reorder: bool = False
    geometric_turns: int = 1
    confidence: ConfidenceName = "softmax"
    search_device: SearchDevice | None = None

    def __post_init__(self) -> None:
        """Refuse the same of what an evaluation has besides."""
        super().__post_init__()
        if self.geometric_check < 0:
            raise UserError(f"{self.geometric_check}: choose 0 (off) or more", "geometric_check")
        if not 1 <= self.geometric_turns <= MAX_TURNS:
            raise UserError(f"{self.geometric_turns}: choose 1 (as it is) to {MAX_TURNS}", "geometric_turns")
        for name, off in (("geometric_reorder", False), ("geometric_turns", 1)):
            if getattr(self, name) != off and not self.geometric_check:
                raise UserError("has no effect without geometric_check, such as 20; leave it out", name)


@dataclass(frozen=True)
class ReportOptions:
    """The report.

    Attributes:
        report: Write the report page, OUTPUT/report/index.html.
        report_pictures: Queries with pictures in the report, of each split and outcome (wrong, false alarm, right,
            passed over); it lists all queries in any case.
        metrics: What the printed table shows, such as gap acc recall@1 map; recall and map are over exhibits, of the
            ranking by similarity.
        wandb: Log to Weights & Biases: auto is online if there is a key (WANDB_API_KEY or netrc), else offline.
        wandb_project: Project in Weights & Biases.
    """

    report: bool = True
    report_pictures: int = 100
    metrics: Sequence[Metric] = ("gap", "gap_minus", "acc")
    wandb: WandbMode = "auto"
    wandb_project: str = PROJECT

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        check_choices(self)
        if self.report_pictures < 0:
            raise UserError(f"{self.report_pictures}: choose 0 or more", "report_pictures")
        if not self.metrics:
            raise UserError(f"none: choose one or more of {', '.join(get_args(Metric))}", "metrics")


# Options that metilr had before, with the values that meant off.
DELETED = {"dba": (0,), "hubness": (0, None), "crop_similarity": ("best",)}


def without_deleted(options: Mapping[str, Any]) -> dict[str, Any]:
    """What was recorded, without options that metilr had before; refused if one of them was on."""
    for name in DELETED.keys() & options.keys():
        if options[name] not in DELETED[name]:
            raise UserError(f"{shown(options[name])}: metilr no longer has this; evaluate again without it", name)
    return {name: value for name, value in options.items() if name not in DELETED}


def elements_of(method: ComparisonOptions) -> dict[str, Any]:
    """What results and an index record of a method beyond the recipe, which ``method_of_elements`` reads."""
    database = {"database_views": method.database_views, "database_rows": method.database_rows}
    return {"visits": method.n_visits, **database, "query_crops": [*method.query_crops]}


def method_of_elements(elements: Mapping[str, Any]) -> MethodOptions:
    """How recorded ``elements`` compare descriptors that are whitened already."""
    kept = without_deleted(elements)
    return MethodOptions("none", **{**kept, "visits": kept["visits"] if kept.get("database_views") == "rows" else None})
