"""The reference code's ``descriptors.pkl``: read without executing it, and written.

A pickle is a program: it names functions and calls them. The reader here knows a few of NumPy's names alone, and has
for each something of its own that makes plain arrays and nothing else.
"""

import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from metilr.errors import UserError, amount_is, shown
from metilr.extraction.store import SPLITS, DescriptorStore
from metilr.files import new_file, regular

KEYS = {"database": "train_descriptors", "val": "val_descriptors", "test": "test_descriptors"}
PLAIN = re.compile(r"[fiub][1248]|[US][0-9]{1,6}", re.ASCII)  # array types without pointers


def read_reference_descriptors(file: Path) -> dict[str, np.ndarray]:
    """Read a ``descriptors.pkl``: by split ``(n, D)``, of the file's floating type.

    Only NumPy arrays of plain types, containers, strings and numbers are let through.
    """
    try:
        with regular(Path(file)).open("rb") as stream:
            content = _ArrayUnpickler(_Bounded(stream)).load()
    except OSError:
        raise
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except Exception as error:  # a damaged pickle raises nearly any type
        reason = f"{type(error).__name__}: {shown(str(error))}"
        raise UserError(f"{file}: not a readable descriptors.pkl ({reason}); write or download it again") from None
    if type(content) is not dict or not set(KEYS.values()) <= content.keys():
        raise UserError(f"{file}: must hold a dict with {', '.join(KEYS.values())}")
    matrices = {}
    for split, key in KEYS.items():
        matrix = getattr(content[key], "array", None) if type(content[key]) is _Array else None
        if matrix is None or matrix.ndim != 2 or matrix.dtype.kind != "f":
            raise UserError(f"{file}: {key} must be a 2-D NumPy array of floats")
        if not matrix.size:
            raise UserError(f"{file}: {key} is empty, of shape {matrix.shape}; extract it again")
        matrices[split] = matrix
    return matrices


class _ArrayUnpickler(pickle._Unpickler):
    """Knows the names that arrays of plain types are pickled by.

    Python's own reader in Python: the one in C takes gigabytes for a number that a few bytes of a file name.
    """

    def __init__(self, stream: "_Bounded") -> None:
        super().__init__(stream)
        self.encoded, self.size = 0, stream.size
        rebuilt = _Call(lambda *_: _Array())  # the array's state follows
        self.names: dict[str, Callable[..., Any]] = {
            "numpy.ndarray": rebuilt,
            "numpy.dtype": _Call(_Type),
            "_codecs.encode": _Call(self.encode),
            "collections.OrderedDict": _Call(dict),
        }
        for core in ("numpy.core", "numpy._core"):  # of NumPy 1 and 2
            self.names[f"{core}.multiarray._reconstruct"] = rebuilt
            self.names[f"{core}.numeric._frombuffer"] = _Call(_Array.of_buffer)

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self.names:
            raise _refused(f"it names {shown(f'{module}.{name}')}")
        return self.names[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> Any:
        raise _refused("it refers to something outside itself")

    def encode(self, text: str, encoding: str) -> bytes:
        """Bytes as pickles of protocols 0 to 2 hold them, no more of them than the file has."""
        self.encoded += len(text)
        if encoding != "latin1" or self.encoded > self.size:
            raise _refused("it makes text into bytes in an unusual way")
        return text.encode("latin1")


class _Call:
    """A function that a pickle can call and not change."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise _refused("it changes the state of a function")


class _Type:  # of an array, such as <f4
    __slots__ = ("dtype",)

    def __init__(self, code: Any, *_: Any) -> None:
        if type(code) is not str or not PLAIN.fullmatch(code):
            raise _refused(f"an array of type {shown(code)}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        if type(state) is not tuple or len(state) < 5 or state[1] not in ("<", ">", "|", "=") or any(state[2:5]):
            raise _refused("an array type of an unusual kind")
        if state[1] in "<>":
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """An array in the making."""

    __slots__ = ("array",)
    array: np.ndarray

    def __setstate__(self, state: Any) -> None:
        if type(state) is not tuple or len(state) != 5:
            raise _refused("an array of an unusual kind")
        _, shape, kind, is_fortran, content = state
        self._make(content, kind, shape, {True: "F", False: "C"}.get(is_fortran) if type(is_fortran) is bool else None)

    @classmethod
    def of_buffer(cls, content: Any, kind: Any, shape: Any, order: Any) -> "_Array":
        made = cls()
        made._make(bytes(content) if type(content) is bytearray else content, kind, shape, order)
        return made

    def _make(self, content: Any, kind: Any, shape: Any, order: Any) -> None:
        if type(kind) is not _Type or type(content) is not bytes or order not in ("C", "F"):
            raise _refused("an array of an unusual kind")
        if type(shape) is not tuple or not all(type(side) is int and side >= 0 for side in shape) or len(shape) > 8:
            raise _refused("an array of an impossible shape")
        if math.prod(shape) * kind.dtype.itemsize != len(content):
            raise _refused(f"an array of shape {shown(shape)} in {len(content):,} bytes")
        self.array = np.frombuffer(content, kind.dtype).reshape(shape, order=order)


class _Bounded:
    """A file that takes no memory for bytes that it does not have, whatever a pickle claims."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.size = stream, stream.seek(0, 2)
        stream.seek(0)
        self.readline = stream.readline

    def read(self, n: int) -> bytes:
        if not 0 <= n <= self.size - self.stream.tell():
            raise EOFError("it claims more bytes than the file has")
        return self.stream.read(n)


def _refused(what: str) -> UserError:
    return UserError(f"refused: {what}; take the file from its publisher, or extract descriptors anew")


def export_descriptors(store: Path, output: Path) -> None:
    """Write a store as a descriptors.pkl.

    Args:
        store: Folder of a finished descriptor store.
        output: The pickle to write, for the Met paper's reference code; must not exist yet.
    """
    source = DescriptorStore(store)
    source.require_complete()
    left_out = sum(int((~source.is_valid(split)).sum()) for split in SPLITS)
    if left_out:
        lacks = f"{amount_is(left_out, 'image', 'was', 'were')} left out"
        raise UserError(f"{store}: {lacks}, which descriptors.pkl cannot say; mend the images")
    if output.exists():
        raise UserError(f"{output}: exists already; name another file", "output")
    with new_file(output) as stream:
        content = {KEYS[split]: np.array(source.descriptors(split)) for split in SPLITS}
        pickle.dump(content, stream, protocol=4)  # the first protocol without a 4 GB limit
    print(f"wrote {output}")
