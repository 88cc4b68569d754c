"""What ``index.json`` says of an index, written and read by one model."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal

import pydantic

from metilr.collection import index_file
from metilr.data.folder import Catalogue
from metilr.data.ground_truth import is_place_below
from metilr.data.pixels import ImageSize
from metilr.errors import UserError
from metilr.evaluation.options import DELETED, MethodOptions, method_of_elements
from metilr.evaluation.results import Count, Part, Positive, Text, Vote, read_json, why
from metilr.extraction.options import ExtractionOptions, Precision
from metilr.models import Engine, ModelOptions, PatchRounding, PoolingName


class Image(Part):
    """Which exhibit an image shows. index.json may be somebody else's."""

    path: Text
    exhibit: str = pydantic.Field(min_length=1)

    @pydantic.field_validator("path")
    @classmethod
    def lies_below(cls, path: str) -> str:
        """Refuse what would be opened elsewhere."""
        if not is_place_below(path):
            raise ValueError("must name a file below the folder")
        return path


class Background(Part):
    """Photos that show no exhibit."""

    folder: Text
    paths: list[Text] = pydantic.Field(min_length=1)


class Model(Part):
    """What described the images; an index of before has fewer entries."""

    ckpt: Text | None
    backbone: str
    weights: Text | None
    pooling: PoolingName
    p: Positive
    scales: list[Positive] | None = pydantic.Field(min_length=1)
    stage: int | None = None
    patch_rounding: PatchRounding = "nearest"
    precision: Precision = "32"
    engine: Engine = "torch"


class Elements(Part):
    """How photos are compared beyond the recipe; an index of before has more entries."""

    visits: Count
    database_views: Literal["none", "rows"]
    database_rows: Literal["images", "prototypes"] = "images"
    query_crops: list[float]
    seed: Count


class Index(Part):
    """What ``index.json`` says."""

    schema_: Literal["metilr.index/2"] = pydantic.Field(alias="schema")
    folder: Text
    images: list[Image] = pydantic.Field(min_length=1)
    model: Model
    image_size: ImageSize | None
    whitening: bool
    elements: Elements
    knn: Vote
    background: Background | None = None
    versions: dict[str, Any]
    options: dict[str, Any] = pydantic.Field(default_factory=dict)  # of the command; an index of before has none

    @classmethod
    def load(cls, path: Path) -> "Index":
        """Read ``index.json`` of a folder; UserError if it holds none, or one of another schema."""
        file = index_file(path)
        try:
            index = cls.model_validate(read_json(file))
            _ = index.method, index.model_options  # what they refuse is refused here
            return index
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: cannot be read ({why(error)}); delete {path} and make the index again") from None

    @property
    def catalogue(self) -> Catalogue:
        """Which images show which exhibit."""
        images = self.images
        return Catalogue(Path(self.folder), tuple(i.path for i in images), tuple(i.exhibit for i in images))

    @property
    def strangers(self) -> Catalogue | None:
        """Photos that show no exhibit, if there are some."""
        if self.background is None:
            return None
        return Catalogue(Path(self.background.folder), tuple(self.background.paths), ("",) * len(self.background.paths))

    @property
    def model_options(self) -> ModelOptions:
        """What described the images."""
        return recorded_model({**self.model.model_dump(), "seed": self.elements.seed})

    @property
    def method(self) -> MethodOptions:
        """How photos are compared with the images, which are whitened already; refused if metilr no longer can."""
        known = {"visits", "database_views", "database_rows", "query_crops", *DELETED}
        return method_of_elements({name: part for name, part in self.elements.model_dump().items() if name in known})


def recorded_model(recorded: Mapping[str, Any], ckpt: str | Path | None = None) -> ModelOptions:
    """The model of recorded options, as far as they are there; ``ckpt`` in place of a recorded checkpoint."""
    ckpt = recorded["ckpt"] if ckpt is None else ckpt
    if ckpt is not None:  # it carries the rest
        return ModelOptions(ckpt, scales=recorded["scales"], seed=recorded["seed"])
    names = [field.name for field in fields(ModelOptions) if field.name in recorded]
    return ModelOptions(**{name: recorded[name] for name in names})


def describe_index(
    catalogue: Catalogue, model: ModelOptions, extraction: ExtractionOptions, method: MethodOptions, whitened: bool,
    options: Mapping[str, Any], strangers: Catalogue | None = None,
) -> Index:  # fmt: skip
    """What ``index.json`` is to say; ``options`` are the command's, plain."""
    from metilr.provenance import library_versions

    described_by = {**asdict(model), "precision": str(extraction.precision), "engine": extraction.engine}
    described_by["ckpt"] = None if model.ckpt is None else str(model.ckpt)
    described_by["scales"] = None if model.scales is None else list(model.scales)
    return Index(
        schema="metilr.index/2",
        folder=str(catalogue.folder),
        images=[Image(path=path, exhibit=name) for path, name in zip(catalogue.paths, catalogue.exhibits, strict=True)],
        model=Model(**described_by),
        image_size=extraction.resize_to,
        whitening=whitened,
        elements=Elements.model_validate(
            {
                "visits": method.n_visits,
                "database_views": method.database_views,
                "database_rows": method.database_rows,
                "query_crops": list(method.query_crops),
                "seed": model.seed,
            }
        ),
        knn=Vote.model_validate({"k": method.k, "tau": method.tau}),
        background=None if strangers is None else Background(folder=str(strangers.folder), paths=[*strangers.paths]),
        versions=dict(library_versions()),
        options=dict(options),
    )
