import errno
import hashlib
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from metilr import files
from metilr.errors import UserError
from metilr.files import alone_in, file_sha256, new_file, reserve_array, write_atomically


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
