"""Colour profiles by hand, from the layout of ICC.1:2001 (version 2), and what they mean by its formulas."""

import struct

import numpy as np

D50 = np.array([0.9642, 1.0, 0.8249])
SRGB = np.array(
    [[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]]
)  # columns: red, green, blue
ADOBE_RGB = np.array([[0.6097, 0.2053, 0.1492], [0.3111, 0.6257, 0.0632], [0.0195, 0.0609, 0.7446]])
DISPLAY_P3 = np.array([[0.5151, 0.2920, 0.1571], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]])


def srgb_levels(xyz):
    """XYZ under D50 as levels of sRGB, 0 to 255: the curve of IEC 61966-2-1."""
    linear = np.clip(xyz @ np.linalg.inv(SRGB).T, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def xyz_of_lab(lab):
    lightness, a, b = np.moveaxis(np.asarray(lab, float), -1, 0)
    f = np.stack([(lightness + 16) / 116 + a / 500, (lightness + 16) / 116, (lightness + 16) / 116 - b / 200], -1)
    return D50 * np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))


def rgb_profile(colorants, gamma):
    columns = {name: xyz(colorants[:, i]) for i, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    return profile(b"mntr", b"RGB ", b"XYZ ", columns | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve(gamma)))


def grey_profile(gamma):
    return profile(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": curve(gamma)})


def cmyk_profile(corners):
    """Of the Lab of the 16 inks that are wholly there or not, black fastest; between them it is linear."""
    lab = np.asarray(corners, float) * [255 / 100, 1, 1] + [0, 128, 128]
    identity = bytes(range(256))
    matrix = struct.pack(">9i", *(65536 * np.eye(3, dtype=int).ravel()))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + 4 * identity + np.rint(lab).astype(np.uint8).tobytes()
    return profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": table + 3 * identity})


def profile(kind, space, connection, tags):
    text = b"made by hand\0"
    tags = tags | {b"desc": b"desc" + bytes(4) + struct.pack(">I", len(text)) + text + bytes(78), b"wtpt": xyz(D50)}
    tags[b"cprt"] = b"text" + bytes(4) + text
    table, content, first = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        table += name + struct.pack(">II", first + len(content), len(value))
        content += value + bytes(-len(value) % 4)
    body = table + content
    head = struct.pack(">I4x4s4s4s4s12x4s28x", 128 + len(body), b"\x02\x10\0\0", kind, space, connection, b"acsp")
    return head + struct.pack(">3i", *np.rint(65536 * D50).astype(int)) + bytes(48) + body


def xyz(values):
    return b"XYZ " + bytes(4) + struct.pack(">3i", *np.rint(65536 * np.asarray(values)).astype(int))


def curve(gamma):
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(256 * gamma))
