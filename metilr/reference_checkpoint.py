"""What is in a checkpoint of the reference code: a torchvision ResNet, GeM's exponent and a projector."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from metilr.models.weights import StateDict

# torchvision's ResNets: bottleneck blocks?, blocks of each stage, groups and width of the 3x3 convolution.
_RESNETS: dict[tuple[bool, tuple[int, ...], int, int], str] = {
    (False, (2, 2, 2, 2), 1, 64): "resnet18",
    (False, (3, 4, 6, 3), 1, 64): "resnet34",
    (True, (3, 4, 6, 3), 1, 64): "resnet50",
    (True, (3, 4, 23, 3), 1, 64): "resnet101",
    (True, (3, 4, 6, 3), 32, 128): "resnext50_32x4d",
    (True, (3, 4, 23, 3), 32, 128): "resnext101_32x4d",
    (True, (3, 4, 23, 3), 32, 256): "resnext101_32x8d",
    (True, (3, 4, 23, 3), 32, 512): "resnext101_32x16d",
}
# The reference code keeps a torchvision ResNet as a list of its children: these positions carry weights.
_CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


def split_reference(state_dict: Mapping[str, Any]) -> tuple[StateDict, torch.Tensor | None, StateDict]:
    """Sort a reference state dict into the ResNet's weights by torchvision's names, GeM's p, and the projector."""
    weights: StateDict = {}
    projector: StateDict = {}
    p = None
    for key, value in state_dict.items():
        name = re.sub(r"^(module\.|backbone\.)+", "", key)
        if name == "pool.p":
            p = value
        elif name.startswith("projector."):
            projector[name.rpartition(".")[2]] = value
        else:
            child, _, rest = name.partition(".")
            weights[f"{_CHILDREN.get(child, child)}.{rest}"] = value
    return weights, p, projector


def architecture_of(weights: StateDict) -> str | None:
    """Name the ResNet whose weights have these shapes; None if none is known."""
    kernel = weights.get("layer1.0.conv2.weight")
    if kernel is None or kernel.ndim != 4:
        return None
    blocks = tuple(len({key.split(".")[1] for key in weights if key.startswith(f"layer{i}.")}) for i in range(1, 5))
    groups = kernel.shape[0] // max(kernel.shape[1], 1)
    return _RESNETS.get(("layer1.0.conv3.weight" in weights, blocks, groups, kernel.shape[0]))
