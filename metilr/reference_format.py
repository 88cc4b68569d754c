"""The reference code's ``descriptors.pkl``: read without running what a pickle asks for, and written.

It is a pickle of a dict of NumPy arrays: ``train_descriptors``, ``val_descriptors``, ``test_descriptors``.

Source: the code released with Ypsilantis et al., The Met Dataset, NeurIPS 2021.
"""

import pickle
from pathlib import Path

import numpy as np

from metilr.array_pickle import PickledArray, load_arrays, shown
from metilr.descriptors import SPLITS, DescriptorStore
from metilr.errors import UserError
from metilr.files import new_file

KEYS = {"database": "train_descriptors", "val": "val_descriptors", "test": "test_descriptors"}


def read_reference_descriptors(file: Path) -> dict[str, np.ndarray]:
    """Read a ``descriptors.pkl``. Only NumPy arrays of plain types, containers, strings and numbers are let through.

    Args:
        file: The pickle.

    Returns:
        Descriptors by split, each ``(n, D)``, of the file's floating type.

    Raises:
        UserError: If the file asks for anything else, cannot be read, or lacks one of the three matrices, or one
            of them is empty.
    """
    try:
        with Path(file).open("rb") as stream:
            content = load_arrays(stream)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except Exception as error:  # a damaged pickle raises nearly any type
        reason = f"{type(error).__name__}: {shown(error)}"
        raise UserError(f"{file}: not a readable descriptors.pkl ({reason}); write or download it again") from None
    if type(content) is not dict or not set(KEYS.values()) <= content.keys():
        raise UserError(f"{file}: must hold a dict with {', '.join(KEYS.values())}")
    matrices = {}
    for split, key in KEYS.items():
        matrix = content[key].array if type(content[key]) is PickledArray else None
        if matrix is None or matrix.ndim != 2 or matrix.dtype.kind != "f":
            raise UserError(f"{file}: {key} must be a 2-D NumPy array of floats")
        if not matrix.size:
            raise UserError(f"{file}: {key} is empty, of shape {matrix.shape}; extract it again")
        matrices[split] = matrix
    return matrices


def export_descriptors(store: Path, output: Path) -> None:
    """Write a descriptor store as the reference code's descriptors.pkl.

    Args:
        store: Folder of a finished descriptor store.
        output: The pickle to write; must not exist yet.

    Raises:
        UserError: If the store is unfinished or left images out (the format cannot say so), or ``output``
            exists.
    """
    source = DescriptorStore(store)
    if not source.manifest()["complete"]:
        raise UserError(f"{store}: is not finished; run the evaluation that makes it again to complete it")
    left_out = sum(int((~source.made(split)).sum()) for split in SPLITS)
    if left_out:
        raise UserError(
            f"{store}: {left_out:,} images were left out, which descriptors.pkl cannot say; mend them first"
        )
    if output.exists():
        raise UserError(f"{output}: exists already; name another file")
    content = {KEYS[split]: np.array(source.rows(split)) for split in SPLITS}
    try:
        with new_file(output) as stream:
            pickle.dump(content, stream, protocol=4)  # the first protocol without a 4 GB limit
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror}); name another file") from None
    print(f"wrote {output}")
