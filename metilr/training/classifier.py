"""A parametric classifier: one learned vector an exhibit, or a few, and a softmax over all exhibits.

Its class weights are what an evaluation searches with ``database_rows`` classifier.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metilr.evaluation.database import Searchable, as_compared, prototypes_of
from metilr.training import FineTuningOptions

if TYPE_CHECKING:
    from metilr.training.datamodule import PairDataModule

SUB_CENTRES = 3  # the sub-centre paper's
BLOCK = 16384  # class weights that are compared at a time where nothing is kept for gradients


class Classifier(nn.Module):
    """Class weights ``(M, D)``, those of one exhibit side by side, and their loss; at random until they are set.

    With θ the angles between an embedding and the class weights, y its class and s the scale, the loss is the
    cross-entropy of s · cos θ (cosine), or of the same with cos(θ_y + margin) for y (arcface), which asks for more than
    being nearest; where θ_y + margin exceeds 180 degrees, cos θ_y − margin · sin margin goes on falling. subcenter
    takes for each class the nearest of three vectors. The mean over the batch.

    With ``classes_per_step`` the loss is the same, and so is its gradient in expectation, but only so many classes get
    one in a step: the batch's own, then half those most similar to one of its embeddings, half at random, whose
    gradients count for the classes that are left out.

    Source: Wang et al., NormFace, 2017; Deng et al., ArcFace, CVPR 2019; Deng et al., Sub-center ArcFace, ECCV 2020.
    """

    def __init__(self, options: FineTuningOptions, n_classes: int, dim: int, seed: int = 0) -> None:
        super().__init__()
        self.scale, self.classes_per_step = options.classifier_scale, options.classes_per_step
        self.margin = 0.0 if options.classifier == "cosine" else math.radians(options.classifier_margin)
        self.centres = SUB_CENTRES if options.classifier == "subcenter" else 1
        weight = torch.randn(n_classes * self.centres, dim, generator=torch.Generator().manual_seed(seed))
        # Short: only directions count, and shorter weights turn sooner; of unit length the network turned instead.
        self.weight = nn.Parameter(0.01 * weight)

    def forward(self, embeddings: Tensor, labels: Tensor, seed: Sequence[int] = (0,)) -> Tensor:
        """Return the loss of embeddings ``(B, D)``; ``seed`` decides which classes are drawn at random."""
        embeddings, by_class = F.normalize(embeddings, dim=1), self._by_class()
        if self.classes_per_step is None or self.classes_per_step >= len(by_class):
            similarities = cosines(embeddings, by_class)
            own = self._with_margin(similarities.gather(1, labels[:, None]))
            return F.cross_entropy(self.scale * similarities.scatter(1, labels[:, None], own), labels)
        log_others, highest = self._compare_all(embeddings, labels)
        classes, counts = self._draw(highest, labels, self.classes_per_step, seed)
        similarities = cosines(embeddings, by_class.index_select(0, classes))
        columns = torch.searchsorted(classes, labels)[:, None]
        own = self._with_margin(similarities.gather(1, columns))
        logits = self.scale * similarities.scatter(1, columns, own)
        own = self.scale * own.squeeze(1)
        log_total = torch.logaddexp(log_others, own).detach()
        # The gradient of log_total is that of the logits, each times its probability.
        probabilities = counts * (logits - log_total[:, None]).exp().detach()
        sampled = ((probabilities * logits).sum(dim=1) - own).mean()
        return sampled + ((log_total - own).mean() - sampled).detach()

    def _by_class(self) -> Tensor:
        return self.weight.unflatten(0, (-1, self.centres))

    def _with_margin(self, cosine: Tensor) -> Tensor:
        """cos(θ + margin) of cos θ, by the addition theorem: its gradient is finite at θ = 0 as well."""
        sine = (1 - cosine * cosine).clamp(min=1e-8).sqrt()
        turned = cosine * math.cos(self.margin) - sine * math.sin(self.margin)
        return torch.where(cosine > -math.cos(self.margin), turned, cosine - self.margin * math.sin(self.margin))

    @torch.no_grad()
    def _compare_all(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logs of the sums over classes but one's own, ``(B,)``, and each class's highest similarity, ``(C,)``."""
        log_others, highest = embeddings.new_full((len(embeddings),), -math.inf), []
        for block, by_class in enumerate(self._by_class().split(BLOCK)):
            similarities, start = cosines(embeddings, by_class), block * BLOCK
            highest.append(similarities.amax(dim=0))
            inside = (labels >= start) & (labels < start + BLOCK)
            similarities[inside, labels[inside] - start] = -math.inf
            log_others = torch.logaddexp(log_others, (self.scale * similarities).logsumexp(dim=1))
        return log_others, torch.cat(highest)

    @staticmethod
    def _draw(highest: Tensor, labels: Tensor, n: int, seed: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The classes of a step, ascending, and for how many classes each stands."""
        own, n_classes = labels.unique(), len(highest)
        n_hardest = max(0, n - len(own)) // 2
        n_random = min(n_classes - len(own) - n_hardest, max(1, n - len(own) - n_hardest))
        highest[own] = math.inf
        certain = highest.topk(len(own) + n_hardest).indices
        draws = torch.from_numpy(np.random.default_rng(seed).random(n_classes, dtype=np.float32)).to(highest)
        draws[certain] = -1
        counts = torch.zeros_like(highest)
        counts[certain] = 1
        counts[draws.topk(n_random).indices] = (n_classes - len(certain)) / max(1, n_random)
        classes = counts.nonzero().squeeze(1)
        return classes, counts[classes]


def cosines(embeddings: Tensor, by_class: Tensor) -> Tensor:
    """Cosines ``(B, C)`` of embeddings of unit length and the nearest vector of each class, of ``(C, centres, D)``."""
    similarities = embeddings @ F.normalize(by_class, dim=2).flatten(0, 1).T
    return similarities.unflatten(1, by_class.shape[:2]).max(dim=2).values  # of equal ones the first alone


def start_at_prototypes(classifier: Classifier, descriptors: np.ndarray, labels: np.ndarray) -> None:
    """Put the prototypes of images ``(N, D)`` in place of class weights; classes without an image keep theirs."""
    prototypes = prototypes_of(Searchable(as_compared(descriptors, None), labels, np.arange(len(labels))))
    with torch.no_grad():
        for centre in range(classifier.centres):
            rows = torch.from_numpy(prototypes.labels * classifier.centres + centre)
            classifier.weight[rows] = torch.from_numpy(prototypes.rows).to(classifier.weight)


def class_rows(classifier: Classifier) -> tuple[np.ndarray, np.ndarray]:
    """Class weights as rows to search, float32 ``(M, D)`` of unit length, and the label of each."""
    rows = F.normalize(classifier.weight.detach().float(), dim=1).cpu().numpy()
    return rows, np.arange(len(rows)) // classifier.centres


def classifier_entry(
    classifier: Classifier, exhibit_ids: np.ndarray, data: "PairDataModule | None"
) -> dict[str, Tensor]:
    """What a checkpoint says of a classifier: the exhibit of each row, and those without a usable image in training."""
    entry = {"exhibit_ids": torch.from_numpy(exhibit_ids).repeat_interleave(classifier.centres)}
    if data is not None and hasattr(data, "is_valid"):  # images were described
        labels = data.ground_truth.labels["database"]
        untrained = np.setdiff1d(labels, labels[data.is_valid["database"]])
        entry["untrained"] = torch.from_numpy(exhibit_ids[untrained])
    return entry
