"""What training knows of its images: descriptors by the weights as they are now, views through a frozen backbone.

All of it lies in descriptor stores, so that a killed run continues. Every process must call these functions.
"""

import contextlib
import itertools
import shutil
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from metilr.data.ground_truth import GroundTruth
from metilr.data.views import images_of
from metilr.distributed import agree, hidden, leave_signals_to_the_parent
from metilr.errors import UserError
from metilr.evaluation.database import exhibit_differences, visit_differences
from metilr.evaluation.options import VISITS
from metilr.evaluation.runs import RUNS
from metilr.extraction.datamodule import ImageDataModule
from metilr.extraction.describe import describe_in_training, store_settings
from metilr.extraction.store import CHUNK_ROWS, DescriptorStore, row_chunks, settings_fingerprint
from metilr.metrics import DISTRACTOR
from metilr.models.embedder import Embedder, Projector
from metilr.retrieval.knn import Predictions, classify, with_skipped
from metilr.retrieval.search import search
from metilr.retrieval.whitening import fit_learned_whitening, fit_pca_whitening
from metilr.training.augmentations import SimulatedVisit, Views
from metilr.training.datamodule import PairDataModule

VIEWS = RUNS / "views"
SPLIT = "views"  # the only one of a store of views: view v of row r at r * n_views + v


def describe_current(trainer: pl.Trainer, embedder: Embedder, data: PairDataModule) -> DescriptorStore:
    """Describe database and val at one scale, in float32; what these weights have described already stays.

    With ``cache_views`` the frozen backbone describes once, and the projector alone from then on.

    Raises:
        UserError: In all processes, if one of them met an image that cannot be decoded or described.
    """
    if not data.cache_views:
        return _describe(trainer, single_scale(embedder), data, data.folder / "descriptors")
    pooled = _describe(trainer, single_scale(embedder, projector=False), data, data.folder / "pooled")
    return pooled if embedder.projector is None else _project(trainer, single_scale(embedder), data, pooled)


def single_scale(embedder: Embedder, projector: bool = True) -> Embedder:
    """The same modules, describing images at their own size alone; without the projector if asked for."""
    return Embedder(embedder.backbone, embedder.pooling, embedder.projector if projector else None, scales=(1.0,))


def _describe(trainer: pl.Trainer, embedder: Embedder, data: PairDataModule, folder: Path) -> DescriptorStore:
    store, truth = DescriptorStore(folder), data.ground_truth
    images = ImageDataModule(
        images_of(truth, data.image_size), data.sizes, store, data.extraction_batch_size, data.workers, data.bad_images
    )
    with agree(trainer):
        if trainer.is_global_zero:
            _prepare(store, embedder, data)
    describe_in_training(trainer, embedder, images)
    return store


def _prepare(store: DescriptorStore, embedder: Embedder, data: PairDataModule) -> None:
    """Begin a store of these weights; that of others goes."""
    settings = store_settings(embedder, data.ground_truth, data.image_size, "32")
    counts = {split: len(paths) for split, paths in data.ground_truth.paths.items()}
    is_a_store = (store.path / "manifest.json").exists()  # not after a kill in the middle of the removal
    if store.path.exists() and not (is_a_store and store.manifest()["settings"] == settings):
        (store.path / "manifest.json").unlink(missing_ok=True)  # first: half a store must not pass for whole
        shutil.rmtree(store.path)
    store.prepare(settings, counts, embedder.dim)


def _project(trainer: pl.Trainer, embedder: Embedder, data: PairDataModule, pooled: DescriptorStore) -> DescriptorStore:
    """Describe from pooled vectors."""
    store, device = DescriptorStore(data.folder / "descriptors"), trainer.strategy.root_device
    with agree(trainer):
        if trainer.is_global_zero:
            _prepare(store, embedder, data)
    is_done = store.is_complete
    with agree(trainer), contextlib.closing(store.writer()) as writer, torch.inference_mode():
        for split in [] if is_done else data.ground_truth.paths:
            files, vectors = pooled.files(split), pooled.descriptors(split)
            rows = np.flatnonzero(files > 0)
            for start in range(0, len(rows), CHUNK_ROWS)[trainer.global_rank :: trainer.world_size]:
                chunk = rows[start : start + CHUNK_ROWS]
                projected = embedder.project(torch.from_numpy(vectors[chunk]).to(device)).cpu().numpy()
                for row, descriptor in zip(chunk.tolist(), projected, strict=True):
                    writer.write(split, row, descriptor, int(files[row]))
    with agree(trainer):
        if trainer.is_global_zero and not is_done:
            store.finish()
    return store


