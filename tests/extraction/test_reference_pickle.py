import builtins
import os
import pickle
import struct
import tracemalloc
import types

import numpy as np
import pytest

from metilr.errors import UserError
from metilr.extraction import descriptors as reference_pickle
from metilr.extraction.reference_pickle import export_descriptors, read_reference_descriptors
from metilr.extraction.store import SPLITS, DescriptorStore

KEYS = ("train_descriptors", "val_descriptors", "test_descriptors")


def matrices(dtype=np.float32, order="C"):
    rng = np.random.default_rng(0)
    return {
        key: np.array(rng.standard_normal((n, 3)), dtype=dtype, order=order)
        for key, n in zip(KEYS, (6, 4, 5), strict=True)
    }


def pickled(tmp_path, content, protocol=4):
    file = tmp_path / "descriptors.pkl"
    file.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
    return file


def refused(file):
    with pytest.raises(UserError) as caught:
        read_reference_descriptors(file)
    assert str(file) in str(caught.value) and str(caught.value).isprintable()
    assert len(str(caught.value)) < len(str(file)) + 250
    return str(caught.value)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(("dtype", "order"), [("<f4", "C"), ("<f4", "F"), ("<f8", "C"), (">f4", "F"), ("<f2", "C")])
def test_every_protocol_type_and_order_reads_as_written(tmp_path, protocol, dtype, order):
    written = matrices(dtype, order)
    read = read_reference_descriptors(pickled(tmp_path, written, protocol))
    assert list(read) == ["database", "val", "test"]
    for split, key in zip(SPLITS, KEYS, strict=True):
        assert read[split].dtype == written[key].dtype
        np.testing.assert_array_equal(read[split], written[key])


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_other_plain_content_is_let_through(tmp_path, protocol):
    extra = {"ids": np.arange(4), "names": np.array(["a", "bé"]), "mask": np.array([True]), "k": [1, 2.5, None, "x"]}
    sliced = {key: np.repeat(matrix, 2, axis=0)[::2] for key, matrix in matrices().items()}  # not contiguous
    read = read_reference_descriptors(pickled(tmp_path, {**sliced, **extra}, protocol))
    np.testing.assert_array_equal(read["val"], matrices()["val_descriptors"])


def test_the_old_module_name_of_numpy_is_known(tmp_path):
    content = pickle.dumps(matrices(), 2)
    assert b"numpy._core.multiarray" in content or b"numpy.core.multiarray" in content
    old = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert read_reference_descriptors(pickled(tmp_path, old))["test"].shape == (5, 3)


class _Calls:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("kind", ["system", "eval", "load", "getattr", "exec in object array"])
def test_hostile_pickles_are_refused_and_run_nothing(tmp_path, kind, protocol):
    canary = tmp_path / "canary"
    np.save(tmp_path / "x.npy", np.zeros(2))
    hostile = {
        "system": _Calls(os.system, f"touch {canary}"),
        "eval": _Calls(builtins.eval, f"open({str(canary)!r}, 'w')"),
        "load": _Calls(np.load, str(tmp_path / "x.npy")),
        "getattr": _Calls(getattr, "x", "upper"),
        "exec in object array": np.array([_Calls(builtins.exec, f"open({str(canary)!r}, 'w')")], dtype=object),
    }[kind]
    assert "refused: " in refused(pickled(tmp_path, {**matrices(), "extra": hostile}, protocol))
    assert not canary.exists()


def _operations(value):
    """Pickle's operations that put a value on the stack."""
    return pickle.dumps(value, 2)[2:-1]


def _name(module, name):
    return f"c{module}\n{name}\n".encode()


OBJECT_TYPE = _name("numpy", "dtype") + _operations(("O8", False, True)) + b"R"
POINTERS_SAID_TO_BE_PLAIN = OBJECT_TYPE + _operations((3, "|", None, None, None, -1, -1, 0)) + b"b"
FIELD_OF_POINTERS = (
    _name("numpy", "dtype") + _operations(("V8", False, True)) + b"R("
    + _operations(3) + _operations("|") + b"N" + _operations(("a",)) + b"}" + _operations("a") + OBJECT_TYPE
    + _operations(0) + b"\x86s" + _operations(8) + _operations(1) + _operations(0) + b"tb"
)  # fmt: skip


