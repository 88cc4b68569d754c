"""An approximate index: its note, its codes, and the rows beside it."""

import hashlib
import json
import os

import faiss
import numpy as np
import pytest

from metilr.approximate_files import NOTE, load_approximate, save_approximate
from metilr.approximate_search import ApproximateIndex
from tests.fuzz.guard import refusal
from tests.fuzz.mutations import cases, mutated, mutated_value

N, WIDTH = 64, 8  # whole codes
TOKENS = (
    b"IwPs",
    b"IwFl",
    b"IxFl",
    b"IxFI",
    b"ilar",
    b"full",
    b"sprs",
    b"null",
    b"\xff" * 8,
    b"\0" * 8,
    b"\x40" + b"\0" * 7,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(N, WIDTH)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    np.save(folder / "rows.npy", rows)
    faiss.omp_set_num_threads(1)
    codes = faiss.IndexIVFPQFastScan(faiss.IndexFlatIP(WIDTH), WIDTH, 2, 2, 4, faiss.METRIC_INNER_PRODUCT)
    codes.train(rows)
    codes.add(rows)
    save_approximate(ApproximateIndex(codes, rows), folder, "x")
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def place(folder, files):
    for name, content in files.items():
        (folder / name).write_bytes(content)


def read(folder):
    with refusal(folder) as said:
        index = load_approximate(folder, folder / "rows.npy", "x")
        assert index.rows.shape == (N, WIDTH) == (index.codes.ntotal, index.codes.d)
        found = index.search(np.eye(WIDTH, dtype=np.float32), 3)
        assert found.rows.shape == (WIDTH, 3) and found.rows.min() >= 0 and found.rows.max() < N
    return said


def test_changed_notes_and_rows(tmp_path, whole):
    place(tmp_path, whole)
    n_read = 0
    for rng in cases(500):
        name = rng.choice((NOTE, NOTE, "rows.npy", "codes.faiss"))
        content = mutated(whole[name], rng, TOKENS)
        if name == NOTE and rng.random() < 0.6:
            content = json.dumps(mutated_value(json.loads(whole[NOTE]), rng)).encode()
        (tmp_path / name).write_bytes(content)
        n_read += not read(tmp_path)
        (tmp_path / name).write_bytes(whole[name])
    assert n_read > 5 and not read(tmp_path)


def test_changed_codes_that_the_note_vouches_for(tmp_path, whole):
    """Each in a process of its own: what FAISS makes of them may be its end, but not a false answer."""
    place(tmp_path, whole)
    ends = []
    for rng in cases(70):
        content = mutated(whole["codes.faiss"], rng, TOKENS)
        note = {**json.loads(whole[NOTE]), "codes_sha256": hashlib.sha256(content).hexdigest()}
        (tmp_path / "codes.faiss").write_bytes(content)
        (tmp_path / NOTE).write_text(json.dumps(note))
        child = os.fork()
        if not child:
            try:
                read(tmp_path)
                os._exit(0)
            except BaseException as error:
                print(repr(error)[:600])
                os._exit(1)
        ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    assert not any(ends), ends


def other_codes(kind):
    rows = np.random.default_rng(1).normal(size=(80, 12)).astype(np.float32)
    quantizer = faiss.IndexFlatIP(WIDTH)
    kinds = {
        "flat": lambda: faiss.IndexFlatIP(WIDTH),
        "inverted file without codes": lambda: faiss.IndexIVFFlat(quantizer, WIDTH, 2),
        "more lists": lambda: faiss.IndexIVFPQFastScan(quantizer, WIDTH, 4, 2, 4, faiss.METRIC_INNER_PRODUCT),
        "wider": lambda: faiss.IndexIVFPQFastScan(faiss.IndexFlatIP(12), 12, 2, 3, 4, faiss.METRIC_INNER_PRODUCT),
        "more rows": lambda: faiss.IndexIVFPQFastScan(quantizer, WIDTH, 2, 2, 4, faiss.METRIC_INNER_PRODUCT),
    }
    codes = kinds[kind]()
    rows = rows[:, : codes.d].copy() if kind == "more rows" else rows[:N, : codes.d].copy()
    codes.train(rows)
    codes.add(rows)
    return faiss.serialize_index(codes).tobytes()


@pytest.mark.parametrize("kind", ["flat", "inverted file without codes", "more lists", "wider", "more rows"])
def test_codes_of_other_kinds_or_sizes_that_the_note_vouches_for(tmp_path, whole, kind):
    content = other_codes(kind)
    note = {**json.loads(whole[NOTE]), "codes_sha256": hashlib.sha256(content).hexdigest()}
    place(tmp_path, {**whole, "codes.faiss": content, NOTE: json.dumps(note).encode()})
    assert "codes.faiss" in read(tmp_path)[0]
