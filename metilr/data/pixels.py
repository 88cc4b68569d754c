"""What the pixels of an image mean: depth, sign, polarity, as tags tell them, transparency, colours; their number."""

import io
from functools import lru_cache
from typing import IO, Annotated, Any

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin, TiffImagePlugin
from pydantic import AfterValidator, Field

# Strips or tiles of a TIFF: Pillow takes half a second and 40 MB for so many; large scans have some thousand.
MAX_STRIPS = 100_000
MAX_TAGS = 65_535  # of a BigTIFF: as many as any other TIFF can have

BITS, COMPRESSION, PHOTOMETRIC, PLANAR, PALETTE, EXTRA, SAMPLE_FORMAT = 258, 259, 262, 284, 320, 338, 339
WIDTH, HEIGHT, SAMPLES, STRIPS, ROWS, TILES, TILE_WIDTH, TILE_HEIGHT = 256, 257, 277, 273, 278, 324, 322, 323
UNSIGNED = 1
SAMPLE_FORMATS = {1: "", 2: ", signed", 3: ", floating point"}
PHOTOMETRICS = {0: ", 0 is white", 1: "", 2: "", 3: ""}

GREY = ("1", "L")
# The modes of pixels that a profile of a colour space can be meant for.
MODES_OF_SPACES = {"GRAY": ("L", "1"), "RGB ": ("RGB", "P", "YCbCr", "HSV", *GREY), "CMYK": ("CMYK",)}
WITHIN_SRGB = 2  # levels of 255: the profiles that are called sRGB differ by one
GREY_STEPS = {"L;2": 85, "L;4": 17}  # between the levels of a PNG of few bits

Tags = TiffImagePlugin.ImageFileDirectory_v2

MAX_IMAGE_SIZE = 16_384  # px that an image is resized to: the longest side of one of 180 megapixels is not much longer


def _square(size: tuple[int, int]) -> tuple[int, int]:
    if size[0] != size[1]:
        raise ValueError("must be two equal sides")
    return size


# What images are resized to, in px: their longest side, or height and width of a square.
Side = Annotated[int, Field(ge=1, le=MAX_IMAGE_SIZE)]
ImageSize = Side | Annotated[tuple[Side, Side], Field(strict=False), AfterValidator(_square)]


def resized_shape(height: int, width: int, image_size: ImageSize | None) -> tuple[int, int]:
    """Height and width of an image at ``image_size``: a square's, or with the longest side at it, at least 1 px."""
    if image_size is None:
        return height, width
    if isinstance(image_size, tuple):
        return image_size
    ratio = image_size / max(height, width)
    return max(1, round(height * ratio)), max(1, round(width * ratio))


def tiff_tags(stream: IO[bytes]) -> Tags | None:
    """The first directory of a TIFF, as Pillow reads it; None if there is no picture. The stream is at its start."""
    stream.seek(0)
    head = stream.read(16)
    tags = None
    if head.startswith(tuple(TiffImagePlugin.PREFIXES)):
        big = head[2] == 43
        tags = Tags(head if big else head[:8])
        stream.seek(tags.next)
        if big and int.from_bytes(stream.read(8), "little") > MAX_TAGS:
            raise ValueError(f"a TIFF of more than {MAX_TAGS:,} tags")
        stream.seek(tags.next)
        tags.load(stream)
    stream.seek(0)
    return tags if tags and WIDTH in tags and HEIGHT in tags else None


def check_tiff(tags: Tags) -> None:
    """ValueError if a TIFF's samples have no clear reading, or if it has more strips or tiles than its size needs."""
    _check_strips(tags)
    if tags.get(COMPRESSION, 1) not in TiffImagePlugin.COMPRESSION_INFO:
        raise ValueError(f"a TIFF of compression {tags[COMPRESSION]}, which is not read; convert it to 8-bit RGB")
    if set(tags.get(SAMPLE_FORMAT, ())) - {UNSIGNED} or max(tags.get(BITS, (1,))) > 16:
        raise ValueError(tiff_kind(tags))
    apart = tags.get(PLANAR, 1) == 2 and tags.get(COMPRESSION, 1) == 1
    if apart and (max(tags.get(BITS, (1,))) != 8 or tags.get(PHOTOMETRIC, 0) == 0):  # Pillow would misread them
        raise ValueError(tiff_kind(tags))
    if tags.get(PLANAR, 1) == 2 and tags.get(SAMPLES, 1) == 2 and set(tags.get(EXTRA, ())) & {1, 2}:  # and alpha
        raise ValueError(tiff_kind(tags))
    if tags.get(PHOTOMETRIC) == 3 and 0 < max(tags.get(PALETTE, (0,))) < 256:
        raise ValueError("a TIFF whose palette has 8-bit values where 16-bit ones belong; convert it to 8-bit RGB")


