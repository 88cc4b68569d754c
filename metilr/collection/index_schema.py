"""What ``index.json`` says of an index, written and read by one model."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal

import pydantic

from metilr.collection import index_file
from metilr.collection.labels import Labels
from metilr.data.ground_truth import is_place_below
from metilr.data.pixels import ImageSize
from metilr.data.tables import as_csv
from metilr.errors import UserError
from metilr.evaluation.options import DELETED, MethodOptions, elements_of, method_of_elements
from metilr.evaluation.results import Count, Part, Positive, Text, Vote, read_json, why
from metilr.extraction.options import ExtractionOptions, Precision
from metilr.extraction.store import DescriptorStore
from metilr.files import replaced_file, write_atomically
from metilr.models import Engine, ModelOptions, PatchRounding, PoolingName
from metilr.sources.catalogue import Catalogue

FAILED, APPROXIMATE, MILVUS = "failed.csv", "approximate", "milvus"  # in an index


class Image(Part):
    """Which exhibit an image shows. index.json may be somebody else's."""

    path: Text
    exhibit: str = pydantic.Field(min_length=1)
    sha256: str = ""  # of its content; an index of before does not say it

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
    sha256: list[str] = pydantic.Field(default_factory=list)
    store: Text = pydantic.Field(default="background", pattern=r"^background(-[0-9a-f]{12})?$")

    @classmethod
    def of(cls, strangers: Catalogue, store: str) -> "Background":
        """What is said of photos that a store describes."""
        return cls(folder=str(strangers.folder), paths=[*strangers.paths], sha256=[*strangers.sha256], store=store)


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
    folder: Text  # of images that were downloaded within the index, and then relative to it
    name: str = ""  # of the collection, for people
    labels: Text = pydantic.Field(default="exhibits.jsonl", pattern=r"^exhibits(-[0-9a-f]{12})?\.jsonl$")  # see there
    store: Text = pydantic.Field(default="store", pattern=r"^store(-[0-9a-f]{12})?$")  # within the index
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
            return index.model_copy(update={"folder": str(Path(path).absolute() / index.folder)})
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: cannot be read ({why(error)}); delete {path} and make the index again") from None

    def save(self, path: Path, catalogue: Catalogue) -> None:
        """Write ``index.json`` into a folder, and before it what is said of the exhibits and what is missing."""
        with replaced_file(path / self.labels) as stream:
            stream.write(Labels.content(catalogue))
        write_failed(path, catalogue)
        write_atomically(path / "index.json", json.dumps(self.model_dump(by_alias=True), indent=1) + "\n")
        for other in path.glob("exhibits*.jsonl"):
            if other.name != self.labels:
                other.unlink()

    @property
    def catalogue(self) -> Catalogue:
        """Which images show which exhibit."""
        paths, exhibits, digests = zip(*((i.path, i.exhibit, i.sha256) for i in self.images), strict=True)
        return Catalogue(Path(self.folder), paths, exhibits, sha256=digests)

    @property
    def strangers(self) -> Catalogue | None:
        """Photos that show no exhibit, if there are some."""
        if self.background is None:
            return None
        paths, digests = tuple(self.background.paths), tuple(self.background.sha256)
        return Catalogue(Path(self.background.folder), paths, ("",) * len(paths), sha256=digests)

    @property
    def model_options(self) -> ModelOptions:
        """What described the images."""
        return recorded_model({**self.model.model_dump(), "seed": self.elements.seed})

    @property
    def method(self) -> MethodOptions:
        """How photos are compared with the images, which are whitened already; refused if metilr no longer can."""
        known = {"visits", "database_views", "database_rows", "query_crops", *DELETED}
        return method_of_elements({name: part for name, part in self.elements.model_dump().items() if name in known})


def write_failed(path: Path, catalogue: Catalogue) -> None:
    """List, in an index, which addresses gave nothing, and why; without any there is no list."""
    (path / FAILED).unlink(missing_ok=True)
    if catalogue.failed:
        write_atomically(path / FAILED, as_csv([("address", "reason"), *catalogue.failed.items()]))


def recorded_model(recorded: Mapping[str, Any], ckpt: str | Path | None = None) -> ModelOptions:
    """The model of recorded options, as far as they are there; ``ckpt`` in place of a recorded checkpoint."""
    ckpt = recorded["ckpt"] if ckpt is None else ckpt
    if ckpt is not None:  # it carries the rest
        return ModelOptions(ckpt, scales=recorded["scales"], seed=recorded["seed"])
    names = [field.name for field in fields(ModelOptions) if field.name in recorded]
    return ModelOptions(**{name: recorded[name] for name in names})


def describe_index(
    output: Path, catalogue: Catalogue, model: ModelOptions, extraction: ExtractionOptions, method: MethodOptions,
    whitened: bool, options: Mapping[str, Any], strangers: Background | None, store: DescriptorStore,
) -> Index:  # fmt: skip
    """What ``index.json`` in ``output`` is to say; ``options`` are the command's, plain."""
    from metilr.provenance import library_versions

    described_by = {**asdict(model), "precision": str(extraction.precision), "engine": extraction.engine}
    described_by["ckpt"] = None if model.ckpt is None else str(model.ckpt)
    described_by["scales"] = None if model.scales is None else list(model.scales)
    is_inside = catalogue.folder.is_relative_to(output.absolute())  # so that an index may move with its images
    images = zip(catalogue.paths, catalogue.exhibits, catalogue.sha256, strict=True)
    return Index(
        schema="metilr.index/2",
        folder=str(catalogue.folder.relative_to(output.absolute()) if is_inside else catalogue.folder),
        name=catalogue.name or catalogue.folder.name,
        labels=f"exhibits-{hashlib.sha256(Labels.content(catalogue)).hexdigest()[:12]}.jsonl",
        store=store.path.name,
        images=[Image(path=path, exhibit=name, sha256=digest) for path, name, digest in images],
        model=Model(**described_by),
        image_size=extraction.resize_to,
        whitening=whitened,
        elements=Elements.model_validate({**elements_of(method), "seed": model.seed}),
        knn=Vote.model_validate({"k": method.k, "tau": method.tau}),
        background=strangers,
        versions=dict(library_versions()),
        options=dict(options),
    )
