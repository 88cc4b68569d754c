"""Files that claim to be photos, and names that claim to be HTML."""

import struct
import zlib
from pathlib import Path

from PIL import Image

NAME = "<img src=x onerror=alert(1)>.jpg"


def write_hostile_files(folder: Path) -> dict[str, Path]:
    """Write each kind of bad photo; returns the files by kind."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {kind: folder / name for kind, name in {
        "text": "text.jpg", "empty": "empty.jpg", "truncated": "truncated.jpg", "large": "large.png",
        "bomb": "bomb.png", "program": "program.eps",
    }.items()}  # fmt: skip
    files["text"].write_text("no image")
    files["empty"].write_bytes(b"")
    Image.effect_noise((64, 64), 50).convert("RGB").save(folder / "whole.jpg")
    files["truncated"].write_bytes((folder / "whole.jpg").read_bytes()[:-200])
    Image.new("1", (20_000, 20_000)).save(files["large"])  # 400 megapixels in 50 kB
    files["bomb"].write_bytes(_png_of(60_000, 60_000))
    files["program"].write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    return files


REASONS = {
    "text": "not an image",
    "empty": "not an image",
    "truncated": "truncated",
    "large": "more than 50 megapixels",
    "bomb": "more than 50 megapixels",
    "program": "not an image",
}


def _png_of(width: int, height: int) -> bytes:
    """A PNG of some hundred bytes whose header promises so many pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9999))) + chunk(b"IEND", b"")
    )
