"""Contrastive fine-tuning, and its options, which import no heavy library, so that help is quick."""

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from jsonargparse import lazy_instance  # type: ignore[attr-defined]

from metilr.data.decode import MAX_MEGAPIXELS
from metilr.data.ground_truth import DatabaseName
from metilr.errors import UserError, check_choices
from metilr.evaluation.options import PROJECT, WandbMode
from metilr.extraction.options import BadImages
from metilr.models import SCALES, PatchRounding, PoolingName
from metilr.training import augmentations  # not its classes: options name each by where it is defined

LoggerName = Literal["wandb", "tensorboard", "csv"]
ClassifierName = Literal["none", "cosine", "arcface", "subcenter"]
Pairing = Literal["syn", "syn+neg", "syn+real+neg", "syn+real-closest+neg"]


@dataclass(frozen=True)
class RunOptions:
    """The run: all that is neither the trainer's, the model's nor the data's.

    Attributes:
        seed_everything: Decides weights that are not read, pairs and views.
        output: Folder of the run, in which an unfinished run of the same options is continued; without it a dated one
            under runs/. Needed under torchrun and SLURM.
        validate_first: Validate the starting weights too, before training.
        logger: wandb, tensorboard, or both; csv for neither: that file is always there.
        wandb: W&B: auto is online with a key (WANDB_API_KEY or netrc), else offline.
        wandb_project: Project in W&B.
        wandb_checkpoint: Store the best checkpoint there.
        pictures_every: Epochs between pictures of pairs in W&B.
    """

    seed_everything: int = 0
    output: Path | None = None
    validate_first: bool = True
    logger: Sequence[LoggerName] = ("wandb",)
    wandb: WandbMode = "auto"
    wandb_project: str = PROJECT
    wandb_checkpoint: bool = False
    pictures_every: int = 2

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        if not 0 <= self.seed_everything < 2**32:
            raise UserError(f"{self.seed_everything}: give a number from 0 to 2**32 - 1", "seed_everything")
        _check_least(self, pictures_every=1)
        if isinstance(self.logger, str):
            object.__setattr__(self, "logger", (self.logger,))
        check_choices(self)
        if "wandb" not in self.logger and self.wandb in ("online", "offline"):
            raise UserError(f"{self.wandb}: has no effect without wandb as logger; leave one of the two out", "wandb")
        if "tensorboard" in self.logger and not any(map(importlib.util.find_spec, ("tensorboard", "tensorboardX"))):
            raise UserError("tensorboard: is not installed; pip install 'metilr[tensorboard]'", "logger")


@dataclass(frozen=True)
class FineTuningOptions:
    """The model that is trained on pairs of views, and how.

    Attributes:
        backbone: As in metilr evaluate: r18_in, ..., lite0_in, or timm/NAME.
        weights: File to start from, or hf://OWNER/NAME; random for untrained weights; without it the official ones.
        stage: Take the map of an earlier stage, counted from 1; without it the last.
        patch_rounding: How a ViT's input sides are made multiples of its patch: nearest, down or off.
        pooling: gem, mac, spoc, rmac, cls or attention.
        p: GeM's exponent, its start if learned.
        learn_p: Whether to learn p, between 1 and 10.
        projector_dim: Outputs of a linear projector after the pooling; without it there is none.
        projector_start: As PCA-whitening of the database, as whitening learned from simulated visits, or at random.
        scales: Written to the checkpoint, for evaluation; training and its validation use the image's own size.
        freeze_backbone: Train the projector alone, or the classifier, or both.
        loss: metilr.training.losses.ContrastiveLoss, or any of pytorch_metric_learning.losses by class_path: that gets
            all embeddings of a batch with their exhibits. Without it NTXentLoss, temperature 0.05.
        contrastive_weight: Weight of the loss beside a classifier.
        classifier: Train a vector an exhibit in place of the loss: cosine, a softmax of similarities; arcface, with a
            margin; subcenter, with three vectors each. Evaluate with database_rows classifier.
        classifier_start: At the mean of each exhibit's images, or at random.
        classifier_margin: In degrees, of arcface and subcenter.
        classifier_scale: What similarities are multiplied by in the softmax.
        classes_per_step: Classes that get a gradient in a step; without it all.
        optimizer: adam or adamw.
        lr: Learning rate of the backbone.
        lr_projector: Of the projector and of a loss's own weights; without it the backbone's.
        lr_classifier: Of the classifier; without it the projector's.
        lr_p: Of GeM's p, which has no weight decay; without it the backbone's.
        weight_decay: Of backbone, projector, loss and classifier.
        schedule: constant; step: times 0.1 after each step_epochs; cosine: down to 0 at the end.
        step_epochs: For step.
        warmup_steps: Rise to the learning rate over so many steps.
        gradient_checkpointing: Save memory by computing each block's activations again in the backward pass.
    """

    backbone: str = "lite0_in"
    weights: str | None = None
    stage: int | None = None
    patch_rounding: PatchRounding = "nearest"
    pooling: PoolingName = "gem"
    p: float = 3.0
    learn_p: bool = False
    projector_dim: int | None = None
    projector_start: Literal["pca", "learned", "random"] = "pca"
    scales: Sequence[float] = SCALES
    freeze_backbone: bool = False
    loss: Any = None  # a torch module
    contrastive_weight: float = 0.0
    classifier: ClassifierName = "none"
    classifier_start: Literal["prototypes", "random"] = "prototypes"
    classifier_margin: float = 28.6  # half a radian, the ArcFace paper's
    classifier_scale: float = 20.0  # as NTXentLoss's temperature of 0.05, which small museums are trained with
    classes_per_step: int | None = None
    optimizer: Literal["adam", "adamw"] = "adamw"
    lr: float = 3e-4
    lr_projector: float | None = None
    lr_classifier: float | None = None
    lr_p: float | None = None
    weight_decay: float = 1e-2
    schedule: Literal["constant", "step", "cosine"] = "cosine"
    step_epochs: int = 6
    warmup_steps: int = 15
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        """Refuse what is out of range or leaves nothing to train."""
        check_choices(self)
        _check_least(self, projector_dim=1, step_epochs=1, warmup_steps=0, lr=0, lr_projector=0, lr_p=0)
        _check_least(self, lr_classifier=0, contrastive_weight=0, classes_per_step=2)
        has_classifier = self.classifier != "none"
        if self.freeze_backbone and self.projector_dim is None and not has_classifier:
            raise UserError("true: nothing is left to train; give projector_dim, or a classifier", "freeze_backbone")
        if self.freeze_backbone and self.projector_dim is None and self.contrastive_weight:
            what = "behind a frozen backbone the loss has nothing to train; give projector_dim, or leave it out"
            raise UserError(f"{self.contrastive_weight:g}: {what}", "contrastive_weight")
        if has_classifier and self.loss is not None and not self.contrastive_weight:
            raise UserError("has no effect beside a classifier without contrastive_weight; give it a weight", "loss")
        defaults = {field.name: field.default for field in fields(self)}
        of_any = ("lr_classifier", "classifier_start", "classifier_scale", "classes_per_step", "contrastive_weight")
        idle = [] if has_classifier else [*of_any]
        idle += [] if self.classifier in ("arcface", "subcenter") else ["classifier_margin"]
        for name in idle:
            if getattr(self, name) != defaults[name]:
                needed = "arcface or subcenter" if name == "classifier_margin" else "such as cosine"
                raise UserError(f"has no effect without a classifier {needed}; leave it out", name)
        if not 0 < self.classifier_margin < 180:
            raise UserError(f"{self.classifier_margin}: choose degrees above 0, below 180", "classifier_margin")
        if not 0 < self.classifier_scale < math.inf:
            raise UserError(f"{self.classifier_scale}: choose a finite number above 0", "classifier_scale")
        if self.freeze_backbone and self.learn_p:
            raise UserError("true: p cannot be learned behind a frozen backbone; leave out one of the two", "learn_p")


