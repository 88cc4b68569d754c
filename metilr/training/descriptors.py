"""The fast path of a frozen backbone: pooled vectors of a fixed number of views per image, computed once, on disk."""

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from metilr.data.ground_truth import GroundTruth
from metilr.data.views import images_of
from metilr.distributed import agree, hidden, leave_signals_to_the_parent
from metilr.errors import UserError
from metilr.evaluation.run_folder import RUNS
from metilr.extraction.callbacks import write_rows
from metilr.extraction.datamodule import BadImages, ImageDataModule
from metilr.extraction.describe import store_settings
from metilr.extraction.module import DescriptorModule
from metilr.extraction.store import CHUNK_ROWS, DescriptorStore, settings_fingerprint
from metilr.models.embedder import Embedder
from metilr.training.augmentations import Augmentation
from metilr.training.pair_dataset import ViewMaker


class CurrentDescriptors:
    """Single-scale descriptors, float32, of all images of a ground truth.

    Args:
        ground_truth: Names the images: database and val.
        sizes: File size of every image by split, from ``image_sizes``.
        folder: Where the store lies; replaced whenever the weights have changed.
        image_size: See ``load_image``.
        batch_size: Most images in a batch.
        num_workers: Decoding processes beside each process.
        bad_images: ``"stop"`` or ``"skip"``.
        keep_pooled: Keep what the frozen backbone makes of the images, so that only the projector runs again.
    """

    def __init__(
        self,
        ground_truth: GroundTruth,
        sizes: Mapping[str, np.ndarray],
        folder: Path,
        image_size: int | None,
        batch_size: int,
        num_workers: int,
        bad_images: BadImages,
        keep_pooled: bool = False,
    ) -> None:
        self.ground_truth = ground_truth
        self.store = DescriptorStore(folder)
        self._pooled: CurrentDescriptors | None = None
        if keep_pooled:
            self._pooled = CurrentDescriptors(
                ground_truth, sizes, folder.with_name("pooled"), image_size, batch_size, num_workers, bad_images
            )
        self.image_size = image_size
        images = images_of(ground_truth, image_size)
        self._data = ImageDataModule(images, sizes, self.store, batch_size, num_workers, bad_images)

    def describe(self, trainer: pl.Trainer, embedder: Embedder) -> DescriptorStore:
        """Fill the store, or find it filled: the same weights describe once. Every process must call it.

        Args:
            trainer: Knows the processes and their devices.
            embedder: The model; its own scales are left aside.

        Raises:
            UserError: In all processes, if one of them met an image that cannot be decoded or described.
        """
        single = single_scale(embedder).to(trainer.strategy.root_device)
        if self._pooled is not None and embedder.projector is None:
            return self._pooled.describe(trainer, embedder)
        if self._pooled is not None:
            return self._project(
                trainer, single, self._pooled.describe(trainer, single_scale(embedder, projector=False))
            )
        data = self._data
        data.trainer = trainer
        with agree(trainer):
            if trainer.is_global_zero:
                self._prepare(single)
                data.plan = data.make_plan()
        data.plan = trainer.strategy.broadcast(data.plan)
        with agree(trainer):
            if data.plan:
                self._fill(trainer, single)
        with agree(trainer):  # all rows are there now
            if trainer.is_global_zero and not self.store.manifest()["complete"]:
                if len(data.pending_rows()):
                    raise UserError(f"{self.store.path}: image files changed during the run; run again")
                self.store.finish()
        return self.store

    def _project(self, trainer: pl.Trainer, single: Embedder, pooled: DescriptorStore) -> DescriptorStore:
        """Fill the store from pooled vectors."""
        with agree(trainer):
            if trainer.is_global_zero:
                self._prepare(single)
        done = self.store.manifest()["complete"]
        with agree(trainer):
            writer = self.store.writer()
            try:
                for split in [] if done else self.ground_truth.paths:
                    files, vectors = pooled.files(split), pooled.rows(split)
                    rows = np.flatnonzero(files > 0)
                    starts = range(0, len(rows), CHUNK_ROWS)[trainer.global_rank :: trainer.world_size]
                    for chunk in (rows[start : start + CHUNK_ROWS] for start in starts):
                        with torch.inference_mode():
                            on_device = torch.from_numpy(vectors[chunk]).to(trainer.strategy.root_device)
                            projected = single.project(on_device).cpu().numpy()
                        for row, descriptor in zip(chunk.tolist(), projected, strict=True):
                            writer.write(split, row, descriptor, int(files[row]))
            finally:
                writer.close()
        with agree(trainer):
            if trainer.is_global_zero and not done:
                self.store.finish()
        return self.store

    def _prepare(self, single: Embedder) -> None:
        settings = store_settings(single, self.ground_truth, self.image_size, "32")
        counts = {split: len(paths) for split, paths in self.ground_truth.paths.items()}
        is_a_store = (self.store.path / "manifest.json").exists()  # not after a kill in the middle of the removal
        if self.store.path.exists() and not (is_a_store and self.store.manifest()["settings"] == settings):
            (self.store.path / "manifest.json").unlink(missing_ok=True)  # first: half a store must not pass for whole
            shutil.rmtree(self.store.path)
        self.store.prepare(settings, counts, single.dim)

    def _fill(self, trainer: pl.Trainer, single: Embedder) -> None:
        module = DescriptorModule(single).to(trainer.strategy.root_device)
        module.on_predict_start()
        batches = self._data.predict_dataloader()
        writer = self.store.writer()
        try:
            with (
                torch.inference_mode(),
                tqdm(total=sum(len(batch.rows) for batch in self._data.share()),
                     desc="describing images", unit="image", leave=False, disable=hidden(trainer)) as bar,
            ):  # fmt: skip
                for batch in batches:
                    on_device = batch._replace(images=batch.images.to(trainer.strategy.root_device))
                    write_rows(writer, self._data, batch, module.describe(on_device))
                    bar.update(len(batch.rows) + len(batch.bad))
        finally:
            writer.close()


