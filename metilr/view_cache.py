"""The fast path of a frozen backbone: pooled vectors of a fixed number of views per image, computed once, on disk."""

import contextlib
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from metilr.data.augmentations import Augmentation
from metilr.data.pair_dataset import ViewMaker
from metilr.data.workers import leave_signals_to_the_parent
from metilr.descriptors import DescriptorStore, settings_fingerprint
from metilr.models.embedder import Embedder
from metilr.processes import agree
from metilr.run_folder import RUNS

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
