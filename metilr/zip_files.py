"""Zip archives of arrays and tensors from elsewhere: NumPy and PyTorch write them uncompressed, and so they are read.

Then nothing in them can be larger than the file, whatever a header claims.
"""

import contextlib
import io
import math
import zipfile
from pathlib import Path

import numpy as np


def refuse_compressed(file: Path) -> None:
    """Refuse a zip archive whose entries are compressed, or together larger than the file.

    Raises:
        ValueError: If it is such an archive.
        OSError: If it cannot be read.
    """
    with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(file) as archive:  # no archive: others will say so
        _check(archive, file)


def read_npz(file: Path) -> dict[str, np.ndarray]:
    """Read the arrays of an .npz file that ``np.savez`` wrote, whole; none holds objects.

    Raises:
        OSError: If the file cannot be read.
        Exception: Of many types, if it is damaged or something else.
    """
    if file.is_file() and not zipfile.is_zipfile(file):
        raise ValueError("not a .npz file")
    with zipfile.ZipFile(file) as archive:
        _check(archive, file)
        return {name.removesuffix(".npy"): _array(archive.read(name)) for name in archive.namelist()}


def _check(archive: zipfile.ZipFile, file: Path) -> None:
    entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("its parts are compressed, which PyTorch and NumPy do not do")
    if sum(entry.file_size for entry in entries) > file.stat().st_size:
        raise ValueError("its parts claim to be larger than the file")


def _array(content: bytes) -> np.ndarray:
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f"an array of the format's version {version}")
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    count = math.prod(shape)
    if dtype.hasobject or min(shape, default=0) < 0 or count * dtype.itemsize > len(content):
        raise ValueError(f"an array of shape {shape} and type {dtype} in {len(content):,} bytes")
    flat = np.frombuffer(bytearray(content), dtype, count, stream.tell()) if count else np.empty(0, dtype)
    return flat.reshape(shape, order="F" if is_fortran else "C")
