"""The reference code's ``descriptors.pkl``: read without running what a pickle asks for, and written."""

import math
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from metilr.errors import UserError
from metilr.extraction.store import SPLITS, DescriptorStore
from metilr.files import new_file


def load_arrays(stream: IO[bytes]) -> Any:
    """Read a pickle of NumPy arrays of plain types in dicts, lists, tuples, with strings and numbers.

    Args:
        stream: A file, from its beginning.

    Returns:
        The content, with a ``PickledArray`` for each array.

    Raises:
        UserError: If the pickle asks for anything else.
        Exception: Of nearly any type, if it is damaged.
    """
    return _ArrayUnpickler(stream).load()


def shown(value: object) -> str:
    """What a file chose, short and without line ends or a terminal's control characters."""
    text = str(value) if isinstance(value, (str, Exception)) else f"a {type(value).__name__}"
    return ascii(text[:60] + ("..." if len(text) > 60 else ""))


# What NumPy's arrays and plain containers consist of in protocols 0 to 5; _ArrayUnpickler adds its own. Not among
# them: persistent ids, extension codes, out-of-band buffers, sets, and whatever makes instances of classes.
_OPERATIONS = [
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET",
    "LONG_BINGET", "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4",
    "FLOAT", "BINFLOAT", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES",
    "BINBYTES8", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "LIST", "APPEND", "APPENDS",
    "EMPTY_DICT", "GLOBAL", "STACK_GLOBAL",
]  # fmt: skip


class _Operations(dict[int, Any]):
    def __missing__(self, code: int) -> None:
        if code in pickle._Unpickler.dispatch:
            raise UserError(f"refused: it uses pickle's operation {bytes([code])!r}, which NumPy arrays do without")
        raise pickle.UnpicklingError("no pickle")


