"""The reference code's descriptors.pkl."""

import os
import pickle

import numpy as np
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as arrays

from metilr.extraction.reference_pickle import KEYS, read_reference_descriptors
from tests.fuzz.guard import refusal
from tests.fuzz.mutations import PROPERTIES, cases, mutated

MATRICES = {key: np.arange(6, dtype=np.float32).reshape(n, -1) for n, key in zip((2, 3, 1), KEYS.values(), strict=True)}
TOKENS = (
    b"c", b"R", b"b", b"\x81", b"(", b"t", b".", b"cos\nsystem\n", b"\x93", b"}", b"]", b"K\xff", b"\x8a\x10", b"B",
    b"X",
    b"\x8e", b"N", b"0", b"1", b"2", b"h\0", b"\x94", b"numpy", b"cbuiltins\neval\n", b"q\0", b"r\xff\xff\xff\x7f",
)  # fmt: skip


class Program:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def read(file):
    with refusal(file) as said:
        for matrix in read_reference_descriptors(file).values():
            assert type(matrix) is np.ndarray and matrix.ndim == 2 and matrix.size
            assert matrix.dtype.kind == "f" and matrix.nbytes <= file.stat().st_size
            assert matrix.sum(dtype=np.float64) is not None  # every byte is there
    return said


def test_mutated_pickles_run_nothing(tmp_path):
    file, canary = tmp_path / "d.pkl", tmp_path / "canary"
    hostile = [pickle.dumps({**MATRICES, "extra": Program(f"touch {canary}")}, protocol) for protocol in range(6)]
    honest = [pickle.dumps(MATRICES, protocol) for protocol in range(6)]
    n_read = 0
    for rng in cases(600):
        file.write_bytes(mutated(rng.choice(rng.choice((hostile, honest, honest))), rng, TOKENS))
        n_read += not read(file)
    assert not canary.exists() and n_read > 10
    for content in hostile:
        file.write_bytes(content)
        assert "refused" in read(file)[0]


@PROPERTIES
@given(
    arrays.arrays(
        st.sampled_from(["<f2", "<f4", ">f4", "<f8"]), arrays.array_shapes(min_dims=2, max_dims=2, max_side=5)
    ),
    st.integers(0, 5),
)
def test_matrices_are_read_as_written(tmp_path, matrix, protocol):
    file = tmp_path / "d.pkl"
    file.write_bytes(pickle.dumps(dict.fromkeys(KEYS.values(), matrix), protocol))
    assert not read(file)
    assert read_reference_descriptors(file)["val"].tobytes() == matrix.tobytes()
