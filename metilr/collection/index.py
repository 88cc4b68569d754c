"""``metilr index``: a museum's own images, made ready for ``metilr identify`` and ``metilr serve``."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pydantic
from rich.markup import escape

from metilr.cli import flat
from metilr.collection import index_file
from metilr.data.decode import file_size, limit_images
from metilr.data.folder import Catalogue, read_catalogue
from metilr.data.ground_truth import is_place_below
from metilr.distributed import launched_as_first, quieten_lightning
from metilr.errors import UserError, amount
from metilr.evaluation.options import DELETED, ComparisonOptions, MethodOptions, method_of_elements
from metilr.evaluation.results import Count, ImageSize, Part, Positive, Text, Vote, read_json, why
from metilr.evaluation.runs import plain_options, refuse_other_options, skipped_images
from metilr.extraction.options import ExtractionOptions, Precision
from metilr.extraction.store import DescriptorStore
from metilr.files import write_atomically
from metilr.models import RANDOM, Engine, ModelOptions, PatchRounding, PoolingName
from metilr.progress import make_console
from metilr.retrieval.knn import USUAL_TAU

if TYPE_CHECKING:
    from metilr.models.embedder import Embedder
    from metilr.retrieval.whitening import PCAWhitening

APPROXIMATE = "approximate"  # folder of an index
IMAGE_SIZE = 500  # px, as the Met's own images
USUAL_K = 10  # with k = 1 every photo is answered with a confidence near 100%, whatever it shows


def index(
    folder: Path,
    output: Path,
    csv: Path | None = None,
    model: ModelOptions | None = None,
    extraction: ExtractionOptions | None = None,
    method: ComparisonOptions | None = None,
    approximate: bool = False,
) -> Path | None:
    """Describe a folder of a museum's own images, to identify photos.

    A sub-folder is an exhibit, with all images below it; an image beside the sub-folders is an exhibit of its own,
    named as the file without its ending. Interrupted, the same command continues. Photos are resized as the images.

    Args:
        folder: Folder with the images.
        output: Folder for the index, to be given to metilr identify and metilr serve as --store.
        csv: Names images and exhibits instead of the sub-folders: columns path (relative to the folder) and exhibit.
        model: What describes the images.
        extraction: How images are read and where the model runs.
        method: How photos are compared with the images.
        approximate: Also make an approximate search of 100,000 images or more, which identify and serve then use.

    Returns:
        The index's folder; None in the processes of a launcher other than the first.

    Raises:
        UserError: If an option, a file or the data is not usable; says which and what to do.
    """
    folder, output, csv = Path(folder), Path(output), None if csv is None else Path(csv)
    console = make_console(quiet=not launched_as_first())
    model, extraction, given = model or ModelOptions(), extraction or ExtractionOptions(), method or ComparisonOptions()
    options = plain_options(flat({"folder": folder, "csv": csv, "model": model, "extraction": extraction,
                                  "method": given, "approximate": approximate}))  # fmt: skip
    _check(folder, output, method := MethodOptions(**vars(given)), approximate)
    catalogue = read_catalogue(folder, csv)
    if (output / "index.json").exists():
        _refuse_another(output, catalogue, options)
        console.print(f"finished already: {escape(str(output))}")
        return output if launched_as_first() else None

    from metilr.evaluation.database import build_searchable, views_of, whitening_of
    from metilr.evaluation.recognition import check_method
    from metilr.extraction.describe import describe_images
    from metilr.extraction.descriptors import open_descriptors
    from metilr.models.checkpoints import build_model
    from metilr.retrieval.approximate import check_size

    limit_images(extraction.max_megapixels)
    quieten_lightning()
    ground_truth, n_images, n_exhibits = catalogue.ground_truth(), len(catalogue.paths), len(catalogue.names)
    what = f"{amount(n_images, 'image')} of {amount(n_exhibits, 'exhibit')}"
    progress = make_console(quiet=extraction.quiet)
    progress.print(f"[bold]data[/]         {escape(str(catalogue.folder))}: {what}")
    if catalogue.left_aside:
        console.print(f"[bold yellow]note:[/] left aside: {catalogue.left_aside}")
    if model.ckpt is not None:  # absolute: an index may be used from any folder
        model = replace(model, ckpt=Path(model.ckpt).absolute())
    if model.weights not in (None, RANDOM):
        model = replace(model, weights=str(Path(model.weights).absolute()))
    embedder = build_model(model)
    extraction = replace(extraction, image_size=extraction.image_size or embedder.image_size or IMAGE_SIZE)
    method = replace(method, tau=method.tau or USUAL_TAU)
    check_method(method, n_images, embedder.dim, n_exhibits)
    if approximate:
        check_size(n_images * method.rows_per_image)
    views = [view for view in views_of(method, model.seed) if "visits" in view.of]  # crops are those of photos to come
    store = describe_images(embedder, ground_truth, output / "store", extraction, progress, views)
    if not launched_as_first():
        return None
    opened = open_descriptors([store.path], ground_truth, views)
    is_valid, left_out = opened.is_valid["database"], skipped_images(opened, ground_truth)
    if len(set(ground_truth.labels["database"][is_valid].tolist())) < 2:
        raise UserError(f"{folder}: fewer than 2 exhibits have a usable image: {_first(left_out)}; mend the images")
    n_decoded = int(is_valid.sum())
    n_rows = n_decoded * method.rows_per_image
    k = min(USUAL_K * method.rows_per_image, n_rows) if method.k is None else method.k
    if k > n_rows:
        raise UserError(f"{k}: {n_decoded:,} images could be decoded; choose k from 1 to {n_rows}", "k")
    whitening = whitening_of(opened, ground_truth, method)
    if whitening is not None:
        whitening.save(output / "whitening.npz")
    if approximate:
        from metilr.collection.collection import digest_of_database, save_searchable

        made_from = digest_of_database(store, method, model.seed, whitening)
        save_searchable(build_searchable(opened, ground_truth, method, whitening), output / APPROXIMATE, made_from)
    made = describe_index(catalogue, model, extraction, replace(method, k=k), whitening is not None, options)
    write_atomically(output / "index.json", json.dumps(made.model_dump(by_alias=True), indent=1) + "\n")  # the last
    for note in _notes(embedder, method, whitening, left_out):
        console.print(f"[bold yellow]note:[/] {escape(note)}")
    where = escape(str(output))
    console.print(f"wrote {where}; now: metilr identify PHOTO --store {where}")
    return output


def _check(folder: Path, output: Path, method: MethodOptions, approximate: bool) -> None:
    place = Path(os.path.realpath(output))  # which takes links in a circle, too
    if Path(os.path.realpath(folder)) in (place, *place.parents):
        raise UserError(f"{output}: lies among the images of {folder}; name a folder elsewhere", "output")
    if (output / APPROXIMATE).exists() and not approximate:
        raise UserError(f"{output / APPROXIMATE}: is there, but approximate is not asked for; ask for it, or delete it")
    if method.geometric_check:
        raise UserError("needs val to be tuned on, which an index has not; evaluate instead", "geometric_check")
    if method.search_device is not None:
        raise UserError("has no effect on an index; leave it out", "search_device")


def _refuse_another(output: Path, catalogue: Catalogue, options: Mapping[str, Any]) -> None:
    """Refuse a finished index that the same command would now make otherwise."""
    made = Index.load(output)
    refuse_other_options(output, made.options, options)
    sizes = np.array([file_size(catalogue.folder / path) or 0 for path in catalogue.paths], np.int64)
    are_same = (made.catalogue.paths, made.catalogue.exhibits) == (catalogue.paths, catalogue.exhibits)
    if not are_same or DescriptorStore(output / "store").pending("database", sizes, retry_bad=False).any():
        changed = f"holds an index of {catalogue.folder} as it was before images changed there"
        raise UserError(f"{output}: {changed}; name another folder, or delete it", "output")


def _first(left_out: Sequence[Mapping[str, str]]) -> str:
    return "; ".join([*(image["reason"] for image in left_out[:3]), *(["..."] if len(left_out) > 3 else [])])


def _notes(
    embedder: "Embedder", method: MethodOptions, whitening: "PCAWhitening | None", left_out: Sequence[Mapping[str, str]]
) -> list[str]:
    from metilr.retrieval.whitening import DEFAULT_DIM

    notes = []
    if embedder.backbone.provenance.source == RANDOM:
        notes.append("RANDOM WEIGHTS: the backbone was not trained, its answers mean nothing")
    is_default = method.whitening == "pca" and method.whitening_dim is None
    if whitening is not None and is_default and whitening.dim < min(DEFAULT_DIM, embedder.dim):
        notes.append(
            f"whitened to {amount(whitening.dim, 'dimension')} instead of {DEFAULT_DIM}: {whitening.n:,} images support"
            " no more; with few, photos of other things look similar to something: compare with whitening none, or with"
            " the whitening of a larger museum"
        )
    if left_out:
        notes.append(f"left out: {amount(len(left_out), 'image')}: {_first(left_out)}")
    return notes


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
    def model_options(self) -> ModelOptions:
        """What described the images."""
        return recorded_model({**self.model.model_dump(), "seed": self.elements.seed})

    @property
    def method(self) -> MethodOptions:
        """How photos are compared with the images, which are whitened already; refused if metilr no longer can."""
        known = {"visits", "database_views", "query_crops", *DELETED}
        return method_of_elements({name: part for name, part in self.elements.model_dump().items() if name in known})


def recorded_model(recorded: Mapping[str, Any], ckpt: Path | None = None) -> ModelOptions:
    """The model of recorded options, as far as they are there; ``ckpt`` in place of a recorded checkpoint."""
    ckpt = recorded["ckpt"] if ckpt is None else ckpt
    if ckpt is not None:  # it carries the rest
        return ModelOptions(Path(ckpt), scales=recorded["scales"], seed=recorded["seed"])
    names = [field.name for field in fields(ModelOptions) if field.name in recorded]
    return ModelOptions(**{name: recorded[name] for name in names})


def describe_index(
    catalogue: Catalogue, model: ModelOptions, extraction: ExtractionOptions, method: MethodOptions, whitened: bool,
    options: Mapping[str, Any],
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
        image_size=extraction.image_size,
        whitening=whitened,
        elements=Elements(
            visits=method.n_visits,
            database_views=method.database_views,
            query_crops=list(method.query_crops),
            seed=model.seed,
        ),
        knn=Vote.model_validate({"k": method.k, "tau": method.tau}),
        versions=dict(library_versions()),
        options=dict(options),
    )
