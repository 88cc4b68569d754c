"""Descriptor stores: the manifest, and .npy files whose headers claim what they like."""

import itertools
import json
import struct

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from metilr.extraction.store import SCHEMA, SPLITS, DescriptorStore
from tests.fuzz.guard import refusal
from tests.fuzz.mutations import PROPERTIES, cases, each_replaced, mutated, mutated_value

TYPES = ("'<f4'", "'>f4'", "'<i8'", "'<f8'", "'<f2'", "'|O'", "'<U3'", "'|V4'", "[('a', '<f4')]", "'<M8[s]'", "3", "''")
ORDERS = ("False", "False", "False", "True", "1", "None")
SHAPES = (
    "(4, 3)",
    "(2, 3)",
    "(4,)",
    "(12,)",
    "(0, 3)",
    "(3, 0)",
    "()",
    "(-4, 3)",
    "(4, 3, 1)",
    "(10**12, 3)",
    "(99999999999, 3)",
)
NUMBERS = itertools.count()  # of folders
COUNTS = {"database": 4, "val": 2, "test": 3}
TOKENS = (b"[" * 3000, b"{", b"1e9", b'"', b"\xff")
HEADER_TOKENS = (
    b"(4, 3)", b"(-4, 3)", b"(4,)", b"(4, 10**9)", b"(99999999999, 3)", b"(0, 3)", b"'|O'", b"'<f8'", b"'<U9'", b"True",
    b"'shape'", b"'descr'", b"[('a', '<f4')]", b"\x93NUMPY\x03\x00", b"__import__('os').system('x')", b"(" * 200,
)  # fmt: skip


def make(folder):
    store = DescriptorStore(folder)
    store.prepare({"a": [1, None]}, COUNTS, 3)
    store.begin({"device": "cpu"})
    writer = store.writer()
    for split, n in COUNTS.items():
        for row in range(n):
            writer.write(split, row, np.eye(3, dtype=np.float32)[row % 3], 10 + row)
    writer.close()
    return store


def use(store):
    """What continues or opens a store."""
    with refusal(store.path) as said:
        manifest = store.manifest()
        assert type(manifest["settings"]) is type(manifest["counts"]) is dict
        assert type(manifest["width"]) is int and manifest["width"] >= 1 and type(manifest["complete"]) is bool
        assert all(type(n) is int and n >= 0 for n in manifest["counts"].values())
        assert all(type(made) is dict for made in manifest.get("made_with", []))
        for split in SPLITS:
            rows, made = store.descriptors(split), store.is_valid(split)
            assert rows.dtype == np.float32 and rows.ndim == 2 and np.isfinite(rows.sum(dtype=np.float64)) is not None
            assert made.dtype == bool and made.ndim == 1
            assert store.pending(split, np.arange(len(made)), retry_bad=True).shape == made.shape
    return said


def test_changed_manifests(tmp_path):
    store = make(tmp_path / "store")
    file = store.path / "manifest.json"
    whole, n_read = json.loads(file.read_text()), 0
    contents = [json.dumps(changed).encode() for changed in each_replaced(whole)]
    contents += [json.dumps(mutated_value(whole, rng)).encode() for rng in cases(200)]
    contents += [mutated(json.dumps(whole).encode(), rng, TOKENS) for rng in cases(250)]
    for content in contents:
        file.write_bytes(content)
        n_read += not use(store)
        with refusal(store.path):
            store.prepare({"a": [1, None]}, COUNTS, 3)
    assert n_read > 30


def test_changed_arrays(tmp_path):
    store = make(tmp_path / "store")
    files = {name: (store.path / name).read_bytes() for name in ("database.npy", "database.files.npy")}
    n_read = 0
    for rng in cases(700):
        name = rng.choice([*files])
        header = 128 if rng.random() < 0.7 else len(files[name])
        content = mutated(files[name][:header], rng, HEADER_TOKENS) + files[name][header:]
        if rng.random() < 0.4:  # a header that is in order, and lies
            kind, order, shape = rng.choice(TYPES), rng.choice(ORDERS), rng.choice(SHAPES)
            said = f"{{'descr': {kind}, 'fortran_order': {order}, 'shape': {shape}, }}"
            padded = said.ljust((len(said) // 64 + 1) * 64 + 53).encode() + b"\n"
            content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded + files[name][128:]
        (store.path / name).write_bytes(content)
        n_read += not use(store)
        (store.path / name).write_bytes(files[name])
    assert n_read > 30 and not use(store)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text("abé ", max_size=3), part, max_size=3),
    max_leaves=8,
)  # fmt: skip


@settings(PROPERTIES, max_examples=40)  # each is flushed to the disk
@given(
    made_with=st.dictionaries(st.text("ab", min_size=1, max_size=3), JSON, max_size=3),
    counts=st.fixed_dictionaries({split: st.integers(1, 5) for split in SPLITS}),
    width=st.integers(1, 6),
    sizes=st.lists(st.integers(-(2**40), 2**40), min_size=15, max_size=15),
)
def test_whatever_is_written_is_read_again(tmp_path, made_with, counts, width, sizes):
    folder = tmp_path / str(next(NUMBERS))
    store = DescriptorStore(folder)
    store.prepare(made_with, counts, width)
    rows = np.random.default_rng(0).normal(size=(15, width)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    writer = store.writer()
    for split, n in counts.items():
        for row in range(n):
            writer.write(split, row, rows[row], sizes[row])
    writer.close()
    assert not use(store)
    again = DescriptorStore(folder)
    assert again.manifest() == {
        "schema": SCHEMA, "settings": made_with, "counts": counts, "width": width, "complete": False
    }  # fmt: skip
    for split, n in counts.items():
        assert np.array_equal(again.descriptors(split), rows[:n]) and again.files(split).tolist() == sizes[:n]
        assert again.is_valid(split).tolist() == [size > 0 for size in sizes[:n]]
        pending = again.pending(split, np.array(sizes[:n]), retry_bad=True)
        assert pending.tolist() == [size <= 0 for size in sizes[:n]]
    again.prepare(made_with, counts, width)
