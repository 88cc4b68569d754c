"""What is wrong with image files, before anything is computed from them."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.utils.data import DataLoader, Dataset

from metilr.data.image_files import file_size
from metilr.data.image_limits import max_pixels
from metilr.data.transforms import BadImageError, image_shape, load_image
from metilr.data.workers import default_workers, leave_signals_to_the_parent
from metilr.process_faults import faults_in_one_line
from metilr.progress import counted

MISSING, EMPTY = "missing", "empty"
READERS = 8  # threads that read headers: the time goes into waiting for the disk
BATCH = 64  # images that a thread or a process looks at before it answers


def find_fault(file: Path, decode: bool = False, limit: int | None = None) -> str | None:
    """Say in a few words why an image file cannot be used; None if it can.

    Args:
        file: The image.
        decode: Decode all of it; without it the header alone, and a file that is cut short counts as fine.
        limit: See ``load_image``.

    Raises:
        OSError: If the disk, not the file, is at fault.
    """
    size = file_size(file)
    if not size:
        return MISSING if size is None else EMPTY
    try:
        (load_image if decode else image_shape)(file, limit=limit)
    except BadImageError as error:
        return error.reason
    return None


def find_faults(
    files: Sequence[Path], decode: bool = False, num_workers: int | None = None, quiet: bool = False
) -> dict[int, str]:
    """Look at many image files.

    Args:
        files: The images.
        decode: See ``find_fault``; in several processes.
        num_workers: Decoding processes; None for as many as cores are free, 0 for none beside this one.
        quiet: Show no progress.

    Returns:
        What is wrong, by position in ``files``.
    """
    faults: dict[int, str] = {}
    batches = _Batches(files, decode)
    found = _by_processes(batches, num_workers) if decode else _by_threads(batches)
    with counted("decoding" if decode else "reading headers", len(files), "images", quiet) as done:
        start = 0
        with faults_in_one_line():
            for reasons in found:
                faults |= {start + i: reason for i, reason in enumerate(reasons) if reason is not None}
                start += len(reasons)
                done(len(reasons))
    return faults


class _Batches(Dataset[list[str | None]]):
    """Item i is what is wrong with each of the i-th ``BATCH`` files."""

    def __init__(self, files: Sequence[Path], decode: bool) -> None:
        self.files, self.decode = files, decode
        self.limit = max_pixels()  # of this process, taken along to its workers

    def __len__(self) -> int:
        return -(-len(self.files) // BATCH)

    def __getitem__(self, i: int) -> list[str | None]:
        return [find_fault(file, self.decode, self.limit) for file in self.files[i * BATCH : (i + 1) * BATCH]]


def _by_threads(batches: _Batches) -> Iterator[list[str | None]]:
    with ThreadPoolExecutor(READERS) as pool:
        try:
            yield from pool.map(batches.__getitem__, range(len(batches)))
        finally:
            pool.shutdown(cancel_futures=True)


def _by_processes(batches: _Batches, num_workers: int | None) -> Iterable[list[str | None]]:
    workers = default_workers(1) if num_workers is None else num_workers
    return DataLoader(
        batches,
        batch_size=None,
        num_workers=min(workers, len(batches)),
        worker_init_fn=leave_signals_to_the_parent,
    )
