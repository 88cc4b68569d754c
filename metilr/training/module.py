"""Contrastive fine-tuning: the LightningModule around backbone, pooling and projector."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_metric_learning.losses import NTXentLoss
from torch import Tensor, nn
from torchmetrics import MetricCollection
from typing_extensions import override

from metilr.errors import UserError
from metilr.metrics import ACC, GAP, GAPMinus
from metilr.models.backbone import build_backbone
from metilr.models.checkpoints import checkpoint_entry, load_class_weights, load_embedder, read_checkpoint
from metilr.models.embedder import Embedder, Projector, keep_float32_exact
from metilr.models.fused import in_parts
from metilr.models.pooling import Pooling
from metilr.models.weights import load_strictly
from metilr.training import FineTuningOptions
from metilr.training.classifier import Classifier, class_rows, classifier_entry, start_at_prototypes
from metilr.training.datamodule import PairDataModule
from metilr.training.losses import (
    check_loss,
    gather_rows,
    lacks_negatives,
    loss_of_pairs,
    pair_figures,
    record_of,
    recorded_options,
)
from metilr.training.optimizers import optimizers_of
from metilr.training.pairs import PairBatch, as_pairs

P_BOUNDS = (1.0, 10.0)  # 1 is the mean; beyond 10 GeM is next to the maximum and its gradient next to nothing


class FineTuning(pl.LightningModule):
    """Backbone, pooling and optional projector, trained on pairs of views.

    BatchNorm keeps its statistics and dropout is off: the network stays in eval mode throughout. ``run_config``, the
    command's, goes into the checkpoint; without it the options do.

    ``Trainer.fit`` takes a `PairDataModule`, or any loader of batches ``(first, second, labels)``: the images of pairs,
    ``(B, 3, H, W)``, uint8 or float from 0 to 1, and which exhibit each pair shows, integers ``(B,)``; with labels of
    first and of second, pairs of two exhibits are negatives. Validation on such a loader logs ``val/loss``.
    """

    def __init__(
        self, options: FineTuningOptions | None = None, seed: int = 0, run_config: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        options = options or FineTuningOptions()
        self.options, self.run_config, self.resumed = options, dict(run_config or {}), False
        self.last_batch: PairBatch | None = None
        network = build_backbone(options.backbone, options.weights, options.stage, options.patch_rounding, seed)
        pool = Pooling(options.pooling, options.p, learnable=options.learn_p)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            projector = None if options.projector_dim is None else Projector(network.pooled_dim, options.projector_dim)
        self.embedder = Embedder(network, pool, projector, options.scales)
        self.loss: nn.Module | None = NTXentLoss(temperature=0.05) if options.loss is None else options.loss
        if options.classifier != "none" and not options.contrastive_weight:
            self.loss = None
        self.seed = seed
        self.classifier: Classifier | None = None  # of these exhibits, in the order of labels, once they are known
        self.exhibit_ids: np.ndarray | None = None
        self.metrics = MetricCollection({"val/gap": GAP(), "val/gap_minus": GAPMinus(), "val/acc": ACC()})
        if options.freeze_backbone:
            network.requires_grad_(False)
        else:
            self.embedder.freeze_unused()
        if options.gradient_checkpointing:
            try:
                network.model.set_grad_checkpointing(True)
            except (AssertionError, AttributeError):
                raise UserError(f"true: {network.name} has none; leave it out", "gradient_checkpointing") from None

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | Path, map_location: Any = None, **changes: Any
    ) -> "FineTuning":
        """Build what a training saved, with its weights; no code that the file might hold is run.

        Args:
            checkpoint_path: Checkpoint of ``metilr train``, or of a Trainer that has fitted a `FineTuning`.
            map_location: Device to move it to; without it the CPU.
            **changes: Options in place of the recorded ones, such as ``lr``; a ``loss`` with settings of its own,
                other than the published one, must be given again.
        """
        path = Path(checkpoint_path)
        content = read_checkpoint(path)
        options = recorded_options(content, path, changes)
        embedder = load_embedder(path)  # refuses what does not fit together
        module = cls(options)
        if options.classifier != "none":
            module.make_classifier(np.array([*dict.fromkeys(load_class_weights(path, True).exhibit_ids.tolist())]))
        backbone, source = module.embedder.backbone, embedder.backbone
        backbone.provenance, backbone.mean, backbone.std = source.provenance, source.mean, source.std
        load_strictly(module, content["state_dict"], (), str(path))
        module.resumed = True  # projector and class weights begin as they are
        return module if map_location is None else module.to(map_location)

    @property
    def data(self) -> PairDataModule:
        """What the command trains on."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    @property
    def has_data(self) -> bool:
        """Whether that is trained on, and not a loader of the caller's own."""
        return isinstance(getattr(self.trainer, "datamodule", None), PairDataModule)

    @override
    def train(self, mode: bool = True) -> "FineTuning":
        """Keep the embedder in eval mode: BatchNorm's statistics stay those of the pretraining."""
        super().train(mode)
        self.embedder.eval()
        return self

    @override
    def setup(self, stage: str) -> None:
        """Lay the weights out as convolutions run fastest on a CPU, before DDP looks at their strides."""
        keep_float32_exact()
        if self.options.classifier != "none":
            if not self.has_data:
                raise UserError("needs the exhibits of a PairDataModule; give one to fit", "classifier")
            self.make_classifier(self.data.ground_truth.exhibit_ids)
        if self.trainer.strategy.root_device.type == "cpu":
            self.embedder.to(memory_format=torch.channels_last)

    @override
    def on_fit_start(self) -> None:
        projector, start = self.embedder.projector, self.options.projector_start
        if not self.has_data:
            if projector is not None and start != "random" and not self.resumed:
                remedy = "give it to fit, or choose random"
                raise UserError(f"{start}: is learned on the images of a PairDataModule; {remedy}", "projector_start")
            return
        data = self.data
        if data.options.cache_views and not self.options.freeze_backbone:
            raise UserError("true: needs a frozen backbone; give freeze_backbone true", "cache_views")
        if self.loss is not None:
            check_loss(self.loss, self.embedder.dim, data)
        n_some, n_views = self.options.classes_per_step, 2 * data.options.batch_pairs
        if n_some is not None and n_some <= min(n_views, data.ground_truth.n_classes - 1):
            remedy = f"a batch has {n_views} views; choose more than that, or smaller batches"
            raise UserError(f"{n_some}: {remedy}", "classes_per_step")
        data.check_sizes(self.embedder)
        if projector is not None and start != "random" and not self.resumed:
            if start == "learned" and data.options.bad_images == "skip":
                raise UserError("learned: not with bad_images skip; mend the images, or take pca", "projector_start")
            projector.load_state_dict(data.whitening_start(self.embedder, start == "learned"))
        if data.options.cache_views:
            data.cache_views(self.embedder)
        starts = self.options.classifier_start == "prototypes" and not self.resumed
        if data.options.needs_descriptors or (self.classifier is not None and starts):
            data.describe(self.embedder)
        if self.classifier is not None and starts:
            start_at_prototypes(self.classifier, *data.rows())

    def make_classifier(self, exhibit_ids: np.ndarray) -> None:
        """Build the classifier that the options name, of these exhibits in the order of labels."""
        if not np.array_equal(exhibit_ids, [] if self.exhibit_ids is None else self.exhibit_ids):  # else trained
            self.exhibit_ids, self.resumed = exhibit_ids, False  # of other exhibits than a loaded one's: begin anew
            self.classifier = Classifier(self.options, len(exhibit_ids), self.embedder.dim, self.seed)

    def embed(self, images: Tensor) -> Tensor:
        """Embed a batch's images, uint8 ``(B, 3, H, W)``, or pooled vectors ``(B, width)``: unit length, float32."""
        if images.ndim == 2:
            with torch.autocast(self.device.type, enabled=False):
                return self.embedder.project(images)
        normalised = self.embedder.normalise(images)
        return in_parts(self.embedder, normalised) if self.device.type == "cpu" else self.embedder(normalised)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of the whole batch, this process's pairs and the others', float32."""
        pairs = as_pairs(batch)
        loss, figures, n_pairs = self._loss_of(pairs, batch_idx)
        self.last_batch = pairs
        figures = {"loss": loss.detach(), **figures}
        if self.embedder.pooling.kind == "gem":
            figures["p"] = self.embedder.pooling.p.detach().mean()
        self.log_dict({f"train/{name}": value for name, value in figures.items()}, batch_size=n_pairs)
        self.log("train/epoch_loss", loss.detach(), on_step=False, on_epoch=True, batch_size=n_pairs, prog_bar=True)
        return loss

    def _loss_of(self, batch: PairBatch, batch_idx: int = 0) -> tuple[Tensor, dict[str, Tensor], int]:
        """The loss, figures beside it and the number of pairs; UserError if the weights make neither any more."""
        if batch.first.shape[1:] == batch.second.shape[1:]:
            views = self.embed(torch.cat([batch.first, batch.second])).chunk(2)
        else:
            views = self.embed(batch.first), self.embed(batch.second)
        first, second = (gather_rows(self, each) for each in views)
        positive = gather_rows(self, batch.positive.int()).bool()
        labels = gather_rows(self, batch.first_labels), gather_rows(self, batch.second_labels)
        if self.loss is not None and lacks_negatives(self.loss, len(first)):
            raise UserError(f"a batch of one pair has no negative for {type(self.loss).__name__}; give 2 or more")
        with torch.autocast(self.device.type, enabled=False):
            figures = pair_figures(self.loss, first.detach(), second.detach(), positive, labels)
            terms = [] if self.loss is None else [loss_of_pairs(self.loss, first, second, positive, labels)]
            if self.classifier is not None:
                seed = self.seed, self.global_step, batch_idx
                terms += [self.classifier(torch.cat([first, second]), torch.cat(labels), seed)]
            loss = terms[-1]
            if len(terms) == 2:
                loss = loss + self.options.contrastive_weight * terms[0]
                figures |= {"contrastive_loss": terms[0].detach(), "classifier_loss": terms[1].detach()}
        are_of_unit_length = all(((each.detach().norm(dim=1) - 1).abs() < 0.1).all() for each in (first, second))
        if not (torch.isfinite(loss) and are_of_unit_length):
            what = "the loss is not finite" if are_of_unit_length else "the embeddings are not finite, or all zero,"
            remedy = "choose a lower one, or precision 32; finished epochs are kept"
            raise UserError(f"{self.options.lr:g}: {what} after step {self.global_step}: {remedy}", "lr")
        return loss, figures, len(first)

    @override
    def on_train_batch_end(self, outputs: Any, batch: PairBatch, batch_idx: int) -> None:
        if self.options.learn_p and self.embedder.pooling.kind == "gem":
            with torch.no_grad():
                self.embedder.pooling.p.clamp_(*P_BOUNDS)

    @override
    def on_validation_epoch_start(self) -> None:
        """Describe database and val as the weights are now; the next epoch's pairs are mined in them too."""
        if not self.has_data:
            return
        if self.last_batch is not None:  # else images would be blamed for what its step has made of the weights
            self._loss_of(self.last_batch)
            self.last_batch = None
        self.data.describe(self.embedder)

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Classify the queries at positions of val; of a loader of the caller's own, log the loss."""
        if not self.has_data:
            loss, _, n_pairs = self._loss_of(as_pairs(batch))
            self.log("val/loss", loss, batch_size=n_pairs, prog_bar=True, sync_dist=True)
            return
        positions: Tensor = batch
        rows = positions.cpu().numpy()
        predictions = self.data.classify_val(rows, class_rows(self.classifier) if self.classifier else None)
        columns = predictions.log_confidence, predictions.labels, self.data.ground_truth.labels["val"][rows]
        self.metrics.update(*map(torch.from_numpy, columns), positions)

    @override
    def on_validation_epoch_end(self) -> None:
        """Log ``val/gap``, ``val/gap_minus`` and ``val/acc`` over the queries of all processes, each in [0, 1]."""
        if not self.has_data:
            return
        self.log_dict(self.metrics.compute(), prog_bar=True)
        self.metrics.reset()

    @override
    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Describe a batch's images, as `Embedder.normalise` takes them, at all scales: float32 ``(B, dim)``."""
        return self.embedder.describe(self.embedder.normalise(batch)).cpu()

    @override
    def configure_optimizers(self) -> Any:
        """Give backbone, p and heads a learning rate each, and the schedule, step by step."""
        steps = self._steps if self.options.schedule != "constant" else None
        return optimizers_of(self.options, self.embedder, self.loss, self.classifier, steps)

    def _steps(self) -> tuple[int, int]:
        """Steps of the optimizer in an epoch and in the whole training."""
        n_epochs = self.trainer.max_epochs or 1  # the command refuses none
        if not self.has_data:
            total = self.trainer.estimated_stepping_batches  # infinite or -1 without a length
            if n_epochs < 1 or not 0 < total < math.inf:
                what = "needs to know how many steps there are; give a loader with a length and max_epochs"
                raise UserError(f"{self.options.schedule}: {what}, or choose constant", "schedule")
            return max(1, int(total) // n_epochs), int(total)
        steps_per_epoch = self.data.steps_per_epoch()
        total = steps_per_epoch * n_epochs
        return steps_per_epoch, min(total, self.trainer.max_steps) if self.trainer.max_steps > 0 else total

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what evaluation needs besides the weights, see ``ModelEntry``."""
        data = self.data.ground_truth.identity() if self.has_data else None
        options = {**vars(self.options), "scales": [*self.options.scales], "loss": record_of(self.options.loss)}
        image_size, config = self.data.options.image_size if self.has_data else None, self.run_config
        checkpoint["metilr"] = checkpoint_entry(self.embedder, image_size, data, config or {"model": options})
        if self.classifier is not None and self.exhibit_ids is not None:  # the weights are in the state_dict
            entry = classifier_entry(self.classifier, self.exhibit_ids, self.data if self.has_data else None)
            checkpoint["metilr"]["classifier"] = entry

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with a run; refuse other data than it began with."""
        self.resumed = True
        before = (checkpoint.get("metilr") or {}).get("data") or {}
        if self.has_data and before.get("fingerprint") != self.data.ground_truth.fingerprint():
            raise UserError("holds a training on other data (database or valset.json changed); name another", "output")
