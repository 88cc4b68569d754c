"""The training data: database images in pairs that are drawn anew for each epoch, and val to validate on."""

import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import faiss
import numpy as np
from jsonargparse import lazy_instance  # type: ignore[attr-defined]
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from metilr.data.decode import MAX_MEGAPIXELS, limit_images
from metilr.data.ground_truth import (
    DatabaseName,
    GroundTruth,
    image_sizes,
    load_ground_truth,
    require_images,
    require_some_images,
)
from metilr.demo import DEMO, make_demo
from metilr.distributed import agree, default_workers, leave_signals_to_the_parent
from metilr.errors import UserError
from metilr.evaluation.run_folder import RUNS
from metilr.extraction.datamodule import BadImages
from metilr.models.embedder import Embedder
from metilr.training.augmentations import Augmentation, RandomCrop, SimulatedVisit
from metilr.training.descriptors import CurrentDescriptors, ViewCache
from metilr.training.pair_dataset import CachedPairDataset, PairBatch, PairDataset, ViewMaker
from metilr.training.pairs import Pairing, Pairs, deal_batches, draw_pairs, needs_descriptors


class PairDataModule(LightningDataModule):
    """Pairs of database images. The test split is never read.

    Args:
        root: Folder with images/ and ground_truth/ in the Met layout; without it the built-in demo museum, which
            is synthetic.
        database: Train on MET_database.json (full) or mini_MET_database.json (mini).
        pairing: syn: two views of one image. syn+neg: and a hard negative per image, mined each epoch.
            syn+real+neg: the positive is another image of the exhibit, where there is one. syn+real-closest+neg:
            the image itself or its most similar fellow.
        first_view: Augmentation of the first image of a pair: RandomCrop, PublishedAugmentation or SimulatedVisit.
        second_view: Augmentation of the second.
        batch_pairs: Pairs in a batch, over all processes together.
        anchors_per_epoch: Images that are anchors in an epoch; without it each once. More than there are: several
            rounds, for small museums.
        n_views: Draw views from so many fixed ones per image; without it each view of the run is a new one.
        cache_views: Compute the n_views of each image through the frozen backbone once, keep them on disk and train
            from them.
        image_size: Resize database and val images for mining and validation so that the longest side has this many
            px; without it as they are.
        extraction_batch_size: Most images in a batch of mining and validation.
        num_workers: Decoding processes beside each process; without it as many as cores are free, at most 8.
        bad_images: Stop at an image that cannot be decoded, or skip it.
        max_megapixels: An image of more is bad; its header tells, before anything is decoded.
        seed: Set by --seed_everything.

    Raises:
        UserError: If an option is out of range or does not go with another.
    """

    def __init__(
        self,
        root: Path | None = None,
        database: DatabaseName = "full",
        pairing: Pairing = "syn",
        first_view: Augmentation = lazy_instance(RandomCrop),  # noqa: B008 (made anew for each data module)
        second_view: Augmentation = lazy_instance(SimulatedVisit),  # noqa: B008
        batch_pairs: int = 24,
        anchors_per_epoch: int | None = None,
        n_views: int | None = None,
        cache_views: bool = False,
        image_size: int | None = None,
        extraction_batch_size: int = 32,
        num_workers: int | None = None,
        bad_images: BadImages = "stop",
        max_megapixels: float = MAX_MEGAPIXELS,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name in ("batch_pairs", "anchors_per_epoch", "n_views", "image_size", "extraction_batch_size"):
            value = locals()[name]
            if value is not None and value < 1:
                raise UserError(f"--data.{name} {value}: must be at least 1")
        if cache_views and n_views is None:
            raise UserError("--data.cache_views: needs --data.n_views, the number of views to keep of each image")
        if cache_views and bad_images == "skip":
            raise UserError("--data.bad_images skip: not with --data.cache_views; mend the images or leave one out")
        self.root = root
        self.database = database
        self.pairing = pairing
        self.first_view = first_view
        self.second_view = second_view
        self.batch_pairs = batch_pairs
        self.anchors_per_epoch = anchors_per_epoch
        self.n_views = n_views
        self.cache_views = cache_views
        self.image_size = image_size
        self.extraction_batch_size = extraction_batch_size
        self.num_workers = num_workers
        self.bad_images = bad_images
        self.max_megapixels = max_megapixels
        self.seed = seed
        self.folder = RUNS / "training"  # of the descriptors of the day; the command names the run's own
        self.ground_truth: GroundTruth | None = None
        self.pairs: Pairs | None = None
        self._vectors: list[np.ndarray] | None = None

    @override
    def prepare_data(self) -> None:
        """Draw the demo museum where no data root is given."""
        if self.root is None:
            make_demo(DEMO)

    @override
    def setup(self, stage: str) -> None:
        """Read the ground truth of database and val, and refuse what cannot be trained on.

        Raises:
            UserError: If the data is missing, malformed or too small for the options.
        """
        assert self.trainer is not None
        if self.ground_truth is not None:
            return
        limit_images(self.max_megapixels)
        root = DEMO if self.root is None else self.root
        truth = load_ground_truth(root, self.database, queries=("val",))
        sizes = image_sizes(truth)
        (require_images if self.bad_images == "stop" else require_some_images)(truth, sizes)
        if needs_descriptors(self.pairing) and truth.n_classes < 2:
            raise UserError(
                f"--data.pairing {self.pairing}: negatives need at least two exhibits, {root} has one; use syn"
            )
        if self.cache_views and not self.trainer.lightning_module.freeze_backbone:
            raise UserError("--data.cache_views: needs a frozen backbone; give --model.freeze_backbone true")
        workers = default_workers(self.trainer.num_devices) if self.num_workers is None else self.num_workers
        self.workers = workers
        self.ground_truth = truth
        files = [truth.image(path) for path in truth.paths["database"]]
        self.views = ViewMaker(files, truth.paths["database"], self.seed)
        self.current = CurrentDescriptors(
            truth,
            sizes,
            self.folder / "descriptors",
            self.image_size,
            self.extraction_batch_size,
            workers,
            self.bad_images,
            keep_pooled=self.cache_views,
        )
        self.n_usable = int((sizes["database"] > 0).sum())
        deal_batches(self.n_pairs, self.batch_pairs, 0, self.trainer.world_size)

    @property
    def n_pairs(self) -> int:
        """Pairs of an epoch (fewer where images turn out to be bad)."""
        return (self.anchors_per_epoch or self.n_usable) * (2 if self.pairing.endswith("+neg") else 1)

    @property
    def n_batches(self) -> int:
        """Batches of an epoch."""
        return -(-self.n_pairs // self.batch_pairs)

    @override
    def train_dataloader(self) -> Iterable[PairBatch]:
        """Draw the epoch's pairs in the first process, tell them to the others, and give this one its part."""
        assert self.trainer is not None and self.ground_truth is not None
        with agree(self.trainer):
            pairs = self._draw() if not self._mines else None
        if self._mines:
            store = self.current.describe(self.trainer, self._embedder)
            with agree(self.trainer):
                if self.trainer.is_global_zero:
                    pairs = self._draw(np.asarray(store.rows("database")), store.made("database"))
        self.pairs = pairs = typing.cast(Pairs, self.trainer.strategy.broadcast(pairs))
        batches = deal_batches(len(pairs), self.batch_pairs, self.trainer.global_rank, self.trainer.world_size)
        dataset = self._dataset(pairs, batches)
        workers = 0 if self.cache_views else min(self.workers, len(batches))
        return DataLoader(
            dataset,
            batch_size=None,
            num_workers=workers,
            worker_init_fn=leave_signals_to_the_parent,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
        )

    @property
    def _embedder(self) -> Embedder:
        assert self.trainer is not None
        return typing.cast(Embedder, self.trainer.lightning_module.embedder)

    @property
    def _mines(self) -> bool:
        return needs_descriptors(self.pairing) or self.bad_images == "skip"

    def _draw(self, descriptors: np.ndarray | None = None, made: np.ndarray | None = None) -> Pairs:
        assert self.trainer is not None and self.ground_truth is not None
        labels = self.ground_truth.labels["database"]
        rows = np.arange(len(labels)) if made is None else np.flatnonzero(made)
        return draw_pairs(
            rows,
            labels,
            self.pairing,
            descriptors,
            n_anchors=self.anchors_per_epoch,
            n_views=self.n_views,
            epoch=self.trainer.current_epoch,
            seed=self.seed,
            device=self._search_device,
        )

    @property
    def _search_device(self) -> Literal["cpu", "gpu"]:
        assert self.trainer is not None
        on_gpu = self.trainer.strategy.root_device.type == "cuda" and faiss.get_num_gpus() > 0
        return "gpu" if on_gpu else "cpu"

    def visits(self, n: int) -> np.ndarray:
        """Pooled vectors of n simulated visits of each database image, ``(N * n, width)``; all processes must call it.

        Of the strength and size of ``second_view``, if that simulates visits.
        """
        assert self.trainer is not None
        visit = self.second_view if isinstance(self.second_view, SimulatedVisit) else SimulatedVisit()
        return ViewCache(self.views, n, self.batch_pairs, self.workers).vectors(self.trainer, self._embedder, visit)

    def _dataset(self, pairs: Pairs, batches: list[np.ndarray]) -> Dataset[PairBatch]:
        assert self.trainer is not None and self.ground_truth is not None
        labels = self.ground_truth.labels["database"]
        if not self.cache_views:
            return PairDataset(pairs, batches, labels, self.views, self.first_view, self.second_view)
        assert self.n_views is not None
        if self._vectors is None:  # behind a frozen backbone they stay the same in all epochs
            cache = ViewCache(self.views, self.n_views, self.batch_pairs, self.workers)
            views = (self.first_view, self.second_view)
            self._vectors = [cache.vectors(self.trainer, self._embedder, augmentation) for augmentation in views]
        return CachedPairDataset(pairs, batches, labels, self._vectors[0], self._vectors[1], self.n_views)
