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
PLANAR, PALETTE, EXTRA, SAMPLE_FORMAT = 284, 320, 338, 339
SIZES = {3: "H", 4: "I"}  # of a tag's values


def packed(samples, bits, order="<"):
    """Rows of samples, each row from a byte of its own: less than 8 bits and 12 begin with the highest bit."""
    if bits in (8, 16, 32):
        return b"".join(struct.pack(f"{order}{len(row)}{'xBHxI'[bits // 8]}", *row) for row in samples)
    rows = ["".join(f"{sample:0{bits}b}" for sample in row) for row in samples]
    return b"".join(int(row.ljust(-(-len(row) // 8) * 8, "0"), 2).to_bytes(-(-len(row) // 8)) for row in rows)


def tiff(strips, width, height, bits=(8,), order="<", photometric=1, compressed=False, more=()):
    """A file of these strips; ``more`` are further tags, or others in place of the usual: number, type, values."""
    strips = [zlib.compress(strip) if compressed else strip for strip in strips]
    tags = {
        WIDTH: (4, [width]), HEIGHT: (4, [height]), BITS: (3, bits), COMPRESSION: (3, [8 if compressed else 1]),
        PHOTOMETRIC: (3, [photometric]), OFFSETS: (4, [0] * len(strips)), SAMPLES: (3, [len(bits)]),
        ROWS: (4, [height]), COUNTS: (4, [len(strip) for strip in strips]),
    } | {tag: (kind, values) for tag, kind, values in more}  # fmt: skip
    place = 8
    if tags[OFFSETS][1] == [0] * len(strips):
        tags[OFFSETS] = (4, [place + sum(map(len, strips[:i])) for i in range(len(strips))])
    pixels = b"".join(strips)
    place += len(pixels)
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
