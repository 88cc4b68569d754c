"""Descriptor stores: the manifest, and .npy files whose headers claim what they like."""

import json
import struct

import numpy as np

from metilr.extraction.store import SPLITS, DescriptorStore
from tests.fuzz.guard import refusal
from tests.fuzz.mutations import cases, each_replaced, mutated, mutated_value

TYPES = ("'<f4'", "'>f4'", "'<i8'", "'<f8'", "'<f2'", "'|O'", "'<U3'", "'|V4'", "[('a', '<f4')]", "'<M8[s]'", "3", "''")
ORDERS = ("False", "False", "False", "True", "1", "None")
SHAPES = ("(4, 3)", "(2, 3)", "(4,)", "(12,)", "(0, 3)", "(3, 0)", "()", "(-4, 3)", "(4, 3, 1)", "(99999999999, 3)")
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
    contents += [json.dumps(mutated_value(whole, rng)).encode() for rng in cases(100)]
    contents += [mutated(json.dumps(whole).encode(), rng, TOKENS) for rng in cases(125)]
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
    for rng in cases(350):
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
    assert n_read > 10 and not use(store)
