"""Photographs of anybody: decoded within limits, and for a server in a process of its own that can be ended."""

import contextlib
import io
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TypeVar

from metilr.data import decode
from metilr.data.pixels import ImageSize
from metilr.distributed import UNGUARDED, end_with_parent
from metilr.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

MAX_PIXELS = decode.pixels_of(decode.MAX_PHOTO_MEGAPIXELS)  # of a photo
SECONDS = 20.0  # to decode one; 50 megapixels take one to three
BYTES, BYTES_A_PIXEL = 2**29, 48  # of memory to decode one; 16-bit colours with a profile take most
Made = TypeVar("Made")


class BadPhotoError(UserError):
    """A photograph that gives no answer; the message says why, and leaves the name to the caller."""


class TooManyPixelsError(BadPhotoError):
    """A photograph beyond the limit, which its header tells before anything is decoded."""


class Photo(NamedTuple):
    """A decoded photograph."""

    image: "Tensor"  # RGB, uint8 (3, H, W)
    reduced: bool  # made smaller to fit ``largest_side``


def load_photo(
    file: Path | IO[bytes],
    image_size: ImageSize | None = None,
    largest_side: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Photo:
    """Decode a photograph as ``load_image`` does, resized to ``image_size``.

    Without ``image_size`` it keeps its size, or is reduced to ``largest_side``. BadPhotoError if it cannot be decoded.
    """
    try:
        with decode.open_image(file, max_pixels) as image:
            too_long = image_size is None and largest_side is not None and max(image.size) > largest_side
            return Photo(decode.to_tensor(image, largest_side if too_long else image_size), too_long)
    except MemoryError:
        raise
    except decode.TooManyPixels as error:
        raise TooManyPixelsError(f"has {error}; make it smaller") from None
    except Exception as error:  # as in load_image
        raise BadPhotoError(f"cannot be decoded ({decode.why_undecodable(error)})") from None


class Decoder:
    """Decodes in a process of its own, one file at a time.

    A file that takes too long or too much memory, or that ends the process, is a bad photo, and a new process decodes
    those behind it. What large photos leave in memory stays with that process.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self._one_at_a_time = threading.Lock()
        self._start()

    def photo(self, content: bytes, image_size: ImageSize | None, largest_side: int | None, max_pixels: int) -> Photo:
        """Decode a photograph as ``load_photo`` does."""
        import torch

        image, is_reduced = self.make(max_pixels, _array_of, content, image_size, largest_side, max_pixels)
        return Photo(torch.from_numpy(image), is_reduced)

    def make(self, n_pixels: int, function: Callable[..., Made], *arguments: Any) -> Made:
        """Let the process call a function that decodes at most so many pixels; raises what that raises."""
        with self._one_at_a_time:
            try:
                self._wait_until_ready()
                self._pipe.send((BYTES + BYTES_A_PIXEL * n_pixels, function, arguments))
                is_made = self._pipe.poll(self.seconds)
                made = self._pipe.recv() if is_made else BadPhotoError(f"takes more than {self.seconds:g} s to decode")
            except (EOFError, OSError):
                is_made, made = False, BadPhotoError("ends the process that decodes it")
            if not is_made:
                self.close()
                self._start()
        if isinstance(made, Exception):
            raise made
        return made

    def thumbnail(self, file: Path) -> bytes:
        """Return an image of the museum as a small JPEG; raises BadImageError if it is none."""
        limit = decode.max_pixels()
        return self.make(limit, _thumbnail, file, limit)

    def wait(self) -> None:
        """Wait until the process has begun; UserError if it cannot."""
        try:
            self._wait_until_ready()
        except (EOFError, OSError):
            self.close()
            guard = 'put what your script does below if __name__ == "__main__":'
            remedy = guard if self._process.exitcode == UNGUARDED else "was memory short?"
            raise UserError(f"the process that decodes photos ended at its start; {remedy}") from None

    def close(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.join()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_decode, args=(theirs,), daemon=True, name="decoder")
        self._process.start()
        theirs.close()
        self._is_ready = False

    def _wait_until_ready(self) -> None:
        if not self._is_ready:
            self._is_ready = self._pipe.recv()


def _decode(pipe: Connection) -> None:
    """What the process does until the other end of its pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group, and is the server's
    end_with_parent()
    import torch  # noqa: F401  # before time and memory are counted

    statm = Path("/proc/self/statm")  # the address space, in pages; there is no limit where the system does not tell it
    taken = int(statm.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else None
    pipe.send(True)
    with contextlib.suppress(EOFError):
        while True:
            n_bytes, function, arguments = pipe.recv()
            pipe.send(_made(n_bytes, taken, function, arguments))


def _made(n_bytes: int, taken: int | None, function: Callable[..., object], arguments: tuple[Any, ...]) -> object:
    """What a function returns or raises within so many bytes of memory besides those ``taken``, if they are known."""
    try:
        with contextlib.nullcontext() if taken is None else _limited(taken + n_bytes):
            return function(*arguments)
    except MemoryError:
        return BadPhotoError(f"takes more than {n_bytes / 2**30:.1f} GB of memory to decode")
    except Exception as error:
        return error


def _array_of(
    content: bytes, image_size: ImageSize | None, largest_side: int | None, max_pixels: int
) -> tuple["np.ndarray", bool]:
    """A photo as ``load_photo`` decodes it, with the image as an array, which goes through a pipe as it is."""
    photo = load_photo(io.BytesIO(content), image_size, largest_side, max_pixels)
    return photo.image.numpy(), photo.reduced


def _thumbnail(file: Path, limit: int) -> bytes:
    from metilr.report.page import jpeg_of

    return jpeg_of(decode.load_image(file, limit=limit))


@contextlib.contextmanager
def _limited(n_bytes: int) -> Iterator[None]:
    """Let this process have so much address space."""
    import resource  # not there on each system

    before = resource.getrlimit(resource.RLIMIT_AS)
    least = min(limit for limit in (n_bytes, *before) if limit != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_AS, (least, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
