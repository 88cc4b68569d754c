"""Descriptors from elsewhere: stores, the reference code's descriptors.pkl, and whitenings."""

import io
import json
import pickle
import struct
import zipfile

import numpy as np
import pytest

from metilr.extraction.reference_pickle import KEYS, read_reference_descriptors
from metilr.extraction.store import SPLITS, DescriptorStore
from metilr.retrieval.whitening import LearnedWhitening, PCAWhitening
from tests.fuzz.guard import refusal
from tests.fuzz.mutations import Program, cases, json_cases, mutated

TYPES = ("'<f4'", "'>f4'", "'<i8'", "'<f8'", "'<f2'", "'|O'", "'<U3'", "'|V4'", "[('a', '<f4')]", "'<M8[s]'", "3", "''")
ORDERS = ("False", "False", "False", "True", "1", "None")
SHAPES = ("(4, 3)", "(2, 3)", "(4,)", "(12,)", "(0, 3)", "(3, 0)", "()", "(-4, 3)", "(4, 3, 1)", "(99999999999, 3)")
COUNTS = {"database": 4, "val": 2, "test": 3}
HEADER_TOKENS = (
    b"(4, 3)", b"(-4, 3)", b"(4,)", b"(4, 10**9)", b"(99999999999, 3)", b"(0, 3)", b"'|O'", b"'<f8'", b"'<U9'", b"True",
    b"'shape'", b"'descr'", b"[('a', '<f4')]", b"\x93NUMPY\x03\x00", b"__import__('os').system('x')", b"(" * 200,
)  # fmt: skip


@pytest.fixture
def store(tmp_path):
    store = DescriptorStore(tmp_path / "store")
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
        assert type(manifest.settings) is type(manifest.counts) is dict
        assert type(manifest.width) is int and manifest.width >= 1 and type(manifest.complete) is bool
        assert all(type(n) is int and n >= 0 for n in manifest.counts.values())
        assert all(type(made) is dict for made in manifest.made_with)
        for split in SPLITS:
            rows, made = store.descriptors(split), store.is_valid(split)
            assert rows.dtype == np.float32 and rows.ndim == 2 and np.isfinite(rows.sum(dtype=np.float64)) is not None
            assert made.dtype == bool and made.ndim == 1
            assert store.pending(split, np.arange(len(made)), retry_bad=True).shape == made.shape
    return said


def test_changed_manifests(store):
    file, n_read = store.path / "manifest.json", 0
    for content in json_cases(json.loads(file.read_text()), 100, (b"[" * 3000, b"{", b"1e9", b'"', b"\xff")):
        file.write_bytes(content)
        n_read += not use(store)
        with refusal(store.path):
            store.prepare({"a": [1, None]}, COUNTS, 3)
    assert n_read > 30


def test_changed_arrays(store):
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


MATRICES = {key: np.arange(6, dtype=np.float32).reshape(n, -1) for n, key in zip((2, 3, 1), KEYS.values(), strict=True)}
PICKLE_TOKENS = (
    b"c", b"R", b"b", b"\x81", b"(", b"t", b".", b"cos\nsystem\n", b"\x93", b"}", b"]", b"K\xff", b"\x8a\x10", b"B",
    b"X", b"\x8e", b"N", b"0", b"1", b"2", b"h\0", b"\x94", b"numpy", b"cbuiltins\neval\n", b"q\0",
    b"r\xff\xff\xff\x7f",
)  # fmt: skip


def read_pickle(file):
    with refusal(file) as said:
        for matrix in read_reference_descriptors(file).values():
            assert type(matrix) is np.ndarray and matrix.ndim == 2 and matrix.size
            assert matrix.dtype.kind == "f" and matrix.nbytes <= file.stat().st_size
            assert matrix.sum(dtype=np.float64) is not None  # every byte is there
    return said


