"""How descriptors are compared, and the options of an evaluation."""

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from metilr.data.views import CentreCrops, SimulatedVisits, View
from metilr.errors import UserError, one_line, require
from metilr.models.checkpoints import read_checkpoint
from metilr.retrieval.whitening import PAIR_SHRINKAGE, PCAWhitening, whitening_from_parts

CHECKPOINT = ".ckpt"


def load_whitening(path: str | Path) -> PCAWhitening:
    """Read a whitening that was saved, or the one in a checkpoint that ``metilr pack`` wrote.

    Raises:
        UserError: If there is none in the file, or it cannot be read.
    """
    path = Path(path)
    if path.suffix != CHECKPOINT:
        return PCAWhitening.load(path)
    content = read_checkpoint(path).get("metilr")
    entry = content.get("whitening") if isinstance(content, Mapping) else None
    if entry is None:
        raise UserError(f"--whitening {path}: this checkpoint holds no whitening; metilr pack writes one that does")
    try:
        parts = {name: _array(part) for name, part in entry.items() if isinstance(part, torch.Tensor)}
        kind = entry.get("kind")
        require(isinstance(kind, str), "kind", kind)
        return whitening_from_parts(kind, parts)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"--whitening {path}: its whitening cannot be read ({one_line(error)}); pack it anew"
        ) from error


def _array(tensor: torch.Tensor) -> np.ndarray:
    if tensor.nelement() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError("a tensor claims more numbers than the file has")
    return np.array(tensor.numpy())


DatabaseViews = Literal["none", "rows"]
MAX_VISITS = 1000
VISITS = 6  # of each database image, where a learned whitening needs some and nothing is said: two scenes


@dataclass(frozen=True)
class Method:
    """What is done with descriptors before and in the search. The defaults are the published recipe.

    Attributes:
        whitening: ``"pca"``, ``"learned"`` (from pairs: a database image and its simulated visits, and images of one
            exhibit), ``"none"``, or a file that was saved.
        whitening_dim: Dimensions to keep; None: 512 (pca) or all (learned), or as many as the data supports.
        whitening_shrinkage: Of pca: 1 is whitening, 0 plain PCA.
        pair_shrinkage: Of learned: weight of the identity in the covariance of pairs' differences.
        visits: Simulated visits of each database image.
        database_views: ``"rows"``: visits are further rows of the image's exhibit.
        query_crops: Centre crops of each query that are searched beside it, as shares of its height and width; the best
            counts.
    """

    whitening: str = "pca"
    whitening_dim: int | None = None
    whitening_shrinkage: float = 1.0
    pair_shrinkage: float = PAIR_SHRINKAGE
    visits: int = 0
    database_views: DatabaseViews = "none"
    query_crops: Sequence[float] = ()

    @property
    def is_learned(self) -> bool:
        """Whether the whitening is learned from pairs."""
        return self.whitening == "learned"

    @property
    def rows_per_image(self) -> int:
        """Searched rows of each database image."""
        return 1 + self.visits if self.database_views == "rows" else 1

    def views(self, seed: int) -> list[View]:
        """The views that must be described besides the images."""
        views: list[View] = []
        if self.visits:
            views.append(SimulatedVisits(self.visits, seed))
        if self.query_crops:
            views.append(CentreCrops(tuple(self.query_crops)))
        return views

    def check(self, n_database: int, width: int, n_classes: int) -> None:
        """Refuse what cannot work with such a database, before hours go into describing it.

        Args:
            n_database: Images in the database.
            width: Dimensions of the descriptors.
            n_classes: Exhibits in the database.

        Raises:
            UserError: If an option is not usable, or would have no effect; names it.
        """
        self._check_whitening(n_database, width)
        if self.database_views not in get_args(DatabaseViews):
            raise UserError(
                f"--database_views {self.database_views}: choose one of {', '.join(get_args(DatabaseViews))}"
            )
        if self.visits < 0:
            raise UserError(f"--visits {self.visits}: choose 0 (off) or more")
        if self.visits > MAX_VISITS:
            raise UserError(f"--visits {self.visits}: choose {MAX_VISITS:,} or fewer")
        if self.visits and not self.is_learned and self.database_views == "none":
            raise UserError(
                "--visits: has no effect without --whitening learned or --database_views rows; leave it out"
            )
        if self.is_learned and not self.visits and n_database <= n_classes:
            raise UserError(
                "--visits 0: with one image an exhibit --whitening learned has no pairs to learn from; leave it out"
            )
        if self.database_views != "none" and not self.visits:
            raise UserError(f"--database_views {self.database_views}: needs --visits, such as {VISITS}")
        if not all(0 < share < 1 for share in self.query_crops):
            raise UserError(
                f"--query_crops {list(self.query_crops)}: choose shares between 0 and 1 (the whole is searched as well)"
            )
        if len(set(self.query_crops)) < len(self.query_crops):
            raise UserError(f"--query_crops {list(self.query_crops)}: names a share twice; name each once")

    def _check_whitening(self, n_database: int, width: int) -> None:
        is_file = self.whitening not in ("pca", "learned", "none")
        if is_file and not Path(self.whitening).is_file():
            raise UserError(
                f"--whitening {self.whitening}: no such file; choose pca, learned, none or a saved whitening"
            )
        if self.whitening_dim is not None and self.whitening not in ("pca", "learned"):
            raise UserError("--whitening_dim: has no effect unless --whitening pca or learned learns one; leave it out")
        if self.whitening_shrinkage != 1 and self.whitening != "pca":
            raise UserError("--whitening_shrinkage: has no effect unless --whitening pca learns one; leave it out")
        if self.pair_shrinkage != PAIR_SHRINKAGE and not self.is_learned:
            raise UserError("--pair_shrinkage: has no effect without --whitening learned; leave it out")
        if not 0 <= self.whitening_shrinkage <= 1:
            raise UserError(
                f"--whitening_shrinkage {self.whitening_shrinkage}: choose a number from 0 (PCA) to 1 (whitening)"
            )
        if not 0 < self.pair_shrinkage <= 1:
            raise UserError(f"--pair_shrinkage {self.pair_shrinkage}: choose a number above 0, at most 1")
        largest = min(n_database - 1, width)
        if self.whitening_dim is not None and not 1 <= self.whitening_dim <= largest:
            raise UserError(
                f"--whitening_dim {self.whitening_dim}: {n_database:,} database images of width {width} support 1 to "
                f"{largest}; choose one of these, or leave it out for the default"
            )
        if is_file and (learned_on := len(load_whitening(self.whitening).mean)) != width:
            raise UserError(
                f"--whitening {self.whitening}: is for descriptors of width {learned_on}, these have {width}"
            )


