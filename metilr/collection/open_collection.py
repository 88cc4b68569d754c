"""Collections from what earlier commands wrote: the folder of an evaluation, or an index."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from metilr.collection import PhotoOptions, Threshold, choose_threshold
from metilr.collection.collection import Collection, Describer
from metilr.collection.index import index
from metilr.collection.index_schema import APPROXIMATE, MILVUS, Index, recorded_model
from metilr.collection.labels import Labels
from metilr.collection.searchable import digest_of_database, load_searchable, open_in_milvus
from metilr.data.decode import MAX_MEGAPIXELS, file_size, limit_images
from metilr.data.ground_truth import GroundTruth, load_ground_truth
from metilr.demo import DEMO
from metilr.errors import UserError
from metilr.evaluation.calibration import background_of
from metilr.evaluation.database import build_searchable, class_weights_of, views_of
from metilr.evaluation.options import MethodOptions, method_of_elements
from metilr.evaluation.read_run import Run, read_run
from metilr.evaluation.results import Check, Confidence, Vote
from metilr.evaluation.runs import RUNS
from metilr.extraction.describe import store_settings
from metilr.extraction.descriptors import open_descriptors
from metilr.extraction.options import Accelerator, ExtractionOptions
from metilr.extraction.store import DescriptorStore, differing_settings, settings_fingerprint
from metilr.geometry.check import geometric_check_of
from metilr.geometry.evidence import Gate
from metilr.models import RANDOM, ModelOptions, is_on_hub
from metilr.models.checkpoints import build_model
from metilr.models.embedder import Embedder
from metilr.retrieval.confidence import Calibration, feature_names
from metilr.retrieval.whitening import PCAWhitening
from metilr.sources.catalogue import Catalogue, read_catalogue


def open_with_threshold(options: PhotoOptions) -> tuple[Collection, Threshold]:
    """Open an evaluation's folder or an index, with the threshold that decisions are made by."""
    if options.store is not None:
        recorded = _of_index(Path(options.store), options.ckpt, options.accelerator, options.milvus)
        return _assemble(recorded), choose_threshold(None, options)
    assert options.run is not None
    run = read_run(Path(options.run))
    threshold = choose_threshold(run, options)
    return _assemble(_of_run(run, options.ckpt, options.accelerator)), threshold


def open_collection(
    path: str | Path, ckpt: str | Path | None = None, accelerator: Accelerator = "auto", milvus: str | None = None
) -> Collection:
    """Open what photos can be compared with: the folder of an evaluation or an index, or a museum's images.

    A folder of images, a sub-folder an exhibit, is indexed first, with the default model: this describes all images,
    which takes time, prints how far it is, and writes ``runs/indexes`` in the current folder. Images that are added,
    exchanged or removed later make another index there. A run or an index is only read; one with a geometric check
    keeps local features in ``runs/local_features``. ``ckpt`` is the checkpoint that made it, if it was moved since; of
    a folder of images the model to take. ``milvus`` is the address of a server that ``metilr index`` wrote an index to,
    and that is to be searched.

    Raises:
        UserError: If something is missing or changed, or the folder holds nothing of the kind.
    """
    path = Path(path)
    if milvus is not None:
        return _assemble(_of_index(path, ckpt, accelerator, milvus))
    if (path / "results.json").exists():
        return _assemble(_of_run(read_run(path), ckpt, accelerator))
    if not (path / "index.json").exists():
        catalogue = read_catalogue(path)
        sizes = [file_size(catalogue.folder / path) for path in catalogue.paths]  # an image exchanged for another
        content = [str(catalogue.folder), catalogue.paths, catalogue.exhibits, sizes, str(ckpt)]
        images, path = path, RUNS / "indexes" / f"{catalogue.folder.name}-{settings_fingerprint(content)}"
        if not (path / "index.json").exists():
            index(images, path, model=ModelOptions(ckpt=ckpt), extraction=ExtractionOptions(accelerator=accelerator))
    return _assemble(_of_index(path, ckpt, accelerator))


@dataclass(frozen=True)
class Recorded:
    """What an evaluation or an index says of itself, of which a collection is made."""

    path: Path
    name: str
    ground_truth: GroundTruth
    exhibits: Sequence[str]
    store: DescriptorStore
    model: ModelOptions
    extraction: ExtractionOptions
    method: MethodOptions
    whitening: PCAWhitening | None
    vote: Vote
    described: Mapping[str, Any] | None = None  # what an evaluation says of its model beyond the options
    check: Check | None = None
    confidence: Confidence | None = None
    classifier: Mapping[str, Any] | None = None
    strangers: Catalogue | None = None  # an index's photos that show no exhibit
    background: Path | None = None  # where they are described
    labels: Labels | None = None  # what an index says of its exhibits
    milvus: str | None = None  # server to search in


