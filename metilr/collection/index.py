"""``metilr index``: a museum's own images, made ready for ``metilr identify`` and ``metilr serve``."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from rich.console import Console
from rich.markup import escape

from metilr.collection.collection import APPROXIMATE, digest_of_database, save_searchable
from metilr.data.decode import MAX_MEGAPIXELS, limit_images
from metilr.data.folder import Catalogue, read_catalogue
from metilr.distributed import launched_as_first, quieten_lightning
from metilr.errors import UserError, is_text, one_line, shown
from metilr.evaluation.database import build_searchable, views_of, whitening_of
from metilr.evaluation.options import DatabaseViews, MethodOptions, method_of_elements
from metilr.evaluation.recognition import check_method
from metilr.evaluation.runs import check_index
from metilr.extraction.describe import describe_images, describe_views
from metilr.extraction.descriptors import open_descriptors
from metilr.extraction.options import Accelerator, BadImages, ExtractionOptions, Precision
from metilr.files import write_atomically
from metilr.models import RANDOM, Engine, PoolingName
from metilr.models.checkpoints import load_embedder
from metilr.models.embedder import Embedder, build_embedder
from metilr.provenance import library_versions
from metilr.retrieval.approximate import check_size
from metilr.retrieval.knn import USUAL_TAU
from metilr.retrieval.whitening import DEFAULT_DIM, PCAWhitening

SCHEMA = "metilr.index/2"
IMAGE_SIZE = 500  # px, as the Met's own images
USUAL_K = 10  # with k = 1 every photo is answered with a confidence near 100%, whatever it shows
SEED = 0
OF_THE_MODEL = ("backbone", "weights", "pooling", "p", "scales")


def index(
    folder: Path,
    output: Path,
    csv: Path | None = None,
    ckpt: Path | None = None,
    backbone: str = "lite0_in",
    weights: str | None = None,
    pooling: PoolingName = "gem",
    p: float = 3.0,
    scales: Sequence[float] | None = None,
    image_size: int | None = None,
    bad_images: BadImages = "stop",
    max_megapixels: float = MAX_MEGAPIXELS,
    whitening: str = "pca",
    whitening_dim: int | None = None,
    visits: int | None = None,
    database_views: DatabaseViews = "none",
    query_crops: Sequence[float] = (),
    k: int | None = None,
    tau: float = USUAL_TAU,
    approximate: bool = False,
    accelerator: Accelerator = "auto",
    devices: int | Literal["auto"] = "auto",
    precision: Precision | Literal[32] = "32",
    engine: Engine = "torch",
    batch_size: int = 32,
    num_workers: int | None = None,
) -> Path | None:
    """Describe a folder of a museum's own images, to identify photos.

    A sub-folder is an exhibit, with all images below it; an image beside the sub-folders is an exhibit of its own,
    named as the file without its ending. Interrupted, the same command continues.

    Args:
        folder: Folder with the images.
        output: Folder for the index, to be given to metilr identify and metilr serve as --store.
        csv: Names images and exhibits instead of the sub-folders: columns path (relative to the folder) and exhibit.
        ckpt: Checkpoint of metilr train in place of the model options below.
        backbone: One of those that metilr evaluate --help lists.
        weights: File with weights in the official file's form; "random" for seeded random weights; without it the
            official ones, from their cache or downloaded.
        pooling: Generalised mean, maximum, mean, regional maxima, or class token (ViTs).
        p: Exponent of GeM.
        scales: Relative sizes at which an image is described; without it 1, 1/√2 and 1/2, or the checkpoint's.
        image_size: Images and photos are resized so that the longest side has this many px; without it as the
            checkpoint was trained, else 500.
        bad_images: Stop at an image that cannot be decoded, or skip it.
        max_megapixels: An image of more is bad; its header tells, before anything is decoded.
        whitening: pca learns it on the images; learned from pairs of an image and its simulated visits; none goes
            without; else a whitening.npz of a run or an index.
        whitening_dim: Dimensions after whitening; without it 512 (pca) or all (learned), or as many as the images
            support.
        visits: Simulated visitors' photographs of each image to describe; without it 6 where they are needed.
        database_views: rows makes the visits further rows of their exhibit.
        query_crops: Search these middle parts of each photo too, such as 0.8 0.65 0.5 of its height and width.
        k: Number of neighbours that count; without it 10, or all images if they are fewer. An evaluation chooses k
            and tau on val, which an index has not.
        tau: Inverse temperature of the confidence; 50 is what evaluations choose most often.
        approximate: Also make an approximate search of 100,000 images or more, which identify and serve then use.
        accelerator: Where the backbone runs; auto takes GPUs if there are any, and says so.
        devices: Number of processes, one GPU each.
        precision: Arithmetic of the backbone, see metilr evaluate --help.
        engine: What computes the backbone, see metilr evaluate --help.
        batch_size: Most images in a batch; with --engine openvino it is 1.
        num_workers: Image decoding processes beside each process.

    Returns:
        The index's folder; None in the processes of a launcher other than the first.

    Raises:
        UserError: If an option, a file or the data is not usable; says which and what to do.
    """
    arguments = dict(locals())
    output, console = Path(output), Console(highlight=False)
    _check(arguments)
    limit_images(max_megapixels)
    quieten_lightning()
    catalogue = read_catalogue(folder, csv)
    if Path(folder).resolve() in (output.resolve(), *output.resolve().parents):
        raise UserError(f"--output {output}: lies among the images of {folder}; name a folder elsewhere")
    ground_truth = catalogue.ground_truth()
    n_images, n_exhibits = len(catalogue.paths), len(catalogue.names)
    console.print(
        f"[bold]data[/]         {escape(str(catalogue.folder))}: {n_images:,} images of {n_exhibits:,} exhibits",
        soft_wrap=True,
    )
    if catalogue.left_aside:
        console.print(f"[bold yellow]note:[/] left aside: {catalogue.left_aside}", soft_wrap=True)
    model = {name: arguments[name] for name in OF_THE_MODEL}
    model["ckpt"] = None if ckpt is None else str(Path(ckpt).absolute())  # the index is used from other folders
    model["weights"] = weights if weights in (None, RANDOM) else str(Path(weights).absolute())
    for name in ("ckpt", "weights"):
        if model[name] is not None and not is_text(model[name]):
            raise UserError(f"--{name} {model[name]}: its name is not UTF-8, which an index cannot hold; rename it")
    model["precision"], model["engine"] = str(precision), engine  # 32 is a number in YAML
    embedder = build_model(model)
    if image_size is None:
        image_size = embedder.image_size or IMAGE_SIZE
    method = MethodOptions(whitening, whitening_dim, visits=visits, database_views=database_views,
                           query_crops=query_crops, k=k, tau=tau)  # fmt: skip
    check_method(method, n_images, embedder.dim, n_exhibits)
    if approximate:
        check_size(n_images * method.rows_per_image)
    options = ExtractionOptions(
        image_size,
        bad_images,
        accelerator,
        devices,
        precision=model["precision"],
        engine=engine,
        batch_size=batch_size,
        num_workers=num_workers,
    )
    store = describe_images(embedder, ground_truth, output / "store", options, console)
    visits_of = [view for view in views_of(method, SEED) if "visits" in view.of]  # crops are those of photos to come
    for view in visits_of:
        describe_views(embedder, ground_truth, view, store, options, console)
    if not launched_as_first():
        return None
    opened = open_descriptors([store.path], ground_truth, visits_of)
    made = opened.made["database"]
    n_made = int(made.sum())
    n_rows = n_made * method.rows_per_image
    k = min(USUAL_K * method.rows_per_image, n_rows) if k is None else k
    if k > n_rows:
        raise UserError(f"--k {k}: {n_made:,} images could be decoded; choose k from 1 to {n_rows}")
    if len(set(ground_truth.labels["database"][made].tolist())) < 2:
        raise UserError(f"{folder}: fewer than 2 exhibits have an image that can be decoded; mend the images")
    transform = whitening_of(opened, ground_truth, method)
    if transform is not None:
        transform.save(output / "whitening.npz")
    if approximate:
        made_from = digest_of_database(store, method, SEED, transform)
        save_searchable(build_searchable(opened, ground_truth, method, transform), output / APPROXIMATE, made_from)
    is_whitened = transform is not None
    Index(catalogue, model, options.image_size, is_whitened, method, SEED, k, tau).save(output)
    for note in _notes(embedder, transform, whitening, whitening_dim, n_images - n_made):
        console.print(f"[bold yellow]note:[/] {escape(note)}", soft_wrap=True)
    console.print(
        f"wrote {escape(str(output))}; now: metilr identify PHOTO --store {escape(str(output))}", soft_wrap=True
    )
    return output


@dataclass(frozen=True)
class Index:
    """What ``index.json`` says.

    Attributes:
        catalogue: Which images show which exhibit.
        model: Options that the model was built from.
        image_size: That images were resized to.
        is_whitened: Whether there is a ``whitening.npz``.
        method: How photos are compared with the images.
        seed: Of the images' simulated visits.
        k: Number of neighbours.
        tau: Inverse temperature.
    """

    catalogue: Catalogue
    model: Mapping[str, Any]
    image_size: int | None
    is_whitened: bool
    method: MethodOptions
    seed: int
    k: int
    tau: float

    def save(self, path: Path) -> None:
        """Write ``index.json`` into the index's folder: the last of its files."""
        content = {
            "schema": SCHEMA,
            "folder": str(self.catalogue.folder),
            "images": [
                {"path": image, "exhibit": exhibit}
                for image, exhibit in zip(self.catalogue.paths, self.catalogue.exhibits, strict=True)
            ],
            "model": dict(self.model),
            "image_size": self.image_size,
            "whitening": self.is_whitened,
            "elements": {
                "visits": self.method.n_visits,
                "database_views": self.method.database_views,
                "query_crops": list(self.method.query_crops),
                "seed": self.seed,
            },
            "knn": {"k": self.k, "tau": self.tau},
            "versions": library_versions(),
        }
        write_atomically(path / "index.json", json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Index":
        """Read what ``save`` wrote.

        Raises:
            UserError: If the folder holds no index, or one of another schema.
        """
        file = path / "index.json"
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if content["schema"] != SCHEMA:
                raise ValueError(f"its schema is {shown(content['schema'])}")
            check_index(content)
            images = content["images"]
            catalogue = Catalogue(
                Path(content["folder"]),
                tuple(image["path"] for image in images),
                tuple(image["exhibit"] for image in images),
            )
            knn = content["knn"]
            elements = dict(content["elements"])
            seed = elements.pop("seed")
            return cls(
                catalogue,
                content["model"],
                content["image_size"],
                content["whitening"],
                method_of_elements(elements),
                seed,
                knn["k"],
                knn["tau"],
            )
        except FileNotFoundError:
            raise UserError(
                f"--store {path}: not an index (it has no index.json); make one with metilr index, or give --run"
            ) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else one_line(error)
            raise UserError(f"{file}: cannot be read ({reason}); delete {path} and make the index again") from None


def build_model(model: Mapping[str, Any]) -> Embedder:
    """Build the model that an index's options name.

    Raises:
        UserError: If its checkpoint or its weights are missing or fit no known architecture.
    """
    if model["ckpt"] is not None:
        return load_embedder(Path(model["ckpt"]), model["scales"])
    return build_embedder(**{name: model[name] for name in OF_THE_MODEL})


def _check(arguments: Mapping[str, Any]) -> None:
    defaults = {"backbone": "lite0_in", "weights": None, "pooling": "gem", "p": 3.0}
    changed = [name for name, default in defaults.items() if arguments[name] != default]
    if arguments["ckpt"] is not None and changed:
        raise UserError(f"--{changed[0]}: has no effect with --ckpt, which carries its model; leave it out")
    if "p" in changed and arguments["pooling"] != "gem":
        raise UserError(f"--p: has no effect with --pooling {arguments['pooling']}; leave it out")
    if (Path(arguments["output"]) / "index.json").exists():
        raise UserError(f"{arguments['output']}: holds an index already; name another folder, or delete it")
    left = Path(arguments["output"]) / APPROXIMATE
    if left.exists() and not arguments["approximate"]:
        raise UserError(f"{left}: is there, but --approximate is not given; give --approximate true, or delete it")


def _notes(
    embedder: Embedder, transform: PCAWhitening | None, whitening: str, whitening_dim: int | None, n_skipped: int
) -> list[str]:
    notes = []
    if embedder.backbone.provenance.source == RANDOM:
        notes.append("RANDOM WEIGHTS: the backbone was not trained, its answers mean nothing")
    if whitening == "pca" and whitening_dim is None:
        learned = cast(PCAWhitening, transform)
        if learned.dim < min(DEFAULT_DIM, embedder.dim):
            notes.append(
                f"whitened to {learned.dim} dimensions instead of {DEFAULT_DIM}: {learned.n:,} images support no more; "
                "with few, photos of other things look similar to something: compare with --whitening none, or take "
                "--whitening FILE of a larger museum"
            )
    if n_skipped:
        notes.append(f"{n_skipped:,} images are missing or cannot be decoded and were left out")
    return notes
