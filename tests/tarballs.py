"""Archives, honest and hostile, as bytes."""

import gzip
import io
import random
import tarfile
from collections.abc import Sequence
from pathlib import Path

IMAGES = {f"{i % 4}/{i}.jpg": random.Random(i).randbytes(100 + 700 * i) for i in range(10)}
Member = tuple[str, bytes] | tarfile.TarInfo


def tar_of(members: Sequence[Member], format: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of files, by name and content, and of whatever a header can say."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                written = stream.write(member.tobuf(format))  # addfile asks for the content that it claims
                tar.offset += written
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return stream.getvalue()


def tarball(*members: Member) -> bytes:
    """The same as .tar.gz."""
    return gzip.compress(tar_of(members), 1, mtime=0)


def header(name: str, kind: bytes, size: int = 0, link: str = "") -> tarfile.TarInfo:
    """A member without content."""
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, link
    return info


def tree(folder: Path) -> dict[str, bytes]:
    """All files of a folder and its sub-folders, by path."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}
