"""``metilr index``: a museum's own images, made ready for ``metilr identify`` and ``metilr serve``."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.markup import escape

from metilr.cli import flat, flat_defaults
from metilr.collection.index_schema import Index, describe_index
from metilr.data.decode import file_size, limit_images
from metilr.data.folder import Catalogue, find_images, read_catalogue
from metilr.distributed import launched_as_first, quieten_lightning
from metilr.errors import UserError, amount
from metilr.evaluation.options import ComparisonOptions, MethodOptions
from metilr.evaluation.runs import plain_options, refuse_other_options, skipped_images
from metilr.extraction.options import ExtractionOptions
from metilr.extraction.store import DescriptorStore
from metilr.files import write_atomically
from metilr.models import RANDOM, ModelOptions, is_on_hub
from metilr.progress import make_console
from metilr.retrieval.knn import USUAL_TAU

if TYPE_CHECKING:
    from metilr.models.embedder import Embedder
    from metilr.retrieval.whitening import PCAWhitening

APPROXIMATE, BACKGROUND = "approximate", "background"  # folders of an index
LEAST_BACKGROUND = 5  # photos, of whose similarities a mean is taken
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
    background: Path | None = None,
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
        background: Folder of photos that show none of the exhibits, 5 or more: answers then tell how much more similar
            than to these a photo is to an exhibit.

    Returns:
        The index's folder; None in the processes of a launcher other than the first.

    Raises:
        UserError: If an option, a file or the data is not usable; says which and what to do.
    """
    folder, output, csv = Path(folder), Path(output), None if csv is None else Path(csv)
    console = make_console(quiet=not launched_as_first())
    model, extraction, given = model or ModelOptions(), extraction or ExtractionOptions(), method or ComparisonOptions()
    _check(folder, output, MethodOptions(**vars(given)), approximate)
    catalogue, strangers = read_catalogue(folder, csv), None if background is None else read_background(background)
    if any(map(is_on_hub, (model.ckpt, model.weights, given.whitening))):
        from metilr.models.hub import pin

        model, given = pin(model), pin(given)
    method = MethodOptions(**vars(given))
    options = plain_options(flat({"folder": folder, "csv": csv, "model": model, "extraction": extraction,
                                  "method": given, "approximate": approximate, "background": background}))  # fmt: skip
    if (output / "index.json").exists():
        _refuse_another(output, catalogue, strangers, options)
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
    if model.ckpt is not None and not is_on_hub(model.ckpt):  # absolute: an index may be used from any folder
        model = replace(model, ckpt=Path(model.ckpt).absolute())
    if model.weights not in (None, RANDOM) and not is_on_hub(model.weights):
        model = replace(model, weights=str(Path(model.weights).absolute()))
    embedder = build_model(model)
    extraction = extraction.resized_to(extraction.resize_to or embedder.image_size or IMAGE_SIZE)
    method = replace(method, tau=method.tau or USUAL_TAU)
    check_method(method, n_images, embedder.dim, n_exhibits)
    if approximate:
        check_size(n_images * method.rows_per_image if method.database_rows == "images" else n_exhibits)
    views = [view for view in views_of(method, model.seed) if "visits" in view.of]  # crops are those of photos to come
    store = describe_images(embedder, ground_truth, output / "store", extraction, progress, views)
    if strangers is not None:
        described = describe_images(embedder, strangers.ground_truth(), output / BACKGROUND, extraction, progress)
        if int(described.is_valid("database").sum()) < LEAST_BACKGROUND:
            raise UserError(f"{background}: fewer than {LEAST_BACKGROUND} photos can be described", "background")
    if not launched_as_first():
        return None
    opened = open_descriptors([store.path], ground_truth, views)
    is_valid, left_out = opened.is_valid["database"], skipped_images(opened, ground_truth)
    if len(set(ground_truth.labels["database"][is_valid].tolist())) < 2:
        raise UserError(f"{folder}: fewer than 2 exhibits have a usable image: {_first(left_out)}; mend the images")
    n_decoded = int(is_valid.sum())
    n_rows = n_decoded * method.rows_per_image
    usual_k = USUAL_K * method.rows_per_image if method.database_rows == "images" else 1
    k = min(usual_k, n_rows) if method.k is None else method.k
    if k > n_rows:
        raise UserError(f"{k}: {n_decoded:,} images could be decoded; choose k from 1 to {n_rows}", "k")
    whitening = whitening_of(opened, ground_truth, method)
    if whitening is not None:
        whitening.save(output / "whitening.npz")
    if approximate:
        from metilr.collection.collection import digest_of_database, save_searchable

        made_from = digest_of_database(store, method, model.seed, whitening)
        save_searchable(build_searchable(opened, ground_truth, method, whitening), output / APPROXIMATE, made_from)
    made = describe_index(catalogue, model, extraction, replace(method, k=k), whitening is not None, options, strangers)
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


def _refuse_another(
    output: Path, catalogue: Catalogue, strangers: Catalogue | None, options: Mapping[str, Any]
) -> None:
    """Refuse a finished index that the same command would now make otherwise."""
    made = Index.load(output)
    defaults = plain_options(flat_defaults(index)) if made.options else {}  # of options that it is too old to have
    refuse_other_options(output, {**defaults, **made.options}, options)
    for store, before, now in (("store", made.catalogue, catalogue), (BACKGROUND, made.strangers, strangers)):
        if before is None or now is None:  # both, as the options are the same
            continue
        sizes = np.array([file_size(now.folder / path) or 0 for path in now.paths], np.int64)
        are_same = (before.paths, before.exhibits) == (now.paths, now.exhibits)
        if not are_same or DescriptorStore(output / store).pending("database", sizes, retry_bad=False).any():
            changed = f"holds an index of {now.folder} as it was before images changed there"
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
