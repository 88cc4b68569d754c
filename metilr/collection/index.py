"""``metilr index``: a museum's own images, made ready for ``metilr identify`` and ``metilr serve``."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from metilr.cli import flat, flat_defaults
from metilr.collection.index_schema import APPROXIMATE, FAILED, MILVUS, Background, describe_index, write_failed
from metilr.collection.labels import said
from metilr.collection.state import digests_of, is_current, read_before
from metilr.data.decode import limit_images
from metilr.data.exhibit import is_address
from metilr.data.folder import find_images
from metilr.distributed import has_launcher, launched_as_first, quieten_lightning
from metilr.errors import UserError, amount
from metilr.evaluation.options import ComparisonOptions, MethodOptions
from metilr.evaluation.runs import plain_options, skipped_images
from metilr.extraction.options import ExtractionOptions
from metilr.files import alone_in
from metilr.models import RANDOM, ModelOptions, is_on_hub
from metilr.progress import make_console, printable
from metilr.retrieval.knn import USUAL_TAU
from metilr.retrieval.milvus import connect
from metilr.sources.catalogue import Catalogue, read_catalogue
from metilr.sources.fetch import DownloadOptions
from metilr.sources.remote import read_source

if TYPE_CHECKING:
    from metilr.models.embedder import Embedder
    from metilr.retrieval.whitening import PCAWhitening

STORE, BACKGROUND = "store", "background"  # how folders of an index begin
LEAST_BACKGROUND = 5  # photos, of whose similarities a mean is taken
IMAGE_SIZE = 500  # px, as the Met's own images
USUAL_K = 10  # with k = 1 every photo is answered with a confidence near 100%, whatever it shows


def index(
    source: str | Path,
    output: Path,
    csv: Path | None = None,
    language: str = "en",
    relearn: bool = False,
    model: ModelOptions | None = None,
    extraction: ExtractionOptions | None = None,
    method: ComparisonOptions | None = None,
    downloads: DownloadOptions | None = None,
    approximate: bool = False,
    background: Path | None = None,
    milvus: str | None = None,
) -> Path | None:
    """Describe a museum's own images, to identify photos.

    In a folder, a sub-folder is an exhibit, with all images below it; an image beside the sub-folders is an exhibit of
    its own, named as the file without its ending. A CSV or Parquet file has a row an image, with columns path (or
    image_url) and exhibit (or object_id), and others, such as title and artist, that answers show. A IIIF collection
    has a manifest an exhibit, a manifest alone a canvas an exhibit. What is at web addresses is downloaded first.

    Photos are resized as the images. Interrupted, the same command continues. Of a finished index it describes what has
    been added or changed since and drops what is gone.

    Args:
        source: A folder of images, or a table (CSV, Parquet) or a IIIF manifest or collection, as a file or at an
            address.
        output: Folder for the index, to be given to metilr identify and metilr serve as --store.
        csv: A table beside a folder. With a column path, relative to the folder, it names images and exhibits instead
            of the sub-folders; without, it has a row an exhibit, with what answers show.
        language: Of texts in IIIF that come in several.
        relearn: Learn the whitening anew from all images, when an index is brought up to date.
        model: What describes the images.
        extraction: How images are read and where the model runs.
        method: How photos are compared with the images.
        downloads: How images at web addresses are downloaded.
        approximate: Also make an approximate search of 100,000 images or more, which identify and serve then use.
        background: Folder of photos that show none of the exhibits, 5 or more: answers then tell how much more similar
            than to these a photo is to an exhibit.
        milvus: Also write the index to this Milvus server, such as http://localhost:19530, which identify and serve
            then search with the same option: for millions of images. The environment's MILVUS_TOKEN is its password.

    Returns:
        The index's folder; None in the processes of a launcher other than the first.

    Raises:
        UserError: If an option, a file or the data is not usable; says which and what to do.
    """
    source, output = source if is_address(str(source)) else Path(source), Path(output)
    csv, is_first = None if csv is None else Path(csv), launched_as_first()
    model, extraction, given = model or ModelOptions(), extraction or ExtractionOptions(), method or ComparisonOptions()
    downloads = downloads or DownloadOptions()
    if isinstance(source, str) and "@" in source.split("/")[2]:
        address = source.split("@")[-1]
        raise UserError(f"{address}: its address has a password in it, which an index would keep", "source")
    _check(source, output, MethodOptions(**vars(given)), approximate)
    if milvus is not None:
        connect(milvus)
    if any(map(is_on_hub, (model.ckpt, model.weights, given.whitening))):
        from metilr.models.hub import pin

        model, given = pin(model), pin(given)
    method = MethodOptions(**vars(given))
    options = plain_options(flat({"source": source, "csv": csv, "model": model, "extraction": extraction,
                                  "method": given, "approximate": approximate, "background": background}))  # fmt: skip
    options["model_files"] = digests_of(model)
    limit_images(extraction.max_megapixels)
    quieten_lightning()
    output.mkdir(parents=True, exist_ok=True)
    with alone_in(output, "another metilr index", "stop it") if is_first else contextlib.nullcontext():
        defaults = plain_options(flat_defaults(index))
        del defaults["source"]
        before = read_before(output, options, defaults)
        strangers = None if background is None else read_background(background).with_digests(extraction.quiet)
        catalogue, is_finished, comparable = None, False, None if relearn else before
        if _is_folder(source, csv):  # which is listed faster than a model is loaded
            catalogue = read_catalogue(Path(source), csv).with_digests(extraction.quiet)
            is_finished = is_current(output, comparable, catalogue, strangers, milvus)
        if not is_finished:
            from metilr.models.checkpoints import build_model

            model = _from_anywhere(model)
            embedder = build_model(model)
            if before is not None and str(extraction.engine) == "auto":
                extraction = replace(extraction, engine=before.model.engine)  # whatever it would come to today
            extraction = extraction.for_model(embedder, IMAGE_SIZE)
            if catalogue is None:
                side = max(resized) if isinstance(resized := extraction.resize_to, tuple) else resized
                place = downloads.cache or output / "images"
                catalogue = read_source(source, place, downloads, side, language, before is not None, extraction.quiet)
                catalogue = catalogue.with_digests(extraction.quiet)
                is_finished = is_current(output, comparable, catalogue, strangers, milvus)
        assert catalogue is not None
        if is_finished:
            write_failed(output, catalogue)
            console = make_console(quiet=not is_first)
            for note in _notes_of_source(output, catalogue):
                console.print(f"[bold yellow]note:[/] {escape(printable(note))}")
            console.print(f"finished already: {escape(str(output))}")
        else:
            keeps = None if relearn or before is None or not before.whitening else output / "whitening.npz"
            _make(
                output, catalogue, strangers, embedder, model, extraction, method, approximate, milvus, options, keeps
            )
    return output if is_first else None


def _make(
    output: Path, catalogue: Catalogue, strangers: Catalogue | None, embedder: "Embedder", model: ModelOptions,
    extraction: ExtractionOptions, method: MethodOptions, approximate: bool, milvus: str | None,
    options: Mapping[str, Any], keeps: Path | None,
) -> None:  # fmt: skip
    """Describe what is new, and write the index; with the whitening that it ``keeps``."""
    from metilr.collection.searchable import digest_of_database, save_searchable, save_to_milvus
    from metilr.collection.update import describe_catalogue, remove_other_stores
    from metilr.evaluation.database import build_searchable, views_of, whitening_of
    from metilr.evaluation.recognition import check_method
    from metilr.extraction.descriptors import open_descriptors
    from metilr.retrieval.approximate import check_size
    from metilr.retrieval.whitening import PCAWhitening

    progress, console = make_console(quiet=extraction.quiet), make_console(quiet=not launched_as_first())
    ground_truth, n_images, n_exhibits = catalogue.ground_truth(), len(catalogue.paths), len(catalogue.names)
    what = f"{amount(n_images, 'image')} of {amount(n_exhibits, 'exhibit')}"
    progress.print(f"[bold]data[/]         {escape(str(catalogue.folder))}: {what}")
    method = replace(method, tau=method.tau or USUAL_TAU)
    check_method(method, n_images, embedder.dim, n_exhibits)
    if approximate:
        check_size(n_images * method.rows_per_image if method.database_rows == "images" else n_exhibits)
    views = [view for view in views_of(method, model.seed) if "visits" in view.of]  # crops are those of photos to come
    store = describe_catalogue(embedder, catalogue, output, STORE, extraction, progress, views)
    background = None
    if strangers is not None:
        described = describe_catalogue(embedder, strangers, output, BACKGROUND, extraction, progress)
        background = Background.of(strangers, described.path.name)
        if int(described.is_valid("database").sum()) < LEAST_BACKGROUND:
            reason = f"fewer than {LEAST_BACKGROUND} photos can be described"
            raise UserError(f"{strangers.folder}: {reason}", "background")
    if not launched_as_first():
        return
    opened = open_descriptors([store.path], ground_truth, views)
    is_valid, left_out = opened.is_valid["database"], skipped_images(opened, ground_truth)
    if len(set(ground_truth.labels["database"][is_valid].tolist())) < 2:
        reason = f"fewer than 2 exhibits have a usable image: {_first(left_out)}; mend the images"
        raise UserError(f"{catalogue.folder}: {reason}")
    method = replace(method, k=_k(method, int(is_valid.sum())))
    whitening = PCAWhitening.load(keeps) if keeps else whitening_of(opened, ground_truth, method)
    if whitening is not None and keeps is None:
        whitening.save(output / "whitening.npz")
    if approximate:
        made_from = digest_of_database(store, method, model.seed, whitening)
        save_searchable(build_searchable(opened, ground_truth, method, whitening), output / APPROXIMATE, made_from)
    is_whitened = whitening is not None
    made = describe_index(output, catalogue, model, extraction, method, is_whitened, options, background, store)
    if milvus is not None:
        made_from = digest_of_database(store, method, model.seed, whitening, made.labels)
        database = build_searchable(opened, ground_truth, method, whitening)
        names, paths, about = catalogue.names, catalogue.paths, catalogue.about

        def beside(label: int, image: int) -> dict[str, Any]:
            return {"path": paths[image], "exhibit": names[label], "about": said(about.get(names[label]))}

        save_to_milvus(database, milvus, output / MILVUS, made_from, beside, extraction.quiet)
    made.save(output, catalogue)
    remove_other_stores(output, {STORE: made.store, BACKGROUND: made.background.store if made.background else ""})
    for note in [*_notes(embedder, method, whitening, left_out), *_notes_of_source(output, catalogue)]:
        console.print(f"[bold yellow]note:[/] {escape(printable(note))}")
    if milvus is None and (output / MILVUS).exists():
        console.print("[bold yellow]note:[/] what Milvus has is of the index as it was; give milvus to write it anew")
    where = escape(str(output)) + ("" if milvus is None else f" --milvus {escape(milvus)}")
    console.print(f"wrote {escape(str(output))}; now: metilr identify PHOTO --store {where}")


def _k(method: MethodOptions, n_decoded: int) -> int:
    """Neighbours that vote: as was asked for, or the usual number if there are so many."""
    n_rows = n_decoded * method.rows_per_image
    usual_k = USUAL_K * method.rows_per_image if method.database_rows == "images" else 1
    if (k := min(usual_k, n_rows) if method.k is None else method.k) > n_rows:
        raise UserError(f"{k}: {n_decoded:,} images could be decoded; choose k from 1 to {n_rows}", "k")
    return k


def _from_anywhere(model: ModelOptions) -> ModelOptions:
    """The model with absolute paths: an index may be used from any folder."""
    if model.ckpt is not None and not is_on_hub(model.ckpt):
        model = replace(model, ckpt=Path(model.ckpt).absolute())
    if model.weights not in (None, RANDOM) and not is_on_hub(model.weights):
        model = replace(model, weights=str(Path(model.weights).absolute()))
    return model


def _is_folder(source: str | Path, csv: Path | None) -> bool:
    """Whether a source is a folder of images, and nothing is to be downloaded."""
    is_folder = isinstance(source, Path) and (source.is_dir() or csv is not None)
    if not is_folder and csv is not None:
        raise UserError(f"{csv}: has no effect beside {source}, which is no folder; leave it out", "csv")
    if not is_folder and has_launcher():
        raise UserError(f"{source}: is downloaded by one process; run without a launcher first", "source")
    return is_folder


def _check(source: str | Path, output: Path, method: MethodOptions, approximate: bool) -> None:
    place = Path(os.path.realpath(output))  # which takes links in a circle, too
    if isinstance(source, Path) and Path(os.path.realpath(source)) in (place, *place.parents):
        raise UserError(f"{output}: lies among the images of {source}; name a folder elsewhere", "output")
    if (output / APPROXIMATE).exists() and not approximate:
        raise UserError(f"{output / APPROXIMATE}: is there, but approximate is not asked for; ask for it, or delete it")
    if method.geometric_check:
        raise UserError("needs val to be tuned on, which an index has not; evaluate instead", "geometric_check")
    if method.database_rows == "classifier":
        reason = "knows the numbers of an evaluation's exhibits, an index has names"
        raise UserError(f"classifier: {reason}; evaluate instead, or choose prototypes", "database_rows")
    if method.search_device is not None:
        raise UserError("has no effect on an index; leave it out", "search_device")


def read_background(folder: Path) -> Catalogue:
    """List a folder's photos that show no exhibit."""
    folder = Path(folder)
    paths = tuple(file.relative_to(folder).as_posix() for file in find_images(folder).files)
    if len(paths) < LEAST_BACKGROUND:
        raise UserError(f"{folder}: holds {amount(len(paths), 'photo')}; name {LEAST_BACKGROUND} or more", "background")
    return Catalogue(folder.absolute(), paths, ("",) * len(paths))


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


def _notes_of_source(output: Path, catalogue: Catalogue) -> list[str]:
    notes = [f"left aside: {catalogue.left_aside}"] if catalogue.left_aside else []
    if catalogue.failed:
        where, why = next(iter(catalogue.failed.items()))
        n = amount(len(catalogue.failed), "address", "es")
        notes.append(f"{n} gave nothing, or nothing new ({output / FAILED} lists why); the first: {where}: {why}")
    return notes