def _check_strips(tags: Tags) -> None:
    """Pillow walks all of them when it opens the file, and decodes those beyond the size again and again."""
    place = STRIPS if STRIPS in tags else TILES
    if place not in tags:
        return
    packed = tags._tagdata.get(place, b"")  # of at most 8 bytes each, and unpacked only when asked for
    if len(packed) > 8 * MAX_STRIPS or len(tags[place]) > MAX_STRIPS:
        raise ValueError(f"a TIFF of more than {MAX_STRIPS:,} strips or tiles")
    width, height = tags[WIDTH], tags[HEIGHT]
    size = (width, tags.get(ROWS, height)) if place == STRIPS else (tags[TILE_WIDTH], tags[TILE_HEIGHT])
    planes = tags.get(SAMPLES, 1) if tags.get(PLANAR, 1) == 2 else 1
    n, needed = len(tags[place]), -(-width // size[0]) * -(-height // size[1]) * planes
    if n > needed:
        raise ValueError(f"a TIFF of {n} strips or tiles, of which it needs {needed}")


def tiff_kind(tags: Tags) -> str:
    """Name the kind of a TIFF that is not read, and say what to do."""
    photometric = tags.get(PHOTOMETRIC, 0)
    kinds = [SAMPLE_FORMATS.get(kind, f", sample format {kind}") for kind in sorted(set(tags.get(SAMPLE_FORMAT, ())))]
    told = PHOTOMETRICS.get(photometric, f", photometric interpretation {photometric}")
    apart = ", in separate planes" if tags.get(PLANAR, 1) == 2 else ""
    channels = "" if tags.get(SAMPLES, 1) == 1 else f"{tags[SAMPLES]} x "
    return f"a TIFF of {channels}{max(tags.get(BITS, (1,)))} bits{''.join(kinds)}{told}{apart}; convert it to 8-bit RGB"


def to_rgb(image: Image.Image) -> Image.Image:
    """An image as 8-bit sRGB, what is transparent laid on white; ValueError if its pixels have no clear reading."""
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else None
    if tags is not None:
        check_tiff(tags)
    if image.mode == "F":
        raise ValueError("32-bit float pixels have no stated range; convert it to 8-bit RGB")
    transparent, profile = _transparent_value(image), image.info.get("icc_profile")
    image.load()
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _scaled_grey(image, tags, transparent)
    elif transparent != image.info.get("transparency"):
        image = image.copy()
        image.info["transparency"] = transparent
    return _on_white(image, profile) if image.has_transparency_data else _to_srgb(image, profile)


def _transparent_value(image: Image.Image) -> Any:
    """The value that a file says is transparent, as it is once decoded: Pillow keeps it in the depth of the file."""
    value = image.info.get("transparency")
    if isinstance(image, PngImagePlugin.PngImageFile) and image.tile and value is not None:
        layout = image.tile[0].args
        if layout in GREY_STEPS:
            return value * GREY_STEPS[layout]
        if layout == "RGB;16B":
            return tuple(channel >> 8 for channel in value)
    return value


def _scaled_grey(image: Image.Image, tags: Tags | None, transparent: Any) -> Image.Image:
    """Grey of 16 bits, or of as many as a TIFF says, as L; as LA where one value is transparent."""
    samples = np.asarray(image)
    most = 2 ** (tags.get(BITS, (16,))[0] if tags else 16) - 1
    if samples.min() < 0 or samples.max() > most:
        raise ValueError(f"grey values outside 0 to {most}; convert it to 8-bit RGB")
    levels = np.rint(np.arange(most + 1) / (most / 255)).astype(np.uint8)
    if tags and tags.get(PHOTOMETRIC, 0) == 0:  # white, which Pillow overlooks at 16 bits
        levels = levels[::-1]
    grey = Image.fromarray(levels[samples])
    if transparent is not None:
        grey.putalpha(Image.fromarray(np.where(samples == transparent, 0, 255).astype(np.uint8)))
    return grey


def _on_white(image: Image.Image, profile: Any) -> Image.Image:
    """ValueError if nothing of an image shows: programs that leave a fourth channel at 0 do not mean that."""
    layered = image.convert("LA" if image.mode in (*GREY, "LA", "La") else "RGBA")
    if not layered.getchannel("A").getbbox():
        raise ValueError("wholly transparent; save it without transparency")
    colours = _to_srgb(layered.convert(layered.mode[:-1]), profile)
    colours.putalpha(layered.getchannel("A"))
    return Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")


def _to_srgb(image: Image.Image, profile: Any) -> Image.Image:
    """Colours as sRGB; as they are where a profile is damaged, or of another space than the image, as viewers do."""
    found = _conversion(profile) if isinstance(profile, bytes) else None
    if found is None or image.mode not in found[0]:
        return image.convert("RGB")
    modes, transform = found
    return transform.apply(image if image.mode == modes[0] else image.convert(modes[0]))


@lru_cache(maxsize=32)
def _conversion(profile: bytes) -> tuple[tuple[str, ...], ImageCms.ImageCmsTransform] | None:
    """The modes that a profile is for, and how the first becomes sRGB; None if it is sRGB already, or damaged."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        modes = MODES_OF_SPACES[source.profile.xcolor_space]
        transform = ImageCms.buildTransform(
            source, ImageCms.createProfile("sRGB"), modes[0], "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )  # fmt: skip
    except (ImageCms.PyCMSError, OSError, KeyError, ValueError):
        return None
    if modes[0] == "CMYK":
        return modes, transform
    steps = np.linspace(0, 255, 9).round().astype(np.uint8)
    samples = Image.fromarray(np.stack(np.meshgrid(steps, steps, steps), -1).reshape(27, 27, 3)).convert(modes[0])
    moved = np.asarray(transform.apply(samples)).astype(int) - np.asarray(samples.convert("RGB"))
    return (modes, transform) if np.abs(moved).max() > WITHIN_SRGB else None
