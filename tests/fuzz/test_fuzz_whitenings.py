"""Whitenings on disk: .npz files."""

import io
import zipfile

import numpy as np
import pytest

from metilr.retrieval.whitening import LearnedWhitening, PCAWhitening
from tests.fuzz.guard import refusal
from tests.fuzz.mutations import cases, mutated

PCA = PCAWhitening(np.zeros(3), np.eye(3, 2), np.ones(3), 1.0, 9, 3)
LEARNED = LearnedWhitening(np.ones(3), np.eye(3), np.ones(3), 0.1, 9, 3, 4)
TOKENS = (
    b"(3,)", b"(-3,)", b"(3, 2)", b"(99999999999,)", b"(10**9,)", b"'<f8'", b"'|O'", b"'<U9'", b"'<f4'", b"True",
    b"PK\x03\x04",
    b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06", b"\x08\x00", b"\x01\x00", b"\x63\x00", b"format.npy", b"mean.npy",
    b"nan", b"(" * 200,
)  # fmt: skip
HOSTILE = (
    np.zeros(0), np.zeros(3, np.float32), np.full(3, np.nan), np.zeros((3, 3, 3)), np.array("x"), np.array(-1),
    np.array(1e308),
    np.array(2**63, np.uint64), np.zeros(()), np.zeros((3, 0)), np.array([1, 2]), np.zeros(3, "<i4"), np.zeros((1000,
    1)),
)  # fmt: skip


def read(file):
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


def parts(file):
    with np.load(file) as arrays:
        return dict(arrays)


def test_changed_bytes_and_parts(tmp_path):
    file, n_read = tmp_path / "whitening.npz", 0
    for each in (PCA, LEARNED):
        each.save(file)
        content, whole = file.read_bytes(), parts(file)
        for rng in cases(225):
            file.write_bytes(mutated(content, rng, TOKENS))
            n_read += not read(file)
        for rng in cases(175):
            np.savez(file, **{**whole, rng.choice([*whole]): rng.choice((*HOSTILE, *whole.values()))})
            n_read += not read(file)
    assert n_read > 20


def npy_of(shape):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return stream.getvalue()


REASONS = {"claims a terabyte": "cannot be read", "deflated zeros": "compressed"}


@pytest.mark.parametrize("kind", REASONS)
def test_archives_that_take_memory(tmp_path, kind):
    file = tmp_path / "whitening.npz"
    PCA.save(file)
    with zipfile.ZipFile(file) as old:
        contents = {name: old.read(name) for name in old.namelist()}
    method = zipfile.ZIP_DEFLATED if kind == "deflated zeros" else zipfile.ZIP_STORED
    with zipfile.ZipFile(file, "w", method) as new:
        for name, content in contents.items():
            if name == "mean.npy" and kind == "claims a terabyte":
                content = npy_of((2**37,)) + bytes(100)
            if name == "mean.npy" and kind == "deflated zeros":
                content = npy_of((2**22,)) + bytes(8 * 2**22)
            new.writestr(name, content)
    assert REASONS[kind] in read(file)[0]