def single_scale(embedder: Embedder, projector: bool = True) -> Embedder:
    """The same modules, describing images at their own size alone; without the projector if asked for."""
    return Embedder(embedder.backbone, embedder.pooling, embedder.projector if projector else None, scales=(1.0,))


VIEWS = RUNS / "views"
SPLIT = "views"  # the store's only one: view v of row r at r * n_views + v


class ViewCache:
    """Makes and finds the vectors; a killed run continues, another run with the same settings reuses them.

    Args:
        views: Makes the images.
        n_views: Views per image.
        batch_size: Views in a batch.
        num_workers: Decoding processes beside each process.
    """

    def __init__(self, views: ViewMaker, n_views: int, batch_size: int, num_workers: int) -> None:
        self.views, self.n_views = views, n_views
        self.batch_size, self.num_workers = batch_size, num_workers

    def vectors(self, trainer: pl.Trainer, embedder: Embedder, augmentation: Augmentation) -> np.ndarray:
        """Unit-length pooled vectors of all views by one augmentation, ``(N * n_views, width)``, memory-mapped.

        Every process must call it.
        """
        pooled = Embedder(embedder.backbone, embedder.pooling, None, scales=(1.0,)).to(trainer.strategy.root_device)
        model = pooled.describe_settings()
        del model["provenance"]
        names = settings_fingerprint({"names": list(self.views.names), "sizes": self._file_sizes()})
        settings = {
            "model": model, "view": augmentation.settings(), "n_views": self.n_views, "seed": self.views.seed,
            "images": names,
        }  # fmt: skip
        store = DescriptorStore(VIEWS / f"{embedder.backbone.name.replace('/', '_')}-{settings_fingerprint(settings)}")
        n = len(self.views.files) * self.n_views
        with contextlib.ExitStack() as held:
            with agree(trainer):
                if trainer.is_global_zero:
                    store.prepare(settings, {SPLIT: n}, pooled.dim)
                    if not store.manifest()["complete"]:
                        held.enter_context(store.alone())
            pending = np.flatnonzero(store.pending(SPLIT, np.ones(n, dtype=np.int64), retry_bad=True))
            trainer.strategy.barrier()  # nobody writes before all have looked
            with agree(trainer):
                self._fill(trainer, pooled, augmentation, store, pending)
            with agree(trainer):
                if trainer.is_global_zero and not store.manifest()["complete"]:
                    store.finish()
        return store.rows(SPLIT)

    def _fill(
        self,
        trainer: pl.Trainer,
        pooled: Embedder,
        augmentation: Augmentation,
        store: DescriptorStore,
        pending: np.ndarray,
    ) -> None:
        batches = [pending[i : i + self.batch_size] for i in range(0, len(pending), self.batch_size)]
        mine = batches[trainer.global_rank :: trainer.world_size]
        if not mine:
            return
        loader = DataLoader(
            _Views(self.views, augmentation, self.n_views, mine),
            batch_size=None,
            num_workers=min(self.num_workers, len(mine)),
            worker_init_fn=leave_signals_to_the_parent,
        )
        writer = store.writer()
        try:
            with torch.inference_mode():
                for i, images in enumerate(
                    tqdm(
                        loader,
                        "caching views",
                        unit="batch",
                        leave=False,
                        disable=None if trainer.is_global_zero else True,
                    )
                ):
                    vectors = pooled(pooled.normalise(images.to(trainer.strategy.root_device))).float().cpu().numpy()
                    for row, vector in zip(mine[i].tolist(), vectors, strict=True):
                        writer.write(SPLIT, row, vector, 1)
        finally:
            writer.close()

    def _file_sizes(self) -> list[int]:
        return [Path(file).stat().st_size for file in self.views.files]


class _Views(Dataset[torch.Tensor]):
    def __init__(self, views: ViewMaker, augmentation: Augmentation, n_views: int, batches: list[np.ndarray]) -> None:
        self.views, self.augmentation, self.n_views, self.batches = views, augmentation, n_views, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int) -> torch.Tensor:
        numbers = self.batches[i].tolist()
        return torch.stack([self.views.view(n // self.n_views, n % self.n_views, self.augmentation) for n in numbers])
