"""Where a whitening can be read from: a file of its own, or a checkpoint."""

from pathlib import Path

import torch

from metilr.checkpoints import read_checkpoint
from metilr.errors import UserError
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
    entry = read_checkpoint(path).get("metilr", {}).get("whitening")
    if entry is None:
        raise UserError(f"--whitening {path}: this checkpoint holds no whitening; metilr pack writes one that does")
    parts = {name: part.numpy() for name, part in entry.items() if isinstance(part, torch.Tensor)}
    try:
        return whitening_from_parts(str(entry.get("kind")), parts)
    except (ValueError, KeyError) as error:
        raise UserError(f"--whitening {path}: its whitening cannot be read ({error}); pack it anew") from None
