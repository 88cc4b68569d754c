"""Where a whitening can be read from: a file of its own, or a checkpoint."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from metilr.checkpoints import read_checkpoint
from metilr.errors import UserError, one_line
from metilr.kinds import require
from metilr.whitening import PCAWhitening, whitening_from_parts

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