def _of_index(path: Path, ckpt: str | Path | None, accelerator: Accelerator, milvus: str | None = None) -> Recorded:
    index = Index.load(path)
    limit_images(MAX_MEGAPIXELS)
    catalogue, model = index.catalogue, index.model
    return Recorded(
        path=path,
        name=index.name or catalogue.folder.name,
        ground_truth=catalogue.ground_truth(),
        exhibits=catalogue.names,
        store=DescriptorStore(path / index.store),
        model=recorded_model(asdict(index.model_options), ckpt),
        extraction=ExtractionOptions(
            accelerator=accelerator, precision=model.precision, engine=model.engine
        ).resized_to(index.image_size),
        method=index.method,
        whitening=PCAWhitening.load(path / "whitening.npz") if index.whitening else None,
        vote=index.knn,
        strangers=index.strangers,
        background=None if index.background is None else path / index.background.store,
        labels=Labels(path / index.labels, catalogue.names),
        milvus=milvus,
    )


def _of_run(run: Run, ckpt: str | Path | None, accelerator: Accelerator) -> Recorded:
    """Paths that were relative are so to the folder that the evaluation was started in, or else to the current one."""
    results, config, model = run.results, run.config, run.results.model
    if config.get("descriptors") or model.store is None:
        raise UserError(f"{run.path}: was made from descriptors, so it has no model for photos; evaluate from a root")
    limit_images(config.get("max_megapixels", MAX_MEGAPIXELS))
    root = DEMO if config.get("root") is None else Path(config["root"])
    ground_truth = load_ground_truth(_found(run, "root", root), results.data.database)
    if ground_truth.fingerprint() != results.data.fingerprint:
        raise UserError(f"{ground_truth.root}/ground_truth: changed since the evaluation {run.path}; evaluate again")
    with _named(f"{run.path}: was described with"):
        extraction = ExtractionOptions(
            accelerator=accelerator, precision=model.precision, engine=model.engine
        ).resized_to(model.image_size)
    with _named(f"{run.path}: was evaluated with"):  # a run older than ``elements`` had none on
        method = method_of_elements(results.elements.recorded() if results.elements else {})
    return Recorded(
        path=run.path, name=ground_truth.root.name + (" (synthetic)" if results.data.synthetic else ""),
        ground_truth=ground_truth, exhibits=[str(exhibit_id) for exhibit_id in ground_truth.exhibit_ids.tolist()],
        store=DescriptorStore(_found(run, "store", Path(model.store))), model=_model_of_run(run, ckpt),
        extraction=extraction, method=method, whitening=whitening_of_run(run), vote=results.knn,
        described=model.recorded(), check=results.geometric_check, confidence=results.confidence,
        classifier=results.classifier,
    )  # fmt: skip


def _assemble(made: Recorded) -> Collection:
    """Put a collection together, refusing a model that did not make what it is compared with."""
    ground_truth, store, options, method = made.ground_truth, made.store, made.extraction, made.method
    with _named(f"{made.path}: was described with"):
        embedder = build_model(made.model)
    wanted = store_settings(embedder, ground_truth, options.resize_to, options.precision, options.engine)
    if made.described is not None:
        described = {name: made.described.get(name) for name in wanted["model"]}
        _refuse_another_model(made.path, described, wanted["model"])
    _refuse_another_model(store.path, store.manifest().settings, wanted)

    approximate, seed = made.path / APPROXIMATE, made.model.seed
    if made.milvus is not None:
        assert made.labels is not None
        made_from = digest_of_database(store, method, seed, made.whitening, made.labels.file.name)
        width = embedder.dim if made.whitening is None else made.whitening.dim
        database = open_in_milvus(made.path / MILVUS, made.milvus, made_from, width)
    elif approximate.exists():
        database = load_searchable(approximate, digest_of_database(store, method, seed, made.whitening))
    else:
        visits = [view for view in views_of(method, seed) if method.database_views != "none" and "visits" in view.of]
        for recorded in (made.described or {}).get("views", ()):
            for drawn in [view.settings() for view in visits if view.settings()["kind"] == recorded.get("kind")]:
                _refuse_another_model(made.path, {name: recorded.get(name) for name in drawn}, drawn)
        descriptors = open_descriptors([store.path], ground_truth, visits)
        classifier = class_weights_of(method, made.model.ckpt, ground_truth)
        if classifier is not None and classifier.sha256() != (made.classifier or {}).get("sha256"):
            reason = "its class weights are not those of the evaluation; give the ckpt that made it"
            raise UserError(f"{made.model.ckpt}: {reason}, or evaluate again")
        database = build_searchable(descriptors, ground_truth, method, made.whitening, classifier=classifier)
    check = None
    if (recorded := made.check) is not None:
        chosen = (recorded.candidates, recorded.reorder, recorded.turns, recorded.boost, Gate(**recorded.gate))
        check = geometric_check_of(embedder.to(options.device), options.resize_to, *chosen)
        _refuse_another_model(made.path, recorded.features, check.extractor.settings())
    return Collection(
        name=made.name, ground_truth=ground_truth, exhibits=made.exhibits, describer=Describer(embedder, options),
        image_size=options.resize_to, method=method, whitening=made.whitening, database=database, k=made.vote.k,
        tau=made.vote.tau, check=check, labels=made.labels, **_calibration(made),
    )  # fmt: skip


