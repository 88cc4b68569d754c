"""A parametric classifier: one learned vector an exhibit, or a few, trained by pytorch-metric-learning's losses.

Its class weights, the columns of ``W``, are what an evaluation searches with ``database_rows`` classifier.
"""

from typing import Any

import numpy as np
import torch
from pytorch_metric_learning import losses
from torch import Tensor, nn
from torch.nn import functional as F

from metilr.evaluation.database import Searchable, as_compared, prototypes_of
from metilr.training import FineTuningOptions

SUB_CENTRES = 3  # the sub-centre paper's (Deng et al., ECCV 2020)


def build_classifier(options: FineTuningOptions, n_classes: int, dim: int, seed: int = 0) -> nn.Module:
    """Build the classifier that options name for embeddings ``(B, dim)``, with class weights at random.

    With θ the angles between an embedding and the class weights, y its class and s the scale, the loss is the
    cross-entropy of s · cos θ (cosine), or of the same with cos(θ_y + margin) for y (arcface), which asks for more than
    being nearest; subcenter takes for each class the nearest of three vectors. The mean over the batch.

    Source: Wang et al., NormFace, 2017; Deng et al., ArcFace, CVPR 2019; Deng et al., Sub-center ArcFace, ECCV 2020.
    """
    sizes = {"num_classes": n_classes, "embedding_size": dim}
    margin: dict[str, Any] = {"margin": options.classifier_margin, "scale": options.classifier_scale}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        classifier: nn.Module
        if options.classifier == "cosine":
            classifier = losses.NormalizedSoftmaxLoss(**sizes, temperature=1 / options.classifier_scale)
        elif options.classifier == "arcface":
            classifier = losses.ArcFaceLoss(**sizes, **margin)
        else:
            classifier = losses.SubCenterArcFaceLoss(**sizes, **margin, sub_centers=SUB_CENTRES)
    with torch.no_grad():  # as prototypes are: only directions count, and longer weights turn more slowly
        class_weights(classifier).copy_(F.normalize(class_weights(classifier), dim=0))
    return classifier


def start_at_prototypes(classifier: nn.Module, descriptors: np.ndarray, labels: np.ndarray) -> None:
    """Put the prototypes of images ``(N, D)`` in place of class weights; classes without an image keep theirs."""
    weights, n_centres = class_weights(classifier), centres(classifier)
    prototypes = prototypes_of(Searchable(as_compared(descriptors, None), labels, np.arange(len(labels))))
    with torch.no_grad():
        for centre in range(n_centres):
            columns = torch.from_numpy(prototypes.labels * n_centres + centre)
            weights[:, columns] = torch.from_numpy(prototypes.rows.T).to(weights)


def class_rows(classifier: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """Class weights as rows to search, float32 ``(M, D)`` of unit length, and the label of each."""
    weights = class_weights(classifier).detach()
    rows = F.normalize(weights.T.float(), dim=1).cpu().numpy()
    return rows, np.arange(len(rows)) // centres(classifier)


def class_weights(classifier: nn.Module) -> Tensor:
    """The classifier's weights, ``(D, M)``: those of one class are columns side by side."""
    weights = classifier.W
    assert isinstance(weights, Tensor)
    return weights


def centres(classifier: nn.Module) -> int:
    """Vectors of each class."""
    return SUB_CENTRES if isinstance(classifier, losses.SubCenterArcFaceLoss) else 1