def answer_val(store: DescriptorStore, truth: GroundTruth, positions: np.ndarray) -> Predictions:
    """Answer val queries, by position ``(Q,)``, by their nearest neighbour: k = 1, tau = 1, no whitening."""
    rows, is_valid = np.flatnonzero(store.is_valid("database")), store.is_valid("val")[positions]
    database: np.ndarray = store.descriptors("database")
    database = database if len(rows) == len(database) else database[rows]
    neighbours = search(database, store.descriptors("val")[positions[is_valid]], 1)
    predictions = classify(neighbours, truth.labels["database"][rows], truth.n_classes, k=1, tau=1.0)
    return with_skipped(predictions, ~is_valid)


def whitening_start(
    trainer: pl.Trainer, embedder: Embedder, data: PairDataModule, dim: int, is_learned: bool
) -> dict[str, Tensor]:
    """State of a projector that whitens, by PCA, or as learned from simulated visits of the images.

    The visits are of the size and strength of ``second_view``, if that simulates them.

    Raises:
        UserError: If the database does not support ``dim``; names it ``projector_dim``.
    """
    store, visits = describe_current(trainer, single_scale(embedder, projector=False), data), None
    if is_learned:
        visit = data.second_view if isinstance(data.second_view, SimulatedVisit) else SimulatedVisit()
        visits = cached_views(trainer, embedder, data.views(visit), VISITS, data.batch_pairs, data.workers)
    state: dict[str, Tensor] | None = None
    with agree(trainer):
        if trainer.is_global_zero:
            database, is_valid = [store.descriptors("database")], store.is_valid("database")
            try:
                if visits is None:
                    whitening = fit_pca_whitening(row_chunks(database, is_valid), dim)
                else:
                    labels = np.where(is_valid, data.ground_truth.labels["database"], DISTRACTOR)
                    of_visits = visit_differences(database, [visits], is_valid)
                    pairs = itertools.chain(of_visits, exhibit_differences(database, labels))
                    whitening = fit_learned_whitening(row_chunks(database, is_valid), pairs, dim)
            except UserError as error:
                parameter = "projector_dim" if error.parameter == "dim" else error.parameter
                raise UserError(error.message, parameter) from None
            mean, projection = torch.from_numpy(whitening.mean), torch.from_numpy(whitening.projection)
            state = Projector.from_whitening(mean, projection).state_dict()
    state = trainer.strategy.broadcast(state)
    assert state is not None
    return state


def cached_views(
    trainer: pl.Trainer, embedder: Embedder, views: Views, n_views: int, batch_size: int, num_workers: int
) -> np.ndarray:
    """Unit-length pooled vectors of the first ``n_views`` views of each image, ``(N * n_views, width)``, memory-mapped.

    They are made once and kept under ``runs/views``: another run with the same backbone and views reuses them.
    """
    pooled = single_scale(embedder, projector=False).to(trainer.strategy.root_device)
    model = pooled.describe_settings()
    del model["provenance"]
    images = {"names": list(views.names), "sizes": [file.stat().st_size for file in views.files]}
    settings = {
        "model": model, "view": views.augmentation.settings(), "n_views": n_views, "seed": views.seed,
        "images": settings_fingerprint(images),
    }  # fmt: skip
    store = DescriptorStore(VIEWS / f"{embedder.backbone.name.replace('/', '_')}-{settings_fingerprint(settings)}")
    n = len(views.files) * n_views
    with contextlib.ExitStack() as held:
        with agree(trainer):
            if trainer.is_global_zero:
                store.prepare(settings, {SPLIT: n}, pooled.dim)
                if not store.is_complete:
                    held.enter_context(store.alone())
        pending = np.flatnonzero(store.pending(SPLIT, np.ones(n, dtype=np.int64), retry_bad=True))
        trainer.strategy.barrier()  # nobody writes before all have looked
        batches = [pending[i : i + batch_size] for i in range(0, len(pending), batch_size)]
        mine = batches[trainer.global_rank :: trainer.world_size]
        loader = DataLoader(
            _ViewBatches(views, n_views, mine), batch_size=None, num_workers=min(num_workers, len(mine)),
            worker_init_fn=leave_signals_to_the_parent,
        )  # fmt: skip
        with agree(trainer), contextlib.closing(store.writer()) as writer, torch.inference_mode():
            bar = tqdm(loader, "caching views", unit="batch", leave=False, disable=hidden(trainer))
            for numbers, batch in zip(mine, bar, strict=True):
                vectors = pooled(pooled.normalise(batch.to(trainer.strategy.root_device))).float().cpu().numpy()
                for row, vector in zip(numbers.tolist(), vectors, strict=True):
                    writer.write(SPLIT, row, vector, 1)
        with agree(trainer):
            if trainer.is_global_zero and not store.is_complete:
                store.finish()
    return store.descriptors(SPLIT)


class _ViewBatches(Dataset[Tensor]):
    def __init__(self, views: Views, n_views: int, batches: list[np.ndarray]) -> None:
        self.views, self.n_views, self.batches = views, n_views, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int) -> Tensor:
        return self.views(*np.divmod(self.batches[i], self.n_views))