@pytest.mark.parametrize("kind", [POINTERS_SAID_TO_BE_PLAIN, FIELD_OF_POINTERS], ids=["object", "field"])
def test_bytes_are_never_taken_for_object_pointers(tmp_path, kind):
    # With NumPy's own dtype and ndarray, this array's elements are pointers to 0x41414141...: a crash or worse.
    array = _name("numpy._core.multiarray", "_reconstruct") + b"(" + _name("numpy", "ndarray")
    array += _operations((0,)) + b"\x8c\x01b" + b"tR"
    array += b"(" + _operations(1) + _operations((2,)) + kind + b"\x89C\x10" + b"A" * 16 + b"tb"
    message = refused(pickled(tmp_path, b"\x80\x04" + _name("collections", "OrderedDict") + array + b"\x85R."))
    assert "refused: an array of type" in message


def test_a_giant_shape_is_refused_without_taking_memory(tmp_path):
    empty = _name("numpy._core.multiarray", "_reconstruct") + b"(" + _name("numpy", "ndarray")
    float_type = _name("numpy", "dtype") + _operations(("f4", False, True)) + b"R"
    for start, shape in (((10**12,), (10**12,)), ((0,), (10**9, 10**4))):
        array = empty + _operations(start) + b"\x8c\x01b" + b"tR"
        array += b"(" + _operations(1) + _operations(shape) + float_type + b"\x89C\x04" + b"A" * 4 + b"tb"
        refused(pickled(tmp_path, b"\x80\x04" + array + b"."))
    direct = b"\x80\x04" + _name("numpy", "ndarray") + _operations(((10**12,),)) + b"R."
    assert "descriptors.pkl" in refused(pickled(tmp_path, direct))


RECONSTRUCT = _name("numpy._core.multiarray", "_reconstruct")
NDARRAY = _name("numpy", "ndarray")
FLOATS = _name("numpy", "dtype") + _operations(("f4", False, True)) + b"R"
EMPTY = RECONSTRUCT + b"(" + NDARRAY + _operations((0,)) + _operations("b") + b"tR"
FROM_BUFFER = _name("numpy._core.numeric", "_frombuffer")


def _state(shape, kind=FLOATS, content=b"B\x04\0\0\0AAAA", fortran=b"\x89"):
    """An array, its state given as operations."""
    return EMPTY + b"(K\x01" + shape + kind + fortran + content + b"tb"


