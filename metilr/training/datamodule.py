"""The training data: pairs drawn anew for each epoch, val to validate on, and their descriptors by the current weights.

Descriptors and views through a frozen backbone lie in descriptor stores, so that a killed run continues. What makes
them is called in every process.
"""

import contextlib
import itertools
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, cast

import faiss
import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from typing_extensions import override

from metilr.data.decode import limit_images, load_image
from metilr.data.folder import find_images
from metilr.data.ground_truth import load_ground_truth
from metilr.data.views import images_of
from metilr.demo import DEMO, make_demo
from metilr.distributed import agree, default_workers, hidden, start_worker
from metilr.errors import UserError
from metilr.evaluation.database import exhibit_differences, visit_differences
from metilr.evaluation.options import VISITS
from metilr.evaluation.runs import RUNS
from metilr.extraction.datamodule import ImageDataModule
from metilr.extraction.describe import describe_in_training, image_sizes, require_images, store_settings
from metilr.extraction.store import DescriptorStore, row_chunks, settings_fingerprint
from metilr.metrics import DISTRACTOR
from metilr.models import UnfitSizeError
from metilr.models.embedder import Embedder, Projector
from metilr.progress import MinuteLines
from metilr.retrieval.knn import Predictions, classify, with_skipped
from metilr.retrieval.search import SearchDevice, search
from metilr.retrieval.whitening import fit_learned_whitening, fit_pca_whitening
from metilr.training import PairOptions
from metilr.training.augmentations import Augmentation, SimulatedVisit, Views
from metilr.training.pairs import PairBatch, deal_batches, draw_pairs, make_batch

VIEWS = RUNS / "views"
SPLIT = "views"  # the only one of a store of views: view v of row r at r * n_views + v


def single_scale(embedder: Embedder, projector: bool = True) -> Embedder:
    """The same modules, describing images at their own size alone; without the projector if asked for."""
    return Embedder(embedder.backbone, embedder.pooling, embedder.projector if projector else None, scales=(1.0,))