@dataclass(frozen=True)
class PairOptions:
    """Pairs of database images. The test split is never read.

    Attributes:
        root: Folder with images/ and ground_truth/ in the Met layout; without it the synthetic demo museum.
        database: Train on MET_database.json (full) or mini_MET_database.json (mini).
        pairing: syn, two views of one image; syn+neg, and a hard negative per image, mined each epoch; syn+real+neg,
            the positive is another image of the exhibit if there is one; syn+real-closest+neg, it or the most similar.
        first_view: Augmentation of the first image of a pair: RandomCrop, PublishedAugmentation or SimulatedVisit.
        second_view: Augmentation of the second.
        batch_pairs: Pairs in a batch, over all processes together.
        anchors_per_epoch: Anchors in an epoch, in several rounds if need be; without it each image once.
        balance: Make each exhibit as often an anchor as any other.
        n_views: Draw views from so many fixed ones per image; without it each view of the run is a new one.
        cache_views: Compute the n_views of each image through the frozen backbone once and keep them on disk.
        image_size: Longest side in px of database and val images in mining and validation; without it as they are.
        extraction_batch_size: Most images in a batch of mining and validation.
        num_workers: Decoding processes beside each process; without it as many as cores are free, at most 8.
        bad_images: Stop at an image that cannot be decoded or is too small for the model, or skip it.
        max_megapixels: An image of more is bad; its header tells, before anything is decoded.
    """

    root: Path | None = None
    database: DatabaseName = "full"
    pairing: Pairing = "syn"
    first_view: augmentations.Augmentation = lazy_instance(augmentations.RandomCrop)  # noqa: RUF009 (made anew)
    second_view: augmentations.Augmentation = lazy_instance(augmentations.SimulatedVisit)  # noqa: RUF009
    batch_pairs: int = 24
    anchors_per_epoch: int | None = None
    balance: bool = False
    n_views: int | None = None
    cache_views: bool = False
    image_size: int | None = None
    extraction_batch_size: int = 32
    num_workers: int | None = None
    bad_images: BadImages = "stop"
    max_megapixels: float = MAX_MEGAPIXELS

    def __post_init__(self) -> None:
        """Refuse what is out of range or does not go together."""
        check_choices(self)
        _check_least(self, batch_pairs=1, anchors_per_epoch=1, n_views=1, image_size=1, extraction_batch_size=1)
        if self.cache_views and self.n_views is None:
            raise UserError("true: needs n_views, the number of views to keep of each image", "cache_views")
        if self.cache_views and self.bad_images == "skip":
            raise UserError("skip: not with cache_views; mend the images or leave one of the two out", "bad_images")

    @property
    def has_negatives(self) -> bool:
        """Whether each anchor gets a negative beside its positive."""
        return self.pairing != "syn"

    @property
    def needs_descriptors(self) -> bool:
        """Whether pairs are drawn by descriptors, which also say which images are bad."""
        return self.has_negatives or self.bad_images == "skip"


def _check_least(options: Any, **least: int) -> None:
    for name, bound in least.items():
        value = getattr(options, name)
        if value is not None and not bound <= value < math.inf:  # nor NaN
            raise UserError(f"{value}: must be a finite number, at least {bound}", name)