HOSTILE = {
    # (a) objects without their constructor
    "NEWOBJ": (NDARRAY + b")\x81", "descriptors.pkl"),
    "NEWOBJ_EX": (NDARRAY + b")}\x92", "descriptors.pkl"),
    "OBJ": (b"(" + NDARRAY + b"o", "descriptors.pkl"),
    "INST": (b"(inumpy\nndarray\n", "descriptors.pkl"),
    "an array without a state": (EMPTY, "must hold a dict"),
    "a name alone": (NDARRAY, "must hold a dict"),
    # (b) state of what is not an array
    "BUILD on a function": (RECONSTRUCT + _operations((None, {"__defaults__": (1,), "x": 1})) + b"b", "refused"),
    "BUILD on a class": (NDARRAY + _operations({"x": 1}) + b"b", "refused"),
    "BUILD on a list": (b"]" + _operations({"x": 1}) + b"b", "descriptors.pkl"),
    "slots of an array": (EMPTY + _operations((None, {"array": 1})) + b"b", "refused"),
    "items of a function": (RECONSTRUCT + b"K\x01K\x01s", "descriptors.pkl"),
    "a name as data type": (_state(_operations((1,)), RECONSTRUCT), "refused"),
    "an array as data type": (_state(_operations((1,)), EMPTY), "refused"),
    "text as data type": (_state(_operations((1,)), _operations("O8")), "refused"),
    "text as content": (_state(_operations((1,)), content=_operations("AAAA")), "refused"),
    "an array as content": (_state(_operations((1,)), content=EMPTY), "refused"),
    "text as order": (_state(_operations((1,)), fortran=_operations("F")), "refused"),
    "a call of text": (_operations("os.system") + _operations(("ls",)) + b"R", "descriptors.pkl"),
    "a call without a tuple": (_name("collections", "OrderedDict") + b"]R", "descriptors.pkl"),
    "an odd byte order": (FLOATS + _operations((3, "x", None)) + b"b", "refused"),
    "a type without text": (_name("numpy", "dtype") + b"K\x01\x85R", "refused"),
    "a codec": (_name("_codecs", "encode") + _operations(("a", "rot13")) + b"R", "refused"),
    # (c) shapes and types
    "a negative shape": (_state(_operations((-1,))), "refused"),
    "two negative sides": (_state(_operations((-1, -1))), "refused"),
    "truth as shape": (_state(_operations((True,))), "refused"),
    "a list as shape": (_state(_operations([1])), "refused"),
    "a shape of lists": (_state(_operations(([1],))), "refused"),
    "a giant side": (_state(_operations((0, 10**30))), "refused"),
    "many sides": (_state(_operations((1,) * 40)), "refused"),
    "bytes left over": (_state(_operations((0,))), "refused"),
    "a buffer of terabytes": (
        FROM_BUFFER + b"(" + _operations(b"A") + FLOATS + _operations((10**12,)) + _operations("C") + b"tR",
        "refused",
    ),
    "a buffer's order": (
        FROM_BUFFER + b"(" + _operations(b"A") + FLOATS + _operations((1,)) + _operations("K") + b"tR",
        "refused",
    ),
    "Unicode digits": (_name("numpy", "dtype") + _operations(("f٤", False, True)) + b"R", "refused"),
    # what has no place in such a file
    "PERSID": (b"Psomething\n", "refused"),
    "EXT1": (b"\x82\x01", "not a readable"),
    "NEXT_BUFFER": (b"\x97", "not a readable"),
    # sizes that are declared only
    "terabytes of bytes": (b"\x8e" + struct.pack("<Q", 10**12), "not a readable"),
    "terabytes of bytearray": (b"\x96" + struct.pack("<Q", 10**12), "not a readable"),
    "terabytes of text": (b"\x8d" + struct.pack("<Q", 10**12), "not a readable"),
    "terabytes of frame": (b"\x95" + struct.pack("<Q", 10**12), "not a readable"),
    "a giant memo number": (b"Nr\xff\xff\xff\xff", "must hold a dict"),
    "a giant memo number as text": (b"Np99999999999999999999\n", "must hold a dict"),
    "bytes made of one text again and again": (
        _name("_codecs", "encode") + b"q\x000" + _operations("a" * 10_000)[:-2] + b"q\x010" + _operations("latin1")[:-2]
        + b"q\x020]" + b"h\x00h\x01h\x02\x86Ra" * 5000,
        "refused: it makes text into bytes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_crafted_pickles_are_refused_in_one_line_at_once_and_change_nothing(tmp_path, kind):
    operations, said = HOSTILE[kind]
    file, before = pickled(tmp_path, b"\x80\x04" + operations + b"."), state_of_the_reader()
    tracemalloc.start()
    try:
        message = refused(file)
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()
    assert said in message
    assert state_of_the_reader() == before


def state_of_the_reader():
    """All of the reader's functions and classes that a pickle might have reached."""
    found = {}
    for name, value in vars(reference_pickle).items():
        found[name] = id(value)
        members = vars(value) if isinstance(value, type) else {"itself": value}
        for member, content in members.items():
            found[name, member] = id(content)
            if isinstance(content, types.FunctionType):
                parts = (content.__defaults__, content.__kwdefaults__, content.__doc__, content.__dict__)
                found[name, member, "parts"] = repr((parts, content.__code__))
    return found


@pytest.mark.parametrize(
    "operations",
    [
        b"c\x1b[2J\x1b]0;gone\x07\nx\rnext" + b"y" * 5000 + b"\n",
        _name("numpy", "dtype") + _operations(("\x1b[31mf4\u202e" + "z" * 5000, False, True)) + b"R",
        _name("_codecs", "encode") + _operations(("a", "\x1b[31m\r" + "z" * 5000)) + b"R",
        b"I\x1b[31mx" + b"z" * 5000 + b"\n",
        b"g\x1b[31mx" + b"z" * 5000 + b"\n",
    ],
)
def test_what_the_file_says_reaches_no_terminal(tmp_path, operations):
    refused(pickled(tmp_path, b"\x80\x04" + operations + b"."))  # printable and short


def test_damaged_files(tmp_path):
    whole = pickle.dumps(matrices(), 4)
    for length in (0, 1, 30, len(whole) // 2, len(whole) - 1):
        assert "not a readable descriptors.pkl" in refused(pickled(tmp_path, whole[:length]))
    assert "not a readable descriptors.pkl" in refused(pickled(tmp_path, b"\x93NUMPY not a pickle"))
    with pytest.raises(FileNotFoundError):
        read_reference_descriptors(tmp_path / "none.pkl")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([1, 2], "must hold a dict"),
        ({"train_descriptors": np.zeros((2, 2))}, "must hold a dict with train_descriptors, val_descriptors"),
        ({**matrices(), "val_descriptors": np.zeros(3)}, "val_descriptors must be a 2-D NumPy array of floats"),
        ({**matrices(), "test_descriptors": np.zeros((3, 2), dtype=int)}, "test_descriptors must be a 2-D"),
        ({**matrices(), "test_descriptors": np.zeros((3, 2), dtype=complex)}, "refused: an array of type"),
        (
            {**matrices(), "test_descriptors": np.zeros((3, 0), np.float32)},
            "test_descriptors is empty, of shape (3, 0)",
        ),
        ({**matrices(), "val_descriptors": np.zeros((4, 3), np.longdouble)}, "refused: an array of type"),
        ({**matrices(), "train_descriptors": [[0.0, 1.0]]}, "train_descriptors must be a 2-D"),
    ],
)
def test_wrong_content(tmp_path, content, said):
    assert said in refused(pickled(tmp_path, content))


def a_store(path, leave_out=None, finish=True):
    store = DescriptorStore(path)
    store.prepare({}, {"database": 6, "val": 4, "test": 5}, 3)
    written, writer = {}, store.writer()
    for split, matrix in zip(SPLITS, matrices().values(), strict=True):
        written[split] = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
        for row, descriptor in enumerate(written[split]):
            if (split, row) == leave_out:
                writer.mark_bad(split, row, 5)
            else:
                writer.write(split, row, descriptor, 5)
    writer.close()
    if finish:
        store.finish()
    return written


def test_export_round_trip_and_what_the_reference_code_sees(tmp_path, capsys):
    written = a_store(tmp_path / "store")
    export_descriptors(tmp_path / "store", tmp_path / "out.pkl")
    read = read_reference_descriptors(tmp_path / "out.pkl")
    seen = pickle.loads((tmp_path / "out.pkl").read_bytes())
    assert tuple(seen) == KEYS and all(type(matrix) is np.ndarray for matrix in seen.values())
    for split, key in zip(SPLITS, KEYS, strict=True):
        np.testing.assert_array_equal(read[split], written[split])
        np.testing.assert_array_equal(seen[key], written[split])
    assert "out.pkl" in capsys.readouterr().out
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.pkl", "store"]


def test_export_refusals(tmp_path):
    def said(store, output):
        with pytest.raises(UserError) as caught:
            export_descriptors(store, output)
        return str(caught.value)

    a_store(tmp_path / "unfinished", finish=False)
    assert "is not finished" in said(tmp_path / "unfinished", tmp_path / "a.pkl")
    a_store(tmp_path / "skipped", leave_out=("val", 2))
    assert "1 image was left out" in said(tmp_path / "skipped", tmp_path / "a.pkl")
    a_store(tmp_path / "whole")
    (tmp_path / "there.pkl").write_text("precious")
    assert "there.pkl: exists already" in said(tmp_path / "whole", tmp_path / "there.pkl")
    assert (tmp_path / "there.pkl").read_text() == "precious"
    assert "not a descriptor store" in said(tmp_path / "none", tmp_path / "a.pkl")
    assert not (tmp_path / "a.pkl").exists()