class PairDataModule(pl.LightningDataModule):
    """Pairs of database images, and val. The test split is never read.

    ``descriptors`` of database and val, by split, are of the weights as they are now, once described; ``is_valid`` says
    which rows have one.
    """

    trainer: pl.Trainer

    def __init__(self, options: PairOptions, seed: int, folder: Path) -> None:
        super().__init__()
        self.options, self.seed, self.folder = options, seed, folder

    @override
    def prepare_data(self) -> None:
        if self.options.root is None:
            make_demo(DEMO)

    @override
    def setup(self, stage: str) -> None:
        """Read the ground truth of database and val, and refuse what cannot be trained on."""
        options = self.options
        limit_images(options.max_megapixels)
        truth = self.ground_truth = load_ground_truth(options.root or DEMO, options.database, queries=("val",))
        self.paths, self.sizes = truth.paths, image_sizes(truth)
        require_images(truth, self.sizes, options.bad_images)
        if options.has_negatives and truth.n_classes < 2:
            raise UserError(f"{options.pairing}: negatives need at least two exhibits, here is one; use syn", "pairing")
        self.workers = default_workers(self.trainer.num_devices) if options.num_workers is None else options.num_workers
        self.first_views, self.second_views = self._views(options.first_view), self._views(options.second_view)
        usable = truth.labels["database"][self.sizes["database"] > 0]
        n_anchors = options.anchors_per_epoch or len(np.unique(usable) if options.balance else usable)
        self.n_pairs = n_anchors * (2 if options.has_negatives else 1)  # fewer where images turn out to be bad
        self.n_batches = len(deal_batches(self.n_pairs, options.batch_pairs, 0, self.trainer.world_size))

    def steps_per_epoch(self) -> int:
        """Steps of the optimizer in an epoch."""
        limit, n_batches = self.trainer.limit_train_batches, self.n_batches  # a share if a float
        n_batches = min(n_batches, limit) if isinstance(limit, int) else int(n_batches * limit)
        return max(1, -(-n_batches // self.trainer.accumulate_grad_batches))

    def _views(self, augmentation: Augmentation) -> Views:
        paths = self.paths["database"]
        return Views([self.ground_truth.image(path) for path in paths], paths, self.seed, augmentation)

    @override
    def train_dataloader(self) -> Iterable[PairBatch]:
        """Draw the epoch's pairs in the first process, tell them to the others, and give this one its part."""
        trainer, options, labels, pairs = self.trainer, self.options, self.ground_truth.labels["database"], None
        on_gpu = trainer.strategy.root_device.type == "cuda"
        with agree(trainer):
            if trainer.is_global_zero:
                rows, descriptors = np.arange(len(labels)), None
                if options.needs_descriptors:
                    rows, descriptors = np.flatnonzero(self.is_valid["database"]), self.descriptors["database"]
                device: SearchDevice = "gpu" if on_gpu and faiss.get_num_gpus() > 0 else "cpu"
                pairs = draw_pairs(rows, labels, descriptors, options, trainer.current_epoch, self.seed, device)
        pairs = trainer.strategy.broadcast(pairs)
        assert pairs is not None
        self.pairs = pairs
        batches: Any = deal_batches(len(pairs), options.batch_pairs, trainer.global_rank, trainer.world_size)
        views: Any = self.cached_views if options.cache_views else (self.first_views, self.second_views)
        return DataLoader(  # of whole batches, so that it must not batch again
            batches, batch_size=None, collate_fn=partial(make_batch, pairs, labels, *views),
            num_workers=0 if options.cache_views else min(self.workers, len(batches)),
            worker_init_fn=start_worker, pin_memory=on_gpu,
        )  # fmt: skip

    @override
    def val_dataloader(self) -> Iterable[Tensor]:
        """This process's share of the val queries, in one batch: their positions, int64 ``(Q,)``."""
        positions = np.arange(len(self.paths["val"]))
        mine: Any = [positions[self.trainer.global_rank :: self.trainer.world_size]]
        return DataLoader(mine, batch_size=None)

    def classify_val(self, positions: np.ndarray, rows: tuple[np.ndarray, np.ndarray] | None = None) -> Predictions:
        """Classify val queries, by position ``(Q,)``, by the nearest image: k = 1, tau = 1, no whitening.

        Or by the nearest of other ``rows`` ``(M, D)``, with their labels, of exhibits that have an image.
        """
        is_valid, (database, labels) = self.is_valid["val"][positions], self.rows()
        if rows is not None:
            database, labels = (each[np.isin(rows[1], labels)] for each in rows)
        neighbours = search(database, self.descriptors["val"][positions[is_valid]], 1)
        return with_skipped(classify(neighbours, labels, self.ground_truth.n_classes, k=1, tau=1.0), ~is_valid)

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Descriptors of the database images that have one, and their labels."""
        database, labels = self.descriptors["database"], self.ground_truth.labels["database"]
        rows = np.flatnonzero(self.is_valid["database"])
        return (database, labels) if len(rows) == len(database) else (database[rows], labels[rows])

    def check_sizes(self, embedder: Embedder) -> None:
        """Refuse views, and an image size for validation, that are too small for the network."""
        described = single_scale(embedder)
        described.check_image_size(self.options.image_size)
        for name in ("first_view", "second_view"):
            size = getattr(self.options, name).size
            try:
                described.check_size(size, size)
            except UnfitSizeError as error:
                raise UserError(f"{size}: {error}", f"{name}.size") from None

    def describe(self, embedder: Embedder) -> None:
        """Describe database and val at one scale, in float32; what these weights have described already stays.

        With ``cache_views`` the frozen backbone describes once, and the projector alone from then on.
        """
        options, trainer, is_frozen = self.options, self.trainer, self.options.cache_views
        described = single_scale(embedder, projector=not is_frozen)
        store = DescriptorStore(self.folder / ("pooled" if is_frozen else "descriptors"))
        self.descriptors: dict[str, np.ndarray] = {}  # let go of files that may be removed
        trainer.strategy.barrier()
        with agree(trainer):
            if trainer.is_global_zero:
                settings = store_settings(described, self.ground_truth, options.image_size, "32")
                if store.path.exists() and not (store.exists and store.manifest().settings == settings):
                    (store.path / "manifest.json").unlink(missing_ok=True)  # half a store must not pass for whole
                    shutil.rmtree(store.path)
                store.prepare(settings, {split: len(paths) for split, paths in self.paths.items()}, described.dim)
        images = images_of(self.ground_truth, options.image_size)
        batch_size, bad_images = options.extraction_batch_size, options.bad_images
        data = ImageDataModule(images, self.sizes, store, batch_size, self.workers, bad_images, described.check_size)
        describe_in_training(trainer, described, data)
        self.is_valid = {split: store.is_valid(split) for split in self.paths}
        self.descriptors = {split: store.descriptors(split) for split in self.paths}
        if is_frozen and embedder.projector is not None:
            for split, pooled in self.descriptors.items():
                chunks = row_chunks([pooled], self.is_valid[split])  # all are, where views are cached
                projected = [_on_device(embedder, embedder.project, torch.from_numpy(chunk)) for chunk in chunks]
                self.descriptors[split] = np.concatenate(projected)

    def whitening_start(self, embedder: Embedder, is_learned: bool) -> dict[str, Tensor]:
        """State of the projector that whitens, by PCA, or as learned from simulated visits of the images.

        The visits are of the size and strength of ``second_view``, if that simulates them.
        """
        self.describe(single_scale(embedder, projector=False))
        database, is_valid = [self.descriptors["database"]], self.is_valid["database"]
        if is_learned:
            view = self.options.second_view
            visits = self.cached(embedder, view if isinstance(view, SimulatedVisit) else SimulatedVisit(), VISITS)
        state: dict[str, Tensor] | None = None
        with agree(self.trainer):
            if self.trainer.is_global_zero:
                chunks = row_chunks(database, is_valid)
                if not is_learned:
                    whitening = fit_pca_whitening(chunks, embedder.dim)
                else:
                    labels = np.where(is_valid, self.ground_truth.labels["database"], DISTRACTOR)
                    of_visits = visit_differences(database, [visits], is_valid)
                    pairs = itertools.chain(of_visits, exhibit_differences(database, labels))
                    whitening = fit_learned_whitening(chunks, pairs, embedder.dim)
                mean, projection = torch.from_numpy(whitening.mean), torch.from_numpy(whitening.projection)
                state = Projector.from_whitening(mean, projection).state_dict()
        state = self.trainer.strategy.broadcast(state)
        assert state is not None
        return state

    def cache_views(self, embedder: Embedder) -> None:
        """Compute all views through a frozen backbone once: they stay the same in all epochs."""
        n_views = self.options.n_views or 0

        def look_up(vectors: np.ndarray, rows: np.ndarray, numbers: np.ndarray) -> Tensor:
            return torch.from_numpy(np.array(vectors[rows * n_views + numbers]))

        both = self.options.first_view, self.options.second_view
        self.cached_views = [partial(look_up, self.cached(embedder, view, n_views)) for view in both]

    def cached(self, embedder: Embedder, augmentation: Augmentation, n_views: int) -> np.ndarray:
        """Unit-length pooled vectors of ``n_views`` views of each image, ``(N * n_views, width)``, memory-mapped.

        They are made once and kept under ``runs/views``: another run with the same backbone and views reuses them.
        """
        views, trainer = self._views(augmentation), self.trainer
        pooled = single_scale(embedder, projector=False).to(trainer.strategy.root_device)
        model = pooled.describe_settings()
        del model["provenance"]
        images = {"names": list(views.names), "sizes": [file.stat().st_size for file in views.files]}
        settings = {
            "model": model, "view": augmentation.settings(), "n_views": n_views, "seed": self.seed,
            "images": settings_fingerprint(images),
        }  # fmt: skip
        store = DescriptorStore(VIEWS / f"{embedder.backbone.name.replace('/', '_')}-{settings_fingerprint(settings)}")
        n, batch_size = len(views.files) * n_views, self.options.batch_pairs
        with contextlib.ExitStack() as held:
            with agree(trainer):
                if trainer.is_global_zero:
                    store.prepare(settings, {SPLIT: n}, pooled.dim)
                    if not store.is_complete:
                        held.enter_context(store.alone())
            pending = np.flatnonzero(store.pending(SPLIT, np.ones(n, dtype=np.int64), retry_bad=True))
            trainer.strategy.barrier()  # nobody writes before all have looked
            batches = [pending[i : i + batch_size] for i in range(0, len(pending), batch_size)]
            mine: Any = batches[trainer.global_rank :: trainer.world_size]
            loader = DataLoader(
                mine, batch_size=None, collate_fn=partial(_numbered, views, n_views),
                num_workers=min(self.workers, len(mine)), worker_init_fn=start_worker,
            )  # fmt: skip
            with agree(trainer), contextlib.closing(store.writer()) as writer:
                bar = tqdm(loader, "caching views", unit="batch", leave=False, disable=hidden(trainer))
                lines = MinuteLines("caching views", len(mine), "batches", quiet=not trainer.is_global_zero)
                for numbers, batch in zip(mine, bar, strict=True):
                    vectors = _on_device(pooled, lambda images: pooled(pooled.normalise(images)).float(), batch)
                    for row, vector in zip(numbers.tolist(), vectors, strict=True):
                        writer.write(SPLIT, row, vector, 1)
                    lines.advance(1)
            with agree(trainer):  # all have written theirs
                if trainer.is_global_zero and not store.is_complete:
                    store.finish()
        return store.descriptors(SPLIT)


class FolderData(pl.LightningDataModule):
    """A folder's images, to predict on: ``trainer.predict(module, datamodule=FolderData(path))``.

    Batches are of one image, RGB, uint8 ``(1, 3, H, W)``, since images differ in size, in the order of ``files``: the
    folder's with its sub-folders'. Their longest side is resized to ``image_size`` px; None: as they are.
    """

    def __init__(self, folder: str | Path, image_size: int | None = None, num_workers: int = 0) -> None:
        super().__init__()
        self.files = find_images(Path(folder)).files
        self.image_size, self.num_workers = image_size, num_workers

    @override
    def predict_dataloader(self) -> Iterable[Tensor]:
        """Decode one image after another; BadImageError, which names it, at one that cannot be."""
        load, files = partial(_batch_of_one, self.image_size), cast(Any, self.files)
        return DataLoader(files, batch_size=1, collate_fn=load, num_workers=self.num_workers, shuffle=False)


def _batch_of_one(image_size: int | None, files: list[Path]) -> Tensor:
    return load_image(files[0], image_size)[None]


def _numbered(views: Views, n_views: int, numbers: np.ndarray) -> Tensor:
    return views(*np.divmod(numbers, n_views))


@torch.inference_mode()
def _on_device(embedder: Embedder, function: Callable[[Tensor], Tensor], batch: Tensor) -> np.ndarray:
    return function(batch.to(embedder.mean.device)).cpu().numpy()