class _ArrayUnpickler(pickle._Unpickler):
    """Pickle's machine with fewer operations, none of which calls or changes anything but the stand-ins below.

    The machine in Python, not the one in C, which takes memory for whatever a pickle declares: 64 GB for the
    memo number 2**32, say. NumPy's own classes are not let through: a crafted state makes them take raw bytes
    for object pointers.
    """

    dispatch = _Operations({op[0]: pickle._Unpickler.dispatch[op[0]] for op in (vars(pickle)[o] for o in _OPERATIONS)})
    dispatch[pickle.BYTEARRAY8[0]] = dispatch[pickle.BINBYTES8[0]]  # nobody writes to them here; bytes are not copied
    pop_mark: Callable[[], list[Any]]
    stack: list[Any]

    def __init__(self, stream: IO[bytes]) -> None:
        size = os.fstat(stream.fileno()).st_size
        super().__init__(_Bounded(stream, size))
        self._unspent = size  # bytes that calls may still make: those of the file, once

    def find_class(self, module: str, name: str) -> "_Name":
        package = module.replace("numpy._core", "numpy").replace("numpy.core", "numpy")
        if f"{package}.{name}" not in _CALLS:
            asked = shown(f"{module}.{name}")
            raise UserError(f"refused: it asks for {asked}, but only NumPy arrays and containers are read")
        return _Name(f"{package}.{name}")

    def load_reduce(self) -> None:
        arguments, name = self.stack.pop(), self.stack.pop()
        if type(name) is not _Name or type(arguments) is not tuple:
            raise UserError("refused: it calls what is not a name")
        made = _CALLS[name.name](*arguments)
        if type(made) is bytes:  # of a text that may be recalled any number of times
            self._unspent -= len(made)
            if self._unspent < 0:
                raise UserError("refused: it makes more bytes than the file has")
        self.stack.append(made)

    dispatch[pickle.REDUCE[0]] = load_reduce

    def load_build(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if type(made) not in (PickledArray, _PlainType):
            raise UserError(f"refused: it changes the state of a {type(made).__name__}")
        made.build(state)

    dispatch[pickle.BUILD[0]] = load_build

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    dispatch[pickle.SETITEM[0]] = load_setitem

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    dispatch[pickle.SETITEMS[0]] = load_setitems

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self._set(items)

    dispatch[pickle.DICT[0]] = load_dict

    def _set(self, items: list[Any]) -> None:
        """Only with keys whose hash is cheap: that of nested tuples takes the C stack, or for ever."""
        target = self.stack[-1]
        if type(target) is not dict:
            raise UserError(f"refused: it sets items of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str and not (type(key) is int and -(2**63) <= key < 2**63):
                raise UserError(f"refused: a key of type {type(key).__name__} in a dict")
            target[key] = value


class _Bounded:
    """A stream that takes no memory for bytes that the file does not have."""

    def __init__(self, stream: IO[bytes], size: int) -> None:
        self._stream, self._size = stream, size
        self.readline = stream.readline

    def read(self, n: int) -> bytes:
        content = self._stream.read(min(n, self._size))
        if len(content) < n:
            raise EOFError("it ends too early")
        return content


class _Name(NamedTuple):
    """Stands for a class or function: says which, and holds nothing that could be called or changed."""

    name: str


class _PlainType:
    """Stands for ``numpy.dtype``: numbers of the usual sizes and text, no objects, no fields."""

    __slots__ = ("dtype",)

    def __init__(self, code: str, *_: Any) -> None:
        if type(code) is not str or not re.fullmatch(r"b1|[iu][1248]|f[248]|c8|c16|[SU][0-9]{1,6}", code):
            raise UserError(f"refused: an array of type {shown(code)}")
        self.dtype = np.dtype(code)

    def build(self, state: Any) -> None:
        """Set the byte order; what follows it is empty for plain types."""
        if type(state) is not tuple or len(state) < 2 or type(state[1]) is not str or state[1] not in tuple("<>|="):
            raise UserError("refused: an array type of an unusual kind")
        self.dtype = self.dtype.newbyteorder(state[1])  # type: ignore[arg-type]


class PickledArray:
    """Stands for ``numpy.ndarray``: made from bytes by ``frombuffer``, once their number is checked."""

    __slots__ = ("array",)

    def __init__(self) -> None:
        self.array: np.ndarray = np.empty(0)

    def build(self, state: Any) -> None:
        """Set shape, type, order and content."""
        if type(state) is not tuple or len(state) != 5:
            raise UserError("refused: an array of an unusual kind")
        _version, shape, kind, is_fortran, content = state
        if type(kind) is not _PlainType or type(content) is not bytes or type(is_fortran) not in (bool, int):
            raise UserError("refused: an array of an unusual kind")
        if type(shape) is not tuple or len(shape) > 32 or not all(type(n) is int and 0 <= n < 2**63 for n in shape):
            raise UserError("refused: an array of an impossible shape")
        if math.prod(shape) * kind.dtype.itemsize != len(content):
            raise UserError(f"refused: an array of shape {shape} and type {kind.dtype} in {len(content):,} bytes")
        self.array = np.frombuffer(content, kind.dtype).reshape(shape, order="F" if is_fortran else "C")


def _empty_array(subtype: Any, shape: Any, _kind: Any) -> PickledArray:
    """What NumPy's pickles start from; shape and content follow as state."""
    if type(subtype) is not _Name or subtype.name != "numpy.ndarray" or type(shape) is not tuple or shape != (0,):
        raise UserError("refused: an array of an unusual kind")
    return PickledArray()


def _array_from_buffer(buffer: Any, kind: Any, shape: Any, order: Any) -> PickledArray:
    if type(order) is not str or order not in ("C", "F"):
        raise UserError("refused: an array of an unusual order")
    made = PickledArray()
    made.build((1, shape, kind, order == "F", buffer))
    return made


def _array_called_directly(*_: Any) -> None:
    raise UserError("refused: an array of an unusual kind")


def _latin1_bytes(text: Any, encoding: Any) -> bytes:
    """Old protocols store bytes as text."""
    if type(text) is not str or type(encoding) is not str or encoding != "latin1":
        raise UserError(f"refused: it asks for the codec {shown(encoding)}")
    return text.encode("latin1")


def _empty_dict() -> dict[Any, Any]:
    return {}


_CALLS: dict[str, Callable[..., Any]] = {
    "numpy.multiarray._reconstruct": _empty_array,
    "numpy.numeric._frombuffer": _array_from_buffer,
    "numpy.ndarray": _array_called_directly,
    "numpy.dtype": _PlainType,
    "_codecs.encode": _latin1_bytes,
    "collections.OrderedDict": _empty_dict,
}


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
    """Write a store as descriptors.pkl.

    Args:
        store: Folder of a finished descriptor store.
        output: The pickle to write; must not exist yet.

    Raises:
        UserError: If the store is unfinished or left images out (the format cannot say so), or ``output``
            exists.
    """
    source = DescriptorStore(store)
    if not source.is_complete:
        raise UserError(f"{store}: is not finished; run the evaluation that makes it again to complete it")
    left_out = sum(int((~source.is_valid(split)).sum()) for split in SPLITS)
    if left_out:
        raise UserError(
            f"{store}: {left_out:,} images were left out, which descriptors.pkl cannot say; mend them first"
        )
    if output.exists():
        raise UserError(f"{output}: exists already; name another file")
    content = {KEYS[split]: np.array(source.descriptors(split)) for split in SPLITS}
    try:
        with new_file(output) as stream:
            pickle.dump(content, stream, protocol=4)  # the first protocol without a 4 GB limit
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror}); name another file") from None
    print(f"wrote {output}")
