"""The training data: database images in pairs that are drawn anew for each epoch, and val to validate on."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from jsonargparse import lazy_instance  # type: ignore[attr-defined]
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from metilr.data.decode import MAX_MEGAPIXELS, limit_images
from metilr.data.ground_truth import DatabaseName, GroundTruth, load_ground_truth
from metilr.demo import DEMO, make_demo
from metilr.distributed import agree, default_workers, leave_signals_to_the_parent
from metilr.errors import UserError
from metilr.evaluation.runs import RUNS
from metilr.extraction.describe import image_sizes, require_images
from metilr.extraction.options import BadImages
from metilr.extraction.store import DescriptorStore
from metilr.training.augmentations import Augmentation, RandomCrop, SimulatedVisit, Views
from metilr.training.pairs import PairBatch, PairDataset, Pairing, Pairs, ViewsOf, deal_batches, draw_pairs


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

    Attributes:
        descriptors: Of database and val by the weights as they are now; the model puts them here before an epoch
            whose pairs need them.
        cached_views: Pooled vectors of the first and the second view, ``(N * n_views, width)``: view v of row r at
            ``r * n_views + v``; the model puts them here.

    Raises:
        UserError: If an option is out of range or does not go with another.
    """

    ground_truth: GroundTruth
    descriptors: DescriptorStore
    cached_views: tuple[np.ndarray, np.ndarray]

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
        at_least_1 = {
            "batch_pairs": batch_pairs, "anchors_per_epoch": anchors_per_epoch, "n_views": n_views,
            "image_size": image_size, "extraction_batch_size": extraction_batch_size,
        }  # fmt: skip
        for name, value in at_least_1.items():
            if value is not None and value < 1:
                raise UserError(f"{value}: must be at least 1", name)
        if cache_views and n_views is None:
            raise UserError("true: needs n_views, the number of views to keep of each image", "cache_views")
        if cache_views and bad_images == "skip":
            raise UserError("skip: not with cache_views; mend the images or leave one of the two out", "bad_images")
        self.root, self.database, self.seed = root, database, seed
        self.pairing, self.batch_pairs, self.anchors_per_epoch = pairing, batch_pairs, anchors_per_epoch
        self.first_view, self.second_view, self.n_views, self.cache_views = (
            first_view,
            second_view,
            n_views,
            cache_views,
        )
        self.image_size, self.extraction_batch_size = image_size, extraction_batch_size
        self.num_workers, self.bad_images, self.max_megapixels = num_workers, bad_images, max_megapixels
        self.folder = RUNS / "training"  # of the descriptors of the day; the command names the run's own
        self.needs_descriptors = pairing != "syn" or bad_images == "skip"  # which say what is bad

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
        limit_images(self.max_megapixels)
        root = DEMO if self.root is None else self.root
        truth = self.ground_truth = load_ground_truth(root, self.database, queries=("val",))
        self.sizes = image_sizes(truth)
        require_images(truth, self.sizes, self.bad_images)
        if self.pairing != "syn" and truth.n_classes < 2:
            raise UserError(f"{self.pairing}: negatives need at least two exhibits, {root} has one; use syn", "pairing")
        self.workers = default_workers(self.trainer.num_devices) if self.num_workers is None else self.num_workers
        self.first_views, self.second_views = self.views(self.first_view), self.views(self.second_view)
        n_anchors = self.anchors_per_epoch or int((self.sizes["database"] > 0).sum())
        self.n_pairs = n_anchors * (2 if self.pairing.endswith("+neg") else 1)  # fewer where images turn out to be bad
        self.n_batches = len(deal_batches(self.n_pairs, self.batch_pairs, 0, self.trainer.world_size))

    def views(self, augmentation: Augmentation) -> Views:
        """Views of the database images by an augmentation."""
        paths = self.ground_truth.paths["database"]
        return Views([self.ground_truth.image(path) for path in paths], paths, self.seed, augmentation)

    @override
    def train_dataloader(self) -> Iterable[PairBatch]:
        """Draw the epoch's pairs in the first process, tell them to the others, and give this one its part."""
        assert self.trainer is not None
        pairs = None
        with agree(self.trainer):
            if self.trainer.is_global_zero:
                pairs = self._draw_pairs()
        pairs = self.trainer.strategy.broadcast(pairs)
        assert pairs is not None
        self.pairs = pairs
        batches = deal_batches(len(pairs), self.batch_pairs, self.trainer.global_rank, self.trainer.world_size)
        first: ViewsOf = self.first_views
        second: ViewsOf = self.second_views
        if self.cache_views:
            first, second = map(self._cached, self.cached_views)
        return DataLoader(
            PairDataset(pairs, batches, self.ground_truth.labels["database"], first, second),
            batch_size=None,
            num_workers=0 if self.cache_views else min(self.workers, len(batches)),
            worker_init_fn=leave_signals_to_the_parent,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
        )

    def _draw_pairs(self) -> Pairs:
        assert self.trainer is not None
        labels = self.ground_truth.labels["database"]
        rows, descriptors = np.arange(len(labels)), None
        if self.needs_descriptors:
            rows = np.flatnonzero(self.descriptors.is_valid("database"))
            descriptors = np.asarray(self.descriptors.descriptors("database"))
        on_gpu = self.trainer.strategy.root_device.type == "cuda" and faiss.get_num_gpus() > 0
        return draw_pairs(
            rows,
            labels,
            self.pairing,
            descriptors,
            n_anchors=self.anchors_per_epoch,
            n_views=self.n_views,
            epoch=self.trainer.current_epoch,
            seed=self.seed,
            device="gpu" if on_gpu else "cpu",
        )

    def _cached(self, vectors: np.ndarray) -> ViewsOf:
        n_views = self.n_views
        assert n_views is not None

        def of(rows: np.ndarray, numbers: np.ndarray) -> Tensor:
            return torch.from_numpy(np.array(vectors[rows * n_views + numbers]))

        return of

    @override
    def val_dataloader(self) -> Iterable[Tensor]:
        """This process's share of the val queries, in one batch: their positions, int64 ``(Q,)``."""
        assert self.trainer is not None
        positions = np.arange(len(self.ground_truth.paths["val"]))
        mine: Any = [positions[self.trainer.global_rank :: self.trainer.world_size]]
        return DataLoader(mine, batch_size=None)