def test_changed_pickles_run_nothing(tmp_path):
    file, canary, n_read = tmp_path / "d.pkl", tmp_path / "canary", 0
    hostile = [pickle.dumps({**MATRICES, "extra": Program(f"touch {canary}")}, protocol) for protocol in range(6)]
    honest = [pickle.dumps(MATRICES, protocol) for protocol in range(6)]
    for rng in cases(600):
        file.write_bytes(mutated(rng.choice(rng.choice((hostile, honest, honest))), rng, PICKLE_TOKENS))
        n_read += not read_pickle(file)
    assert not canary.exists() and n_read > 10
    for content in hostile:
        file.write_bytes(content)
        assert "refused" in read_pickle(file)[0]


PCA = PCAWhitening(np.zeros(3), np.eye(3, 2), np.ones(3), 1.0, 9, 3)
LEARNED = LearnedWhitening(np.ones(3), np.eye(3), np.ones(3), 0.1, 9, 3, 4)
NPZ_TOKENS = (
    b"(3,)", b"(-3,)", b"(3, 2)", b"(99999999999,)", b"(10**9,)", b"'<f8'", b"'|O'", b"'<U9'", b"'<f4'", b"True",
    b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06", b"\x08\x00", b"\x01\x00", b"\x63\x00", b"format.npy",
    b"mean.npy", b"nan", b"(" * 200,
)  # fmt: skip
HOSTILE_PARTS = (
    np.zeros(0), np.zeros(3, np.float32), np.full(3, np.nan), np.zeros((3, 3, 3)), np.array("x"), np.array(-1),
    np.array(1e308), np.array(2**63, np.uint64), np.zeros(()), np.zeros((3, 0)), np.array([1, 2]), np.zeros(3, "<i4"),
    np.zeros((1000, 1)),
)  # fmt: skip


def read_whitening(file):
    with refusal(file) as said:
        whitening = PCAWhitening.load(file)
        width = len(whitening.mean)
        assert whitening.projection.shape == (width, whitening.dim) and width < 2000
        assert whitening.mean.dtype == whitening.projection.dtype == np.float64
        assert type(whitening.n) is type(whitening.supported_dim) is int and whitening.n >= 1
        assert type(whitening.shrinkage) is float and 0 <= whitening.shrinkage <= 1
        with np.errstate(all="ignore"):
            unit = np.linalg.norm(whitening.transform(np.eye(width, dtype=np.float32)), axis=1)
        assert ((np.abs(unit - 1) < 1e-3) | (unit == 0)).all()
    return said


@pytest.mark.parametrize("whitening", [PCA, LEARNED])
def test_changed_whitenings(tmp_path, whitening):
    file, n_read = tmp_path / "whitening.npz", 0
    whitening.save(file)
    content = file.read_bytes()
    with np.load(file) as whole:
        parts = dict(whole)
    for rng in cases(175):
        file.write_bytes(mutated(content, rng, NPZ_TOKENS))
        n_read += not read_whitening(file)
        np.savez(file, **{**parts, rng.choice([*parts]): rng.choice((*HOSTILE_PARTS, *parts.values()))})
        n_read += not read_whitening(file)
    assert n_read > 10


@pytest.mark.parametrize(("kind", "reason"), [("claims a terabyte", "cannot be read"), ("zeros", "compressed")])
def test_whitenings_that_take_memory(tmp_path, kind, reason):
    file, stream = tmp_path / "whitening.npz", io.BytesIO()
    PCA.save(file)
    with zipfile.ZipFile(file) as old:
        contents = {name: old.read(name) for name in old.namelist()}
    n = 2**22 if kind == "zeros" else 2**37
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f8", "fortran_order": False, "shape": (n,)})
    contents["mean.npy"] = stream.getvalue() + bytes(8 * n if kind == "zeros" else 100)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if kind == "zeros" else zipfile.ZIP_STORED) as new:
        for name, content in contents.items():
            new.writestr(name, content)
    assert reason in read_whitening(file)[0]
