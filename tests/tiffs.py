"""TIFF files by hand, of any depth, sign and polarity, from the layout of TIFF 6.0."""

import struct
import zlib

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, OFFSETS, SAMPLES, ROWS, COUNTS = (
    256,
    257,
    258,
    259,
    262,
    273,
    277,
    278,
    279,
)
TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_COUNTS = 322, 323, 324, 325
PLANAR, PALETTE, EXTRA, SAMPLE_FORMAT, PROFILE = 284, 320, 338, 339, 34675
SIZES = {3: "H", 4: "I"}  # of a tag's values


def packed(samples, bits, order="<"):
    """Rows of samples, each row from a byte of its own: less than 8 bits and 12 begin with the highest bit."""
    if bits in (8, 16, 32):
        return b"".join(struct.pack(f"{order}{len(row)}{'xBHxI'[bits // 8]}", *row) for row in samples)
    rows = ["".join(f"{sample:0{bits}b}" for sample in row) for row in samples]
    return b"".join(int(row.ljust(-(-len(row) // 8) * 8, "0"), 2).to_bytes(-(-len(row) // 8)) for row in rows)


def tiff(strips, width, height, bits=(8,), order="<", photometric=1, compressed=False, more=(), tile=None):
    """A file of these strips, or tiles of that side; ``more`` are further tags, or others: number, type, values."""
    strips = [zlib.compress(strip) if compressed else strip for strip in strips]
    offsets, counts = (OFFSETS, COUNTS) if tile is None else (TILE_OFFSETS, TILE_COUNTS)
    ends = [8 + sum(map(len, strips[: i + 1])) for i in range(len(strips))]
    rows = {ROWS: (4, [height])} if tile is None else {TILE_WIDTH: (4, [tile]), TILE_HEIGHT: (4, [tile])}
    tags = {
        WIDTH: (4, [width]), HEIGHT: (4, [height]), BITS: (3, bits), COMPRESSION: (3, [8 if compressed else 1]),
        PHOTOMETRIC: (3, [photometric]), offsets: (4, [8, *ends[:-1]]), SAMPLES: (3, [len(bits)]),
        counts: (4, [len(strip) for strip in strips]), **rows,
    } | {tag: (kind, values) for tag, kind, values in more}  # fmt: skip
    pixels = b"".join(strips)
    place = 8 + len(pixels)
    entries, beyond = b"", b""
    first_beyond = place + 2 + 12 * len(tags) + 4
    for tag, (kind, values) in sorted(tags.items()):
        content = struct.pack(f"{order}{len(values)}{SIZES[kind]}", *values)
        entries += struct.pack(f"{order}HHI", tag, kind, len(values))
        if len(content) <= 4:
            entries += content.ljust(4, b"\0")
        else:
            entries += struct.pack(f"{order}I", first_beyond + len(beyond))
            beyond += content
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, place)
    return head + pixels + struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + beyond
