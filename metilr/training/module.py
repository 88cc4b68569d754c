"""Contrastive fine-tuning: the LightningModule around backbone, pooling and projector."""

import copy
import itertools
import math
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_metric_learning.losses import NTXentLoss
from torch import Tensor, nn
from typing_extensions import override

from metilr.distributed import agree, gather_rows
from metilr.errors import UserError
from metilr.evaluation.options import VISITS
from metilr.evaluation.whitening import exhibit_differences, visit_differences
from metilr.extraction.store import row_chunks
from metilr.models import SCALES, PatchRounding, PoolingName
from metilr.models.backbone import build_backbone
from metilr.models.checkpoints import FORMAT, model_entry
from metilr.models.embedder import Embedder, Projector
from metilr.models.pooling import GeM, build_pooling
from metilr.provenance import commit, library_versions, machine
from metilr.retrieval.whitening import fit_learned_whitening, fit_pca_whitening
from metilr.training.descriptors import single_scale
from metilr.training.losses import ContrastiveLoss
from metilr.training.pair_dataset import PairBatch

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
            gets the embeddings of all images of a batch with their exhibits. Without it NTXentLoss, temperature 0.05. A
            class of your own is named on the command line, which an options file may not do.
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

    Raises:
        UserError: If an option is out of range or does not go with another, or the backbone cannot be built.
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
            raise UserError("--model.freeze_backbone: nothing is left to train; give --model.projector_dim")
        if freeze_backbone and learn_p:
            raise UserError("--model.learn_p: p cannot be learned behind a frozen backbone; leave out one of the two")
        if projector_dim is not None and projector_dim < 1:
            raise UserError(f"--model.projector_dim {projector_dim}: must be at least 1")
        if step_epochs < 1 or warmup_steps < 0:
            raise UserError("--model.step_epochs must be at least 1, --model.warmup_steps at least 0")
        for name, value in (("lr", lr), ("lr_projector", lr_projector), ("lr_p", lr_p)):
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise UserError(f"--model.{name} {value}: must be a finite number, 0 or above")
        network = build_backbone(backbone, weights, stage, patch_rounding, seed)
        pool = build_pooling(pooling, p, learnable=learn_p)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            projector = None if projector_dim is None else Projector(network.width, projector_dim)
        self.embedder = Embedder(network, pool, projector, scales)
        self.loss = NTXentLoss(temperature=0.05) if loss is None else loss
        self.pooling, self.projector_start, self.freeze_backbone = pooling, projector_start, freeze_backbone
        self.optimizer, self.weight_decay = optimizer, weight_decay
        self.lr, self.schedule, self.step_epochs, self.warmup_steps = lr, schedule, step_epochs, warmup_steps
        self.lr_projector = lr if lr_projector is None else lr_projector
        self.lr_p = lr if lr_p is None else lr_p
        self.resumed = False
        self.run_config: dict[str, Any] = {}  # the command's, for the checkpoint
        if freeze_backbone:
            network.requires_grad_(False)
        else:
            _freeze_unused(self.embedder)
        if gradient_checkpointing:
            try:
                network.model.set_grad_checkpointing(True)
            except (AssertionError, AttributeError):
                raise UserError(f"--model.gradient_checkpointing: {backbone} has none; leave it out") from None

    @override
    def train(self, mode: bool = True) -> "FineTuning":
        """Keep the embedder in eval mode: BatchNorm's statistics stay those of the pretraining."""
        super().train(mode)
        self.embedder.eval()
        return self

    @override
    def setup(self, stage: str) -> None:
        """Lay the weights out as convolutions run fastest."""
        # Before DDP looks at the strides of the weights.
        if self.trainer.strategy.root_device.type == "cpu":  # there convolutions run faster with channels last
            self.embedder.to(memory_format=torch.channels_last)

    @override
    def on_fit_start(self) -> None:
        """Check that the loss takes these embeddings, and start the projector.

        Raises:
            UserError: If it does not, or the projector cannot be started so.
        """
        self._check_loss()
        if self.embedder.projector is not None and self.projector_start != "random" and not self.resumed:
            self._start_projector(self.embedder.projector)

    def _check_loss(self) -> None:
        """Refuse a loss whose own weights fit neither the embeddings nor the data."""
        if isinstance(self.loss, ContrastiveLoss):
            return
        dim, n_classes = self.embedder.dim, self._data.ground_truth.n_classes
        labels = torch.tensor([0, 0, n_classes - 1, n_classes - 1], device=self.device)
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                copy.deepcopy(self.loss)(torch.eye(4, dim, device=self.device), labels)
        except (RuntimeError, ValueError, IndexError, AssertionError, TypeError) as error:
            name = type(self.loss).__name__
            raise UserError(
                f"--model.loss {name}: does not take this model's embeddings of size {dim} and labels of {n_classes} "
                f"classes ({' '.join(str(error).split())}); check its embedding_size and num_classes, if it has them"
            ) from None

    def _start_projector(self, projector: Projector) -> None:
        """Let the projector be a whitening of the database's descriptors as they are now."""
        if self.projector_start == "learned" and self._data.bad_images == "skip":
            raise UserError(
                "--model.projector_start learned: not with --data.bad_images skip; mend the images, or take pca"
            )
        plain = single_scale(self.embedder, projector=False)
        store = self._data.current.describe(self.trainer, plain)
        visits = self._data.visits(VISITS) if self.projector_start == "learned" else None
        start: list[Tensor] | None = None
        with agree(self.trainer):
            if self.trainer.is_global_zero:
                database, made, dim = [store.rows("database")], store.made("database"), projector.linear.out_features
                chunks = row_chunks(database, made)
                try:
                    if visits is None:
                        whitening = fit_pca_whitening(chunks, dim)
                    else:
                        labels = np.where(made, self._data.ground_truth.labels["database"], -1)
                        pairs = itertools.chain(
                            visit_differences(database, [visits], made), exhibit_differences(database, labels)
                        )
                        whitening = fit_learned_whitening(chunks, pairs, dim)
                except UserError as error:
                    here = "--model.projector_dim " if error.parameter == "dim" else ""
                    raise UserError(here + error.message) from None
                mean, projection = torch.from_numpy(whitening.mean), torch.from_numpy(whitening.projection)
                start = [projection.T.contiguous(), -mean @ projection]
        weight, bias = typing.cast(list[Tensor], self.trainer.strategy.broadcast(start))
        with torch.no_grad():
            projector.linear.weight.copy_(weight)
            projector.linear.bias.copy_(bias)

    @property
    def _data(self) -> Any:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def embed(self, images: Tensor) -> Tensor:
        """Embed a batch's images, uint8 ``(B, 3, H, W)``, or pooled vectors ``(B, width)``: unit length, float32."""
        if images.ndim == 2:
            with torch.autocast(self.device.type, enabled=False):
                return self.embedder.project(images)
        normalised = self.embedder.normalise(images)
        if self.device.type == "cpu":
            normalised = normalised.contiguous(memory_format=torch.channels_last)
        embeddings: Tensor = self.embedder(normalised)
        return embeddings

    @override
    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """Return the loss of the whole batch, this process's pairs and the others', float32.

        Raises:
            UserError: If it is not finite.
        """
        if batch.first.shape[1:] == batch.second.shape[1:]:
            first, second = self.embed(torch.cat([batch.first, batch.second])).chunk(2)
        else:
            first, second = self.embed(batch.first), self.embed(batch.second)
        first, second = gather_rows(self, first), gather_rows(self, second)
        positive = gather_rows(self, batch.positive.int()).bool()
        labels = gather_rows(self, batch.first_labels), gather_rows(self, batch.second_labels)
        with torch.autocast(self.device.type, enabled=False):
            if isinstance(self.loss, ContrastiveLoss):
                loss = self.loss(first, second, positive)
            else:
                loss = self.loss(torch.cat([first, second]), torch.cat(labels))
            if not torch.isfinite(loss):
                raise UserError(
                    f"the loss is {loss.item()} in epoch {self.current_epoch}: lower --model.lr, or use "
                    "--trainer.precision 32; finished epochs are kept"
                )
            self._log_pairs(loss.detach(), first.detach(), second.detach(), positive, labels)
        return loss

    def _log_pairs(
        self, loss: Tensor, first: Tensor, second: Tensor, positive: Tensor, labels: tuple[Tensor, Tensor]
    ) -> None:
        figures = {"loss": loss}
        if isinstance(self.loss, ContrastiveLoss):
            similarities = (first * second).sum(dim=1)
            same, other = similarities[positive], similarities[~positive]
            if len(other):
                figures["active_hinges"] = self.loss.active(first, second, positive)
        else:
            similarities = first @ second.T
            shared = labels[0][:, None] == labels[1][None, :]
            same, other = similarities[shared], similarities[~shared]
        if len(same):
            figures["positive_similarity"] = same.mean()
        if len(other):
            figures["negative_similarity"] = other.mean()
        if isinstance(self.embedder.pooling, GeM):
            figures["p"] = self.embedder.pooling.p.detach().mean()
        self.log_dict({f"train/{name}": value for name, value in figures.items()}, batch_size=len(first))
        self.log("train/epoch_loss", loss, on_step=False, on_epoch=True, batch_size=len(first), prog_bar=True)

    @override
    def on_train_batch_end(self, outputs: Any, batch: PairBatch, batch_idx: int) -> None:
        """Keep GeM's p within ``P_BOUNDS``."""
        if isinstance(self.embedder.pooling, GeM):
            with torch.no_grad():
                if isinstance(self.embedder.pooling.p, nn.Parameter):
                    self.embedder.pooling.p.clamp_(*P_BOUNDS)

    @override
    def configure_optimizers(self) -> Any:
        """Return the optimizer, with learning rates of their own for backbone, p and projector, and the schedule."""
        backbone, pooling = self.embedder.backbone, self.embedder.pooling
        heads = [*_trainable(self.embedder.projector), *_trainable(self.loss)]
        groups = [
            {"name": "backbone", "params": list(_trainable(backbone)), "lr": self.lr},
            {"name": "p", "params": list(_trainable(pooling)), "lr": self.lr_p, "weight_decay": 0.0},
            {"name": "projector", "params": heads, "lr": self.lr_projector},
        ]
        kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
        optimizer = kinds[self.optimizer](
            [group for group in groups if group["params"]], lr=self.lr, weight_decay=self.weight_decay
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _factor(self, step: int) -> float:
        """What the learning rates are multiplied by at an optimizer step."""
        limit = self.trainer.limit_train_batches  # a share if a float
        n_batches = self._data.n_batches
        n_batches = min(n_batches, limit) if isinstance(limit, int) else int(n_batches * limit)
        steps_per_epoch = max(1, -(-n_batches // self.trainer.accumulate_grad_batches))
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.schedule == "step":
            return float(0.1 ** (step // steps_per_epoch // self.step_epochs))
        if self.schedule == "constant":
            return 1.0
        assert self.trainer.max_epochs is not None and self.trainer.max_epochs > 0  # the command refuses less
        total = steps_per_epoch * self.trainer.max_epochs
        if self.trainer.max_steps > 0:
            total = min(total, self.trainer.max_steps)
        done = (step - self.warmup_steps) / max(1, total - self.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what evaluation needs besides the weights, see `metilr.models.checkpoints`."""
        truth = self._data.ground_truth
        provenance = self.embedder.backbone.provenance
        checkpoint["metilr"] = {
            "format": FORMAT,
            "model": model_entry(self.embedder, self._data.image_size),
            "provenance": {"source": provenance.source, "licence": provenance.licence},
            "data": {
                "root": truth.root.resolve().name,
                "database": truth.database,
                "counts": truth.counts(),
                "fingerprint": truth.fingerprint(),
            },
            "config": self.run_config,
            "versions": {**library_versions(), "commit": commit()},
            "machine": machine(),
        }

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with a run, on the data that it began with.

        Raises:
            UserError: If the data is other.
        """
        self.resumed = True
        entry = checkpoint.get("metilr", {})
        if entry.get("data", {}).get("fingerprint") != self._data.ground_truth.fingerprint():
            raise UserError("--output: its data changed (database or valset.json); name another folder")


def _trainable(module: nn.Module | None) -> Iterator[nn.Parameter]:
    return (p for p in module.parameters() if p.requires_grad) if module is not None else iter(())


def _freeze_unused(embedder: Embedder) -> None:
    """Freeze what no embedding depends on, such as the stages after ``stage``: DDP waits for its gradients."""
    side = embedder.backbone.fit_size(64, 64)
    embedder(torch.zeros(1, 3, *side)).sum().backward()
    for parameter in embedder.backbone.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None
    embedder.zero_grad(set_to_none=True)