# Options that metilr had before, with the values that meant off.
DELETED = {"dba": (0,), "hubness": (0, None), "crop_similarity": ("best",)}


def without_deleted(options: Mapping[str, Any]) -> dict[str, Any]:
    """What was recorded, without options that metilr had before and that were off.

    Raises:
        ValueError: If one was on; names it.
    """
    for name in DELETED.keys() & options.keys():
        require(options[name] in DELETED[name], f"{name} (which metilr no longer has)", options[name])
    return {name: value for name, value in options.items() if name not in DELETED}


def method_of(options: Mapping[str, Any]) -> Method:
    """The method that a command's options name, with the visits that it needs if nothing is said about them."""
    chosen = {field.name: options[field.name] for field in dataclasses.fields(Method) if field.name in options}
    crops = chosen["query_crops"]
    chosen["query_crops"] = (crops,) if isinstance(crops, (int, float)) else tuple(crops)
    if chosen["visits"] is None:
        needed = chosen["whitening"] == "learned" or chosen["database_views"] != "none"
        chosen["visits"] = VISITS if needed else 0
    return Method(**chosen)


# Options that make descriptors from images.
OF_THE_MODEL = ("backbone", "weights", "pooling", "p", "stage", "patch_rounding")
OF_THE_IMAGES = ("ckpt", *OF_THE_MODEL, "scales", "image_size", "bad_images", "store", "engine", "profile")


def check_arguments(arguments: Mapping[str, Any], command: Callable[..., Any]) -> None:
    """Refuse values out of range, and options that would be ignored: recorded all the same, they would lie.

    Args:
        arguments: Values of ``evaluate``'s options.
        command: That function, whose signature has their defaults and choices.

    Raises:
        UserError: At the first such option.
    """
    defaults = {name: parameter.default for name, parameter in inspect.signature(command).parameters.items()}
    for name, kind in typing.get_type_hints(command).items():
        literals = [part for part in (kind, *typing.get_args(kind)) if typing.get_origin(part) is Literal]
        choices = [choice for literal in literals for choice in typing.get_args(literal)]
        value = arguments.get(name)
        may_be_number = int in typing.get_args(kind) and isinstance(value, int)
        if choices and value not in (*choices, defaults.get(name)) and not may_be_number:
            raise UserError(f"--{name} {value}: choose one of {', '.join(dict.fromkeys(map(str, choices)))}")
    changed = [name for name, value in arguments.items() if value != defaults[name]]
    idle = [name for name in changed if name in OF_THE_IMAGES] if arguments["descriptors"] else []
    if idle:
        raise UserError(f"--{idle[0]}: has no effect with --descriptors, which were made before; leave it out")
    idle = [name for name in changed if name in OF_THE_MODEL] if arguments["ckpt"] is not None else []
    if idle:
        raise UserError(f"--{idle[0]}: has no effect with --ckpt, which carries its model; leave it out")
    if "p" in changed and arguments["pooling"] != "gem":
        raise UserError(f"--p: has no effect with --pooling {arguments['pooling']}; leave it out")
    if arguments["geometric_check"] < 0:
        raise UserError(f"--geometric_check {arguments['geometric_check']}: choose 0 (off) or more")
    if arguments["geometric_check"] and arguments["descriptors"]:
        raise UserError(
            "--geometric_check: needs the model and the images; give --root with the model's options (and --store) "
            "instead of --descriptors"
        )
    if arguments["geometric_reorder"] and not arguments["geometric_check"]:
        raise UserError("--geometric_reorder: has no effect without --geometric_check, such as 20; leave it out")
    if arguments["report_pictures"] < 0:
        raise UserError(f"--report_pictures {arguments['report_pictures']}: choose 0 or more")
    if not 0 <= arguments["seed"] < 2**63:
        raise UserError(f"--seed {arguments['seed']}: choose a number from 0 to 2**63 - 1")
