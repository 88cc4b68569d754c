"""Collections from what earlier commands wrote: the folder of an evaluation, or an index."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from metilr.collection.collection import Collection, Describer, digest_of_database, load_searchable
from metilr.collection.index import APPROXIMATE, Index, index
from metilr.collection.threshold import PhotoOptions, Threshold, choose_threshold
from metilr.data.decode import MAX_MEGAPIXELS, limit_images
from metilr.data.folder import read_catalogue
from metilr.data.ground_truth import GroundTruth, load_ground_truth
from metilr.demo import DEMO
from metilr.errors import UserError
from metilr.evaluation.database import build_searchable, views_of
from metilr.evaluation.options import MethodOptions, method_of_elements
from metilr.evaluation.results import Run, Vote, read_run
from metilr.evaluation.runs import RUNS
from metilr.extraction.describe import store_settings
from metilr.extraction.descriptors import open_descriptors
from metilr.extraction.options import Accelerator, ExtractionOptions
from metilr.extraction.store import DescriptorStore, differing_settings
from metilr.geometry.check import GeometricCheck, geometric_check_of
from metilr.geometry.evidence import Gate
from metilr.models import RANDOM, ModelOptions
from metilr.models.checkpoints import build_model, load_embedder
from metilr.models.embedder import Embedder, build_embedder
from metilr.retrieval.whitening import PCAWhitening

_OF_THE_MODEL = ("backbone", "weights", "pooling", "p", "stage", "patch_rounding", "seed")  # options of evaluate


def open_with_threshold(options: PhotoOptions) -> tuple[Collection, Threshold]:
    """Open an evaluation's folder or an index, with the threshold that decisions are made by.

    Raises:
        UserError: If something is missing, or the model is not the one that made it.
    """
    run = None if options.run is None else read_run(Path(options.run))
    chosen = choose_threshold(run, options.threshold, options.min_precision)
    if run is not None:
        return collection_of_run(run, options.ckpt, options.accelerator), chosen
    assert options.store is not None
    return collection_of_index(Path(options.store), options.ckpt, options.accelerator), chosen


def open_collection(path: str | Path, ckpt: Path | None = None, accelerator: Accelerator = "auto") -> Collection:
    """Open what photos can be compared with: the folder of an evaluation or an index, or a museum's images.

    A folder of images, a sub-folder an exhibit, is indexed first, with the default model, under runs/indexes; images
    that are added or removed later make another index.

    Args:
        path: The folder.
        ckpt: The checkpoint that made it, where it lies now; None: where it lay then, if there was one. Of a folder of
            images: the model to take.
        accelerator: Where the model runs.

    Raises:
        UserError: If something is missing or changed, or the folder holds nothing of the kind.
    """
    path = Path(path)
    if (path / "results.json").exists():
        return collection_of_run(read_run(path), ckpt, accelerator)
    if not (path / "index.json").exists():
        catalogue = read_catalogue(path)
        model = ModelOptions(ckpt=ckpt)
        content = [str(catalogue.folder), catalogue.paths, catalogue.exhibits, str(ckpt)]
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        made, path = path, RUNS / "indexes" / f"{catalogue.folder.name}-{digest[:12]}"
        if not (path / "index.json").exists():
            index(made, path, model=model, extraction=ExtractionOptions(accelerator=accelerator))
    return collection_of_index(path, None if ckpt is None else Path(ckpt), accelerator)


def collection_of_index(path: Path, ckpt: Path | None = None, accelerator: Accelerator = "auto") -> Collection:
    """Open what ``metilr index`` wrote.

    Raises:
        UserError: If it is no index, or something is missing or changed of the model, the store or the whitening.
    """
    index = Index.load(path)
    limit_images(MAX_MEGAPIXELS)
    model = index.model_options
    if ckpt is not None:
        model = ModelOptions(ckpt=ckpt, scales=model.scales, seed=model.seed)
    catalogue, approximate = index.catalogue, path / APPROXIMATE
    return _assemble(
        catalogue.folder.name,
        catalogue.ground_truth(),
        catalogue.names,
        DescriptorStore(path / "store"),
        build_model(model),
        ExtractionOptions(
            index.image_size, accelerator=accelerator, precision=index.model.precision, engine=index.model.engine
        ),
        index.method,
        model.seed,
        PCAWhitening.load(path / "whitening.npz") if index.whitening else None,
        index.knn,
        approximate=approximate if approximate.exists() else None,
    )


def _assemble(
    name: str,
    ground_truth: GroundTruth,
    exhibits: Sequence[str],
    store: DescriptorStore,
    embedder: Embedder,
    options: ExtractionOptions,
    method: MethodOptions,
    seed: int,
    whitening: PCAWhitening | None,
    vote: Vote,
    check: GeometricCheck | None = None,
    approximate: Path | None = None,
) -> Collection:
    """Put a collection together from a finished store, refusing a model that did not make it.

    ``approximate`` is the folder with the database as it is searched and its index; without it that is made now.
    """
    wanted = store_settings(embedder, ground_truth, options.image_size, options.precision, options.engine)
    refuse_another_model(store.path, store.manifest().settings, wanted)
    if approximate is None:
        used = [view for view in views_of(method, seed) if method.database_views != "none" and "visits" in view.of]
        opened = open_descriptors([store.path], ground_truth, used)
        database = build_searchable(opened, ground_truth, method, whitening)
    else:
        database = load_searchable(approximate, digest_of_database(store, method, seed, whitening))
    describer, size, (k, tau) = Describer(embedder, options), options.image_size, (vote.k, vote.tau)
    return Collection(name, ground_truth, exhibits, describer, size, method, whitening, database, k, tau, check)


def refuse_another_model(path: Path, found: dict[str, object], wanted: dict[str, object]) -> None:
    """Refuse to compare descriptors that were made differently; the error names the differing settings."""
    if differing := differing_settings(found, wanted):
        raise UserError(
            f"{path}: was made by another model or from other images than photos would be compared by "
            f"({'; '.join(differing[:3])}); give the ckpt that made it, or make it again"
        )


def collection_of_run(run: Run, ckpt: Path | None = None, accelerator: Accelerator = "auto") -> Collection:
    """Open the database of an evaluation that described images with a model.

    Paths that were relative are so to the folder that the evaluation was started in, or else to the current one.

    Raises:
        UserError: If it had no model, or something is missing or changed of data, model, store or whitening.
    """
    results, config, model = run.results, run.config, run.results.model
    if config.get("descriptors") or model.store is None:
        raise UserError(f"{run.path}: was made from descriptors, so it has no model for photos; evaluate from a root")
    limit_images(config.get("max_megapixels", MAX_MEGAPIXELS))
    root = DEMO if config.get("root") is None else Path(config["root"])
    ground_truth = load_ground_truth(_found(run, "root", root), results.data.database)
    if ground_truth.fingerprint() != results.data.fingerprint:
        raise UserError(f"{ground_truth.root}/ground_truth: changed since the evaluation {run.path}; evaluate again")

    with _named(f"{run.path}: was described with"):
        options = ExtractionOptions(
            model.image_size, accelerator=accelerator, precision=model.precision, engine=model.engine
        )
    with _named(f"{run.path}: was evaluated with"):  # a run older than ``elements`` had none on
        method = method_of_elements(results.elements.recorded() if results.elements else {})
    embedder = embedder_of_run(run, ckpt)
    wanted = store_settings(embedder, ground_truth, options.image_size, options.precision, options.engine)
    recorded = model.recorded()
    refuse_another_model(run.path, {name: recorded.get(name) for name in wanted["model"]}, wanted["model"])
    return _assemble(
        ground_truth.root.name + (" (synthetic)" if results.data.synthetic else ""),
        ground_truth,
        [str(exhibit_id) for exhibit_id in ground_truth.exhibit_ids.tolist()],
        DescriptorStore(_found(run, "store", Path(model.store))),
        embedder,
        options,
        method,
        config["seed"],
        whitening_of_run(run),
        results.knn,
        _check(run, embedder, options),
    )


def embedder_of_run(run: Run, ckpt: Path | None) -> Embedder:
    """Build the model that described a run's images; ``ckpt`` in place of the checkpoint's own place.

    Raises:
        UserError: If its files are no longer there.
    """
    config: Mapping[str, Any] = run.config
    missing = {"ckpt", "scales", *_OF_THE_MODEL} - config.keys()
    if missing:
        raise UserError(f"{run.path / 'config.yaml'}: lacks {', '.join(sorted(missing))}; evaluate again")
    scales = [config["scales"]] if isinstance(config["scales"], (int, float)) else config["scales"]
    if ckpt is None and config["ckpt"] is not None:
        ckpt = _found(run, "ckpt", Path(config["ckpt"]))
    if ckpt is not None:
        return load_embedder(Path(ckpt), scales)
    options = {name: config[name] for name in _OF_THE_MODEL}
    if options["weights"] not in (None, RANDOM):
        options["weights"] = str(_found(run, "weights", Path(options["weights"])))
    with _named(f"{run.path}: was described with"):
        return build_embedder(**options, scales=scales)


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """Begin a refusal with what it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what} {error}") from None