def _calibration(made: Recorded) -> dict[str, Any]:
    """What makes the confidence a probability, with the background from the store, if the evaluation had that."""
    if made.strangers is not None:
        assert made.background is not None
        described = open_descriptors([made.background], strangers := made.strangers.ground_truth())
        return {"background": build_searchable(described, strangers, MethodOptions(), made.whitening).rows}
    if made.confidence is None or made.confidence.calibration is None:
        return {}
    calibration = Calibration(**made.confidence.calibration.recorded())
    crops = [view for view in views_of(made.method, made.model.seed) if "visits" not in view.of]
    descriptors = open_descriptors([made.store.path], made.ground_truth, crops)
    background = background_of(descriptors, made.ground_truth, made.whitening)
    are_known = calibration.features == feature_names(made.check is not None, len(background))
    if not are_known or len(background) != made.confidence.n_background:
        raise UserError(f"{made.path}: its calibrated confidence is of other evidence than metilr has; evaluate again")
    return {"calibration": calibration, "background": background}


def _refuse_another_model(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    if differing := differing_settings(found, wanted):
        raise UserError(
            f"{path}: was made by another model or from other images than photos would be compared by "
            f"({'; '.join(differing[:3])}); give the ckpt that made it, or make it again"
        )


def embedder_of_run(run: Run) -> Embedder:
    """Build the model that described a run's images; UserError if its files are no longer there."""
    model = _model_of_run(run)
    with _named(f"{run.path}: was described with"):
        return build_model(model)


def _model_of_run(run: Run, ckpt: str | Path | None = None) -> ModelOptions:
    """The model that described a run's images; ``ckpt`` in place of the checkpoint's own place."""
    config = dict(run.config)
    missing = {field.name for field in fields(ModelOptions)} - config.keys()
    if missing:
        raise UserError(f"{run.path / 'config.yaml'}: lacks {', '.join(sorted(missing))}; evaluate again")
    for option in ("ckpt", "weights") if ckpt is None else ():
        place = config[option]
        if place not in (None, RANDOM) and not is_on_hub(place):
            config[option] = str(_found(run, option, Path(place)))
    with _named(f"{run.path}: was described with"):
        return recorded_model(config, ckpt)


def whitening_of_run(run: Run) -> PCAWhitening | None:
    """Read the whitening that a run applied, None for none; UserError if the file is another one."""
    if "whitening" not in run.results.model_fields_set:
        raise UserError(f"{run.path / 'results.json'}: does not say how it whitened; evaluate again")
    recorded = run.results.whitening
    if recorded is None:
        return None
    whitening = PCAWhitening.load(run.path / "whitening.npz")
    if whitening.sha256() != recorded.get("sha256"):
        raise UserError(f"{run.path / 'whitening.npz'}: is not the whitening of this evaluation; evaluate again")
    return whitening


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """Begin a refusal with what it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what} {error}") from None


def _found(run: Run, option: str, path: Path) -> Path:
    for place in (Path(run.results.directory) / path, path):
        if place.exists():
            return place
    hint = "give its new place as ckpt" if option == "ckpt" else "put it back, or evaluate again"
    raise UserError(f"{run.path}: {path}, its {option}, is no longer there; {hint}")
