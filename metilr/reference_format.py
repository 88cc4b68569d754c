"""The reference code's ``descriptors.pkl``: read without running what a pickle asks for, and written.

It is a pickle of a dict of NumPy arrays: ``train_descriptors``, ``val_descriptors``, ``test_descriptors``.

Source: the code released with Ypsilantis et al., The Met Dataset, NeurIPS 2021.
"""

import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np

from metilr.descriptors import SPLITS, DescriptorStore
from metilr.errors import UserError

KEYS = {"database": "train_descriptors", "val": "val_descriptors", "test": "test_descriptors"}


def read_reference_descriptors(file: Path) -> dict[str, np.ndarray]:
    """Read a ``descriptors.pkl``. Only NumPy arrays of plain types, dicts, lists, strings and numbers are let through.

    Args:
        file: The pickle.

    Returns:
        Descriptors by split, each ``(n, D)``, of the file's floating type.

    Raises:
        UserError: If the file asks for anything else, cannot be read, or lacks one of the three matrices.
    """
    try:
        with Path(file).open("rb") as stream:
            content = _ArrayUnpickler(stream).load()
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except Exception as error:  # a damaged pickle raises nearly any type
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{file}: not a readable descriptors.pkl ({reason}); write or download it again") from None
    if not isinstance(content, dict) or not set(KEYS.values()) <= content.keys():
        raise UserError(f"{file}: must hold a dict with {', '.join(KEYS.values())}")
    matrices = {}
    for split, key in KEYS.items():
        pickled = content[key]
        if not isinstance(pickled, _Array) or pickled.array.ndim != 2 or pickled.array.dtype.kind != "f":
            raise UserError(f"{file}: {key} must be a 2-D NumPy array of floats")
        matrices[split] = pickled.array
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
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as stream:
            pickle.dump(content, stream, protocol=4)  # the first protocol without a 4 GB limit
        temporary.replace(output)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror}); name another file") from None
    finally:
        temporary.unlink(missing_ok=True)
    print(f"wrote {output}")


class _ArrayUnpickler(pickle.Unpickler):
    """Knows the few names that a pickled NumPy array asks for, and gives each a stand-in that only makes arrays.

    NumPy's own classes are not let through: a crafted state makes them take raw bytes for object pointers.
    """

    def find_class(self, module: str, name: str) -> Any:
        package = module.replace("numpy._core", "numpy").replace("numpy.core", "numpy")
        found = {
            "numpy.multiarray._reconstruct": _empty_array,
            "numpy.numeric._frombuffer": _array_from_buffer,
            "numpy.ndarray": _Array,
            "numpy.dtype": _PlainType,
            "_codecs.encode": _latin1_bytes,
            "collections.OrderedDict": dict,
        }.get(f"{package}.{name}")
        if found is None:
            raise UserError(f"refused: it asks for {module}.{name}, but only NumPy arrays and containers are read")
        return found


class _PlainType:
    """Stands for ``numpy.dtype``: numbers and text, no objects, no fields."""

    def __init__(self, code: str, *_: Any) -> None:
        if not re.fullmatch(r"[biufcSU]\d+", code):
            raise UserError(f"refused: an array of type {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])  # (version, byte order, then what plain types lack)


class _Array:
    """Stands for ``numpy.ndarray``: made from bytes by ``frombuffer``, which checks their number."""

    def __init__(self) -> None:
        self.array = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, shape, kind, is_fortran, content = state
        self.array = np.frombuffer(content, kind.dtype).reshape(shape, order="F" if is_fortran else "C")


def _empty_array(subtype: type, shape: tuple[int, ...], kind: bytes) -> _Array:
    """What NumPy's pickles start from; shape and content follow as state."""
    if subtype is not _Array or shape != (0,):
        raise UserError("refused: an array of an unusual kind")
    return _Array()


def _array_from_buffer(buffer: Any, kind: _PlainType, shape: tuple[int, ...], order: str) -> _Array:
    made = _Array()
    made.__setstate__((1, shape, kind, order == "F", buffer))
    return made


def _latin1_bytes(text: str, encoding: str) -> bytes:
    """Old protocols store bytes as text."""
    if encoding != "latin1":
        raise UserError(f"refused: it asks for the codec {encoding!r}")
    return text.encode("latin1")
