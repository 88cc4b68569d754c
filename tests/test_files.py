import errno
import hashlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from metilr import files
from metilr.commands.download import Records
from metilr.data.ground_truth import load_ground_truth
from metilr.data.tables import read_csv
from metilr.errors import UserError
from metilr.evaluation.read_run import read_run
from metilr.extraction.reference_pickle import read_reference_descriptors
from metilr.extraction.store import DescriptorStore
from metilr.files import (
    alone_in,
    file_sha256,
    map_array,
    new_file,
    read_npz,
    read_yaml,
    reserve_array,
    write_atomically,
)
from metilr.retrieval.approximate import ApproximateIndex
from metilr.retrieval.whitening import PCAWhitening
from tests.museum import write_museum

RUN = Path(__file__).parent / "fixtures" / "first_edition_run"


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_links(*_):
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


def names(folder):
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize("n", [0, 1, files.CHUNK, files.CHUNK + 1])
def test_file_sha256(tmp_path, n):
    content = bytes(i % 251 for i in range(n))
    (tmp_path / "a").write_bytes(content)
    assert file_sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_write_atomically_keeps_the_old_content_when_it_fails(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    write_atomically(file, "old")
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        write_atomically(file, "new")
    assert file.read_text() == "old" and names(tmp_path) == ["a.json"]


def test_an_error_names_the_file_and_not_the_temporary_one(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        write_atomically(tmp_path / "nowhere" / "a", "text")
    assert caught.value.filename == str(tmp_path / "nowhere" / "a")


def test_two_machines_with_one_process_number_do_not_share_a_temporary_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)
    file = tmp_path / "a"
    with pytest.raises(FileExistsError), new_file(file) as ours:
        ours.write(b"ours")
        with new_file(file) as theirs:
            theirs.write(b"theirs")
        write_atomically(tmp_path / "b", "text")
    assert file.read_bytes() == b"theirs" and names(tmp_path) == ["a", "b"]


@pytest.mark.parametrize("links", [True, False])
def test_a_new_file_appears_whole_and_replaces_none(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    file = tmp_path / "a"
    with new_file(file) as stream:
        stream.write(b"content")
        stream.flush()
        assert not file.exists()
    assert file.read_bytes() == b"content" and names(tmp_path) == ["a"]
    with pytest.raises(FileExistsError), new_file(file) as stream:
        stream.write(b"other")
    assert file.read_bytes() == b"content" and names(tmp_path) == ["a"]
    with pytest.raises(OSError, match="No space"), new_file(tmp_path / "b"):
        no_space()
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("links", [True, False])
def test_an_array_that_another_process_made_and_opened_meanwhile_stays(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    file = tmp_path / "a.npy"
    theirs = []

    def someone_is_faster(stream, header):
        monkeypatch.undo()
        if not links:
            monkeypatch.setattr(os, "link", no_links)
        reserve_array(file, (3, 2), np.dtype(np.float32))
        opened = np.load(file, mmap_mode="r+")
        opened[1] = 7
        theirs.append(opened)
        np.lib.format.write_array_header_1_0(stream, header)

    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", someone_is_faster)
    reserve_array(file, (3, 2), np.dtype(np.float32))
    theirs[0][2] = 8  # still the file that has the name
    np.testing.assert_array_equal(np.load(file), [[0, 0], [7, 7], [8, 8]])
    assert names(tmp_path) == ["a.npy"]


def _reserve_and_write(file, row, barrier):
    barrier.wait(30)
    reserve_array(file, (8, 1000), np.dtype(np.float32))
    np.load(file, mmap_mode="r+")[row] = row + 1


def test_many_processes_reserve_one_array(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(8)
    processes = [context.Process(target=_reserve_and_write, args=(tmp_path / "a.npy", i, barrier)) for i in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), np.repeat(np.arange(1, 9)[:, None], 1000, axis=1))
    assert names(tmp_path) == ["a.npy"]


def test_a_full_disk_leaves_no_temporary_file(tmp_path, monkeypatch):
    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", no_space)
    with pytest.raises(OSError, match="No space"):
        reserve_array(tmp_path / "a.npy", (3, 2), np.dtype(np.float32))
    assert names(tmp_path) == []


HOLDER = """
import sys, time
from pathlib import Path
from metilr.files import alone_in
with alone_in(Path(sys.argv[1]), "another run", "stop it"):
    print("held", flush=True)
    time.sleep(600)
"""


def lock(folder: Path):
    return alone_in(folder, "another run", "stop it")


def test_the_second_process_is_told_of_the_first_and_a_killed_one_holds_nothing(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    repository = Path(__file__).resolve().parents[1]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=repository) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
            with pytest.raises(UserError) as refused, lock(tmp_path):
                pass
            assert str(refused.value) == f"{tmp_path}: another run is at work there; wait for it, or stop it"
        finally:
            holder.kill()
    with lock(tmp_path):
        pass


def test_it_ends_with_the_block_and_with_an_error_in_it(tmp_path):
    with pytest.raises(KeyError), lock(tmp_path):
        raise KeyError
    with lock(tmp_path), pytest.raises(UserError), lock(tmp_path):
        pass
    with lock(tmp_path):
        pass


def test_a_fork_does_not_hold_it(tmp_path):
    """Workers of a loader live on for seconds when their parent is killed."""
    context = multiprocessing.get_context("fork")
    runs, goes_on = context.Event(), context.Event()
    with lock(tmp_path):
        worker = context.Process(target=lambda: (runs.set(), goes_on.wait()))
        worker.start()
        runs.wait()
    try:
        with lock(tmp_path):
            pass
    finally:
        worker.kill()
        worker.join()


@pytest.fixture
def at_once():
    """What waits longer than that waits for ever."""

    def too_long(*_):
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def exchange(file: Path, kind: str) -> None:
    """Put a folder, a pipe or a device in a file's place."""
    file.unlink(missing_ok=True)
    {"folder": file.mkdir, "pipe": lambda: os.mkfifo(file), "device": lambda: file.symlink_to("/dev/null")}[kind]()


READERS = {
    "a.yaml": read_yaml, "a.npz": read_npz, "b.npz": PCAWhitening.load, "a.bin": file_sha256,
    "a.npy": lambda file: map_array(file, "make it again"), "a.pkl": read_reference_descriptors,
    "manifest.json": lambda file: DescriptorStore(file.parent).manifest(), "downloads.json": Records,
    "a.csv": lambda file: read_csv(file, ["path"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
@pytest.mark.parametrize("name", READERS)
def test_only_regular_files_are_read(tmp_path, at_once, name, kind):
    exchange(tmp_path / name, kind)
    with pytest.raises(ValueError, match="not a regular file"):
        READERS[name](tmp_path / name)


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
@pytest.mark.parametrize("name", ["results.json", "config.yaml", "predictions/test.csv"])
def test_only_regular_files_of_a_run_are_read(tmp_path, at_once, name, kind):
    run = Path(shutil.copytree(RUN, tmp_path / "run"))
    exchange(run / name, kind)
    with pytest.raises(UserError, match=rf"{name}: cannot be read \(not a regular file\)"):
        read_run(run)


def test_only_regular_files_of_a_museum_and_an_approximate_index_are_read(tmp_path, at_once):
    root = write_museum(tmp_path / "museum")
    exchange(root / "ground_truth" / "valset.json", "pipe")
    with pytest.raises(UserError, match=r"valset\.json: .*not a regular file"):
        load_ground_truth(root)
    np.save(tmp_path / "rows.npy", np.eye(3, dtype=np.float32))
    exchange(tmp_path / "approximate.json", "pipe")
    with pytest.raises(UserError, match=r"cannot be read \(not a regular file\)"):
        ApproximateIndex.load(tmp_path, tmp_path / "rows.npy")


def test_a_key_that_is_there_twice_is_refused_by_name(tmp_path):
    root, run = write_museum(tmp_path / "museum"), Path(shutil.copytree(RUN, tmp_path / "run"))
    for file, was, now in [
        (root / "ground_truth" / "testset.json", '"MET_id": 41', '"MET_id": 41, "MET_id": 70'),
        (run / "results.json", '"gap":', '"acc": 1.0, "gap":'),
        (run / "config.yaml", "seed: 5", "seed: 5\nseed: 6"),
    ]:
        text = file.read_text()
        assert was in text
        file.write_text(text.replace(was, now, 1))
        key = {"testset.json": "MET_id", "results.json": "acc", "config.yaml": "seed"}[file.name]
        with pytest.raises(UserError, match=rf"{file.name}: .*has the key '{key}' twice"):
            load_ground_truth(root) if file.is_relative_to(root) else read_run(run)
        file.write_text(text)
    for name, read in (("manifest.json", READERS["manifest.json"]), ("downloads.json", Records)):
        (tmp_path / name).write_text('{"a": 1, "b": {"c": 1, "c": 1}}')
        with pytest.raises(UserError, match=r"the key 'c' twice: \{'c': 1\}"):
            read(tmp_path / name)
