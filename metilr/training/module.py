"""Contrastive fine-tuning: the LightningModule around backbone, pooling and projector."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_metric_learning.losses import NTXentLoss
from torch import Tensor, nn
from torchmetrics import MetricCollection
from typing_extensions import override

from metilr.distributed import gather_rows
from metilr.errors import UserError
from metilr.metrics import ACC, GAP, GAPMinus
from metilr.models import SCALES, PatchRounding, PoolingName
from metilr.models.backbone import Backbone, build_backbone
from metilr.models.checkpoints import FORMAT, model_entry
from metilr.models.embedder import Embedder, Projector
from metilr.models.pooling import GeM, build_pooling
from metilr.provenance import commit, library_versions, machine
from metilr.training.datamodule import PairDataModule
from metilr.training.descriptors import answer_val, cached_views, describe_current, whitening_start
from metilr.training.losses import ContrastiveLoss, check_loss, pair_figures
from metilr.training.pairs import PairBatch

P_BOUNDS = (1.0, 10.0)  # 1 is the mean; beyond 10 GeM is next to the maximum and its gradient next to nothing


class FineTuning(pl.LightningModule):
    """Backbone, pooling and optional projector, trained on pairs of views.

    BatchNorm keeps its statistics and dropout is off: the network stays in eval mode throughout.

    Args:
        backbone: As in metilr evaluate: r18_in, ..., lite0_in, or timm/NAME.
        weights: File with weights to start from; random for untrained ones; without it the official ones.
        stage: Take the map of an earlier stage, counted from 1; without it the last.
        patch_rounding: How a ViT's input sides are made multiples of its patch: nearest, down or off.
        pooling: gem, mac, spoc, rmac or cls.
        p: GeM's exponent, its start if learned.
        learn_p: Whether to learn p, between 1 and 10.
        projector_dim: Outputs of a 1x1-convolution projector after the pooling; without it there is none.
        projector_start: Start the projector as PCA-whitening of the database's current descriptors, as whitening
            learned from simulated visits, or at random.
        scales: Written to the checkpoint, for evaluation; training and its validation use the image's own size.
        freeze_backbone: Train the projector alone.
        loss: metilr.training.losses.ContrastiveLoss, or any loss of pytorch_metric_learning.losses by class_path: that
            gets the embeddings of all images of a batch with their exhibits. Without it NTXentLoss, temperature 0.05.
        optimizer: adam or adamw.
        lr: Learning rate of the backbone.
        lr_projector: Of the projector and of a loss's own weights; without it the backbone's.
        lr_p: Of GeM's p, which has no weight decay; without it the backbone's.
        weight_decay: Of backbone, projector and loss.
        schedule: constant; step: times 0.1 after each step_epochs; cosine: down to 0 at the end.
        step_epochs: For step.
        warmup_steps: Rise to the learning rate over so many steps.
        gradient_checkpointing: Save memory by computing each block's activations again in the backward pass.
        seed: Set by --seed_everything.
    """

    def __init__(
        self,
        backbone: str = "lite0_in",
        weights: str | None = None,
        stage: int | None = None,
        patch_rounding: PatchRounding = "nearest",
        pooling: PoolingName = "gem",
        p: float = 3.0,
        learn_p: bool = False,
        projector_dim: int | None = None,
        projector_start: Literal["pca", "learned", "random"] = "pca",
        scales: Sequence[float] = SCALES,
        freeze_backbone: bool = False,
        loss: nn.Module | None = None,
        optimizer: Literal["adam", "adamw"] = "adamw",
        lr: float = 3e-4,
        lr_projector: float | None = None,
        lr_p: float | None = None,
        weight_decay: float = 1e-2,
        schedule: Literal["constant", "step", "cosine"] = "cosine",
        step_epochs: int = 6,
        warmup_steps: int = 15,
        gradient_checkpointing: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if freeze_backbone and projector_dim is None:
            raise UserError("true: nothing is left to train; give projector_dim", "freeze_backbone")
        if freeze_backbone and learn_p:
            raise UserError("true: p cannot be learned behind a frozen backbone; leave out one of the two", "learn_p")
        self.lr = lr
        self.lr_projector = lr if lr_projector is None else lr_projector
        self.lr_p = lr if lr_p is None else lr_p
        for name, value, least in (
            ("projector_dim", projector_dim, 1), ("step_epochs", step_epochs, 1), ("warmup_steps", warmup_steps, 0),
            ("lr", lr, 0), ("lr_projector", self.lr_projector, 0), ("lr_p", self.lr_p, 0),
        ):  # fmt: skip
            if value is not None and not least <= value < math.inf:  # nor NaN
                raise UserError(f"{value}: must be a finite number, at least {least}", name)
        network = build_backbone(backbone, weights, stage, patch_rounding, seed)
        pool = build_pooling(pooling, p, learnable=learn_p)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            projector = None if projector_dim is None else Projector(network.width, projector_dim)
        self.embedder = Embedder(network, pool, projector, scales)
        self.loss = NTXentLoss(temperature=0.05) if loss is None else loss
        self.metrics = MetricCollection({"val/gap": GAP(), "val/gap_minus": GAPMinus(), "val/acc": ACC()})
        self.projector_start, self.freeze_backbone, self.optimizer = projector_start, freeze_backbone, optimizer
        self.weight_decay, self.schedule = weight_decay, schedule
        self.step_epochs, self.warmup_steps = step_epochs, warmup_steps
        self.resumed = False
        self.run_config: dict[str, Any] = {}  # the command's, for the checkpoint
        if freeze_backbone:
            network.requires_grad_(False)
        else:
            _freeze_unused(self.embedder)
        if gradient_checkpointing:
            _checkpoint_gradients(network)

    @property
    def data(self) -> PairDataModule:
        """What is trained on."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    @override
    def train(self, mode: bool = True) -> "FineTuning":
        """Keep the embedder in eval mode: BatchNorm's statistics stay those of the pretraining."""
        super().train(mode)
        self.embedder.eval()
        return self

    @override
    def setup(self, stage: str) -> None:
        """Lay the weights out as convolutions run fastest on a CPU, before DDP looks at their strides."""
        if self.trainer.strategy.root_device.type == "cpu":
            self.embedder.to(memory_format=torch.channels_last)

    @override
    def on_fit_start(self) -> None:
        """Refuse a loss or data that do not go with the model, start the projector, describe what pairs need."""
        data, projector = self.data, self.embedder.projector
        if data.cache_views and not self.freeze_backbone:
            raise UserError("true: needs a frozen backbone; give freeze_backbone true", "cache_views")
        check_loss(self.loss, self.embedder.dim, data.ground_truth.n_classes)
        if projector is not None and self.projector_start != "random" and not self.resumed:
            is_learned = self.projector_start == "learned"
            if is_learned and data.bad_images == "skip":
                raise UserError("learned: not with bad_images skip; mend the images, or take pca", "projector_start")
            dim = projector.linear.out_features
            projector.load_state_dict(whitening_start(self.trainer, self.embedder, data, dim, is_learned))
        if data.cache_views:  # behind a frozen backbone they stay the same in all epochs
            first, second = (
                cached_views(self.trainer, self.embedder, views, data.n_views or 0, data.batch_pairs, data.workers)
                for views in (data.first_views, data.second_views)
            )
            data.cached_views = first, second
        if data.needs_descriptors:
            data.descriptors = describe_current(self.trainer, self.embedder, data)

    def embed(self, images: Tensor) -> Tensor:
        """Embed a batch's images, uint8 ``(B, 3, H, W)``, or pooled vectors ``(B, width)``: unit length, float32."""
        if images.ndim == 2:
            with torch.autocast(self.device.type, enabled=False):
                return self.embedder.project(images)
        normalised = self.embedder.normalise(images)
        if self.device.type == "cpu":
            normalised = normalised.contiguous(memory_format=torch.channels_last)
        return self.embedder(normalised)

    @override
    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """Return the loss of the whole batch, this process's pairs and the others', float32; refuse one not finite."""
        if batch.first.shape[1:] == batch.second.shape[1:]:
            views = self.embed(torch.cat([batch.first, batch.second])).chunk(2)
        else:
            views = self.embed(batch.first), self.embed(batch.second)
        first, second = (gather_rows(self, each) for each in views)
        positive = gather_rows(self, batch.positive.int()).bool()
        labels = gather_rows(self, batch.first_labels), gather_rows(self, batch.second_labels)
        with torch.autocast(self.device.type, enabled=False):
            if isinstance(self.loss, ContrastiveLoss):
                loss = self.loss(first, second, positive)
            else:
                loss = self.loss(torch.cat([first, second]), torch.cat(labels))
            similarities = pair_figures(self.loss, first.detach(), second.detach(), positive, labels)
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss is {loss.item()} in epoch {self.current_epoch}: lower lr, or take precision 32; finished "
                "epochs are kept"
            )
        figures = {"loss": loss.detach(), **similarities}
        if isinstance(self.embedder.pooling, GeM):
            figures["p"] = self.embedder.pooling.p.detach().mean()
        self.log_dict({f"train/{name}": value for name, value in figures.items()}, batch_size=len(first))
        self.log("train/epoch_loss", loss.detach(), on_step=False, on_epoch=True, batch_size=len(first), prog_bar=True)
        return loss

    @override
    def on_train_batch_end(self, outputs: Any, batch: PairBatch, batch_idx: int) -> None:
        """Keep GeM's p within ``P_BOUNDS``."""
        if isinstance(self.embedder.pooling, GeM) and isinstance(self.embedder.pooling.p, nn.Parameter):
            with torch.no_grad():
                self.embedder.pooling.p.clamp_(*P_BOUNDS)

    @override
    def on_validation_epoch_start(self) -> None:
        """Describe database and val as the weights are now; the next epoch's pairs are mined in them too."""
        self.data.descriptors = describe_current(self.trainer, self.embedder, self.data)

    @override
    def validation_step(self, positions: Tensor, batch_idx: int) -> None:
        """Answer val queries, by position ``(Q,)``; one whose image is bad counts as wrong."""
        truth, rows = self.data.ground_truth, positions.cpu().numpy()
        answers = answer_val(self.data.descriptors, truth, rows)
        columns = (answers.log_confidence, answers.labels, truth.labels["val"][rows])
        self.metrics.update(*map(torch.from_numpy, columns), positions)

    @override
    def on_validation_epoch_end(self) -> None:
        """Log ``val/gap``, ``val/gap_minus`` and ``val/acc`` over the queries of all processes, each in [0, 1]."""
        self.log_dict(self.metrics.compute(), prog_bar=True)
        self.metrics.reset()

    @override
    def configure_optimizers(self) -> Any:
        """Return the optimizer, with learning rates of their own for backbone, p and projector, and the schedule."""
        backbone, pooling = self.embedder.backbone, self.embedder.pooling
        heads = nn.ModuleList([self.loss] if self.embedder.projector is None else [self.embedder.projector, self.loss])
        groups = [
            {"name": "backbone", "params": _trainable(backbone), "lr": self.lr},
            {"name": "p", "params": _trainable(pooling), "lr": self.lr_p, "weight_decay": 0.0},
            {"name": "projector", "params": _trainable(heads), "lr": self.lr_projector},
        ]
        used = [group for group in groups if group["params"]]
        kind = torch.optim.AdamW if self.optimizer == "adamw" else torch.optim.Adam
        optimizer = kind(used, lr=self.lr, weight_decay=self.weight_decay)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _factor(self, step: int) -> float:
        """What the learning rates are multiplied by at an optimizer step."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return 1.0
        limit, n_batches = self.trainer.limit_train_batches, self.data.n_batches  # a share if a float
        n_batches = min(n_batches, limit) if isinstance(limit, int) else int(n_batches * limit)
        steps_per_epoch = max(1, -(-n_batches // self.trainer.accumulate_grad_batches))
        if self.schedule == "step":
            return float(0.1 ** (step // steps_per_epoch // self.step_epochs))
        total = steps_per_epoch * (self.trainer.max_epochs or 1)  # the command refuses none
        if self.trainer.max_steps > 0:
            total = min(total, self.trainer.max_steps)
        done = (step - self.warmup_steps) / max(1, total - self.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what evaluation needs besides the weights, see `metilr.models.checkpoints`."""
        truth, provenance = self.data.ground_truth, self.embedder.backbone.provenance
        checkpoint["metilr"] = {
            "format": FORMAT,
            "model": model_entry(self.embedder, self.data.image_size),
            "provenance": {"source": provenance.source, "licence": provenance.licence},
            "data": {
                "root": truth.root.resolve().name, "database": truth.database,
                "counts": truth.counts(), "fingerprint": truth.fingerprint(),
            },
            "config": self.run_config,
            "versions": {**library_versions(), "commit": commit()},
            "machine": machine(),
        }  # fmt: skip

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with a run; refuse other data than it began with."""
        self.resumed = True
        if checkpoint.get("metilr", {}).get("data", {}).get("fingerprint") != self.data.ground_truth.fingerprint():
            raise UserError("its data changed since (database or valset.json); name another folder", "output")


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _freeze_unused(embedder: Embedder) -> None:
    """Freeze what no embedding depends on, such as the stages after ``stage``: DDP waits for its gradients."""
    embedder(torch.zeros(1, 3, *embedder.backbone.fit_size(64, 64))).sum().backward()
    for parameter in embedder.backbone.parameters():
        parameter.requires_grad_(parameter.grad is not None)
    embedder.zero_grad(set_to_none=True)


def _checkpoint_gradients(backbone: Backbone) -> None:
    try:
        backbone.model.set_grad_checkpointing(True)
    except (AssertionError, AttributeError):
        raise UserError(f"true: {backbone.name} has none; leave it out", "gradient_checkpointing") from None