def _check(run: Run, embedder: Embedder, options: ExtractionOptions) -> GeometricCheck | None:
    recorded = run.results.geometric_check
    if recorded is None:
        return None
    gate = Gate(**recorded.gate)
    what = (recorded.candidates, recorded.reorder, recorded.boost, gate)
    check = geometric_check_of(embedder.to(options.device), options.image_size, *what)
    refuse_another_model(run.path, recorded.features, check.extractor.settings())
    return check


def whitening_of_run(run: Run) -> PCAWhitening | None:
    """Read the whitening that a run applied; None for none.

    Raises:
        UserError: If the file is another one.
    """
    if "whitening" not in run.results.model_fields_set:
        raise UserError(f"{run.path / 'results.json'}: does not say how it whitened; evaluate again")
    recorded = run.results.whitening
    if recorded is None:
        return None
    whitening = PCAWhitening.load(run.path / "whitening.npz")
    if whitening.sha256() != recorded.get("sha256"):
        raise UserError(f"{run.path / 'whitening.npz'}: is not the whitening of this evaluation; evaluate again")
    return whitening


def _found(run: Run, option: str, path: Path) -> Path:
    for place in (Path(run.results.directory) / path, path):
        if place.exists():
            return place
    hint = "give its new place as ckpt" if option == "ckpt" else "put it back, or evaluate again"
    raise UserError(f"{run.path}: {path}, its {option}, is no longer there; {hint}")
