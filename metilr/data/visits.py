"""Simulated visits: a seeded transform from a catalogue image to a visitor's photograph of it.

A visit goes the way of the light: the picture gets a frame, hangs on a wall, is seen from somewhere
(whole, with wall around it, or cut off by the photograph's edge), is lit badly, reflects a lamp, and then
passes through a lens, a sensor and a file format. Every part has a strength in [0, 1], where 0 leaves it out.

Each part draws from its own random stream, derived from the seed and the part's name. So a seed gives the
same viewpoint, lamp and tint at every strength, and switching one part off changes no other.
"""

import dataclasses
import hashlib
import io
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from metilr.errors import UserError

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

# RGB in [0, 1]: gilt, pale gilt, walnut, oak, ebony, white lacquer.
_FRAME_COLOURS = (
    (0.72, 0.55, 0.25),
    (0.80, 0.70, 0.46),
    (0.30, 0.19, 0.12),
    (0.58, 0.42, 0.27),
    (0.10, 0.09, 0.09),
    (0.90, 0.89, 0.86),
)
# White, warm grey, cool grey, cream, sage, Pompeian red, slate blue: what galleries are painted in.
_WALL_COLOURS = (
    (0.90, 0.89, 0.87),
    (0.74, 0.71, 0.67),
    (0.62, 0.64, 0.66),
    (0.86, 0.80, 0.66),
    (0.55, 0.60, 0.50),
    (0.48, 0.20, 0.18),
    (0.30, 0.36, 0.45),
)


@dataclasses.dataclass(frozen=True)
class VisitStrengths:
    """How strongly each part of a visit acts: 0 is off, 1 is the extreme stated here.

    A part draws its effect anew for each seed, between 40% and 100% of its strength times that extreme.

    Attributes:
        frame: A bevelled frame, at 1 up to 16% of the picture's shorter side wide.
        wall: Wall on all four sides, at 1 each up to 60% of the picture's side, with a shadow, often a label.
        crop: The photograph's edge cuts the picture: at 1 up to half of its height and of its width is lost.
            A visit shows either wall or crop: with both on, crop has probability crop / (crop + wall).
        perspective: Seen from the side, at 1 up to 45 degrees of yaw and 25 degrees of pitch.
        rotation: The camera held askew, at 1 up to 15 degrees.
        light: Dim (at 1 down to 40% brightness), tinted (up to 30% between red and blue), pale (up to 40%
            less saturation) and uneven (the far corner up to 60% darker).
        glare: One to three lamps mirrored in varnish or glass, at 1 each white over up to 25% of a side.
        blur: Lens and shaking hand: at 1 a Gaussian, its standard deviation up to 1.2% of the longest side,
            unequal along the two axes.
        noise: Sensor noise, at 1 a standard deviation of up to 0.12 of white, with coarse colour blotches.
        scale: A small file: at 1 the sides shrink to as little as 25%.
        jpeg: Compression, quality 95 and, at 1, down to 10.
    """

    frame: float = 0.0
    wall: float = 0.0
    crop: float = 0.0
    perspective: float = 0.0
    rotation: float = 0.0
    light: float = 0.0
    glare: float = 0.0
    blur: float = 0.0
    noise: float = 0.0
    scale: float = 0.0
    jpeg: float = 0.0

    def __post_init__(self) -> None:
        for part, strength in dataclasses.asdict(self).items():
            if not 0 <= strength <= 1:
                raise ValueError(f"the strength of {part!r} is {strength}; choose one in [0, 1]")


PRESETS = {
    # Somebody who takes care: straight on, whole, well lit.
    "mild": VisitStrengths(
        frame=0.4,
        wall=0.3,
        crop=0.1,
        perspective=0.2,
        rotation=0.15,
        light=0.3,
        glare=0.15,
        blur=0.1,
        noise=0.1,
        scale=0.1,
        jpeg=0.3,
    ),
    # The usual snapshot in passing.
    "medium": VisitStrengths(
        frame=0.5,
        wall=0.5,
        crop=0.2,
        perspective=0.4,
        rotation=0.3,
        light=0.5,
        glare=0.4,
        blur=0.25,
        noise=0.2,
        scale=0.25,
        jpeg=0.5,
    ),
    # A dark room, over other people's heads, on an old phone.
    "severe": VisitStrengths(
        frame=0.9,
        wall=0.9,
        crop=0.3,
        perspective=0.9,
        rotation=0.8,
        light=0.8,
        glare=0.8,
        blur=0.5,
        noise=0.4,
        scale=0.5,
        jpeg=0.8,
    ),
}


def simulate_visit(
    image: torch.Tensor, strengths: VisitStrengths, seed: int, longest_side: int | None = None
) -> torch.Tensor:
    """Turn a catalogue image into a visitor's photograph of it.

    The same image, strengths and seed give the same photograph, in any thread or process; the global random
    state is neither read nor changed. With all strengths 0 the photograph is a copy of the image.

    Args:
        image: RGB, uint8, ``(3, H, W)``; any size down to one pixel.
        strengths: How strongly each part acts.
        seed: Any integer; see `derive_seed` for one per image and index.
        longest_side: The photograph's longest side is at most this, by default the image's own longest side.
            Nothing is magnified to reach it.

    Returns:
        RGB, uint8, ``(3, H', W')``.

    Raises:
        ValueError: If the image is not a uint8 tensor of shape ``(3, H, W)`` or is empty.
    """
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
        raise ValueError(f"image must be uint8 (3, H, W), not {image.dtype} {tuple(image.shape)}")
    if longest_side is None:
        longest_side = max(image.shape[1:])

    photograph = F.to_dtype(image, torch.float32, scale=True)
    photograph = _put_in_frame(photograph, strengths.frame, _Stream(seed, "frame"))
    photograph, coverage = _hang_on_wall(photograph, strengths, seed, longest_side)
    photograph = _light(photograph, strengths.light, _Stream(seed, "light"))
    photograph = _add_glare(photograph, coverage, strengths.glare, _Stream(seed, "glare"))
    photograph = _blur(photograph, strengths.blur, _Stream(seed, "blur"))
    photograph = _shrink(photograph, strengths.scale, _Stream(seed, "scale"))
    photograph = _add_noise(photograph, strengths.noise, _Stream(seed, "noise"))
    photograph = F.to_dtype(photograph.clamp(0, 1), torch.uint8, scale=True)
    return _compress(photograph, strengths.jpeg, _Stream(seed, "jpeg"))


def derive_seed(base_seed: int, name: str, index: int) -> int:
    """Derive a seed for one image and index, the same on every machine and in every process.

    Args:
        base_seed: The run's seed.
        name: What the seed is for, such as an image's path.
        index: Which of several, such as the epoch or the number of the view.

    Returns:
        An integer in [0, 2⁶³).
    """
    # Python's own hash() of a string differs from process to process.
    digest = hashlib.blake2b(f"{base_seed}\0{index}\0{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Convert an RGB image from Pillow's form to uint8 ``(3, H, W)``."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()  # HxWxC to CxHxW


def to_pil(image: torch.Tensor) -> Image.Image:
    """Convert uint8 ``(3, H, W)`` to Pillow's form."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())  # CxHxW to HxWxC


def write_contact_sheet(
    folder: Path, output: Path, preset: str = "medium", visits: int = 5, images: int = 8, seed: int = 0
) -> Path:
    """Draw simulated visits to the images of a folder on one sheet.

    One row per image: first the image itself, then its visits.

    Args:
        folder: Folder of images, searched with its subfolders.
        output: File to write, .png or .jpg.
        preset: How strong the visits are: mild, medium or severe.
        visits: Visits per image.
        images: At most so many images, spread evenly over the folder in the order of their paths.
        seed: Another seed gives other visits.

    Returns:
        The written file.

    Raises:
        UserError: If the folder or its images are missing, an image cannot be read, the preset is unknown, a
            number is below 1, or the output cannot be written.
    """
    folder, output = Path(folder), Path(output)
    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}; choose one of {', '.join(PRESETS)}")
    if visits < 1 or images < 1:
        raise UserError(f"visits is {visits} and images is {images}; choose numbers from 1 up")
    if output.suffix.lower() not in {".png", ".jpg", ".jpeg"}:
        raise UserError(f"{output}: a contact sheet is a PNG or JPEG file; end its name with .png or .jpg")

    paths = _find_images(folder)
    chosen = [paths[row * len(paths) // images] for row in range(images)] if len(paths) > images else paths
    rows = []
    for path in chosen:
        image = _read_image(path)
        name = path.relative_to(folder).as_posix()
        seeds = [derive_seed(seed, name, visit) for visit in range(visits)]
        rows.append([image, *(simulate_visit(image, PRESETS[preset], each) for each in seeds)])
    sheet = _arrange(rows)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(output)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {output} ({reason}); choose another --output") from error
    return output


class _Stream:
    """Random numbers of one part of one visit."""

    def __init__(self, seed: int, part: str) -> None:
        self.generator = torch.Generator().manual_seed(derive_seed(seed, part, 0))

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * torch.rand((), generator=self.generator, dtype=torch.float64).item()

    def effect(self, strength: float) -> float:
        """Between 40% and 100% of the strength: a part that is on always shows."""
        return strength * self.uniform(0.4, 1.0)

    def sign(self) -> int:
        return 1 if self.uniform() < 0.5 else -1

    def choose(self, options: tuple[tuple[float, float, float], ...]) -> torch.Tensor:
        """One of the colours, ``(3, 1, 1)``."""
        return torch.tensor(options[int(self.uniform(0, len(options)))])[:, None, None]

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)


def _put_in_frame(image: torch.Tensor, strength: float, stream: _Stream) -> torch.Tensor:
    if strength == 0:
        return image
    colour = stream.choose(_FRAME_COLOURS)
    width = max(1, round(0.16 * stream.effect(strength) * min(image.shape[1:])))
    bevels = stream.uniform(0.5, 2.5)
    framed = F.pad(image, [width] * 4)
    ys, xs = _pixel_centres(framed)
    height, length = framed.shape[1:]
    from_side, from_top = torch.minimum(xs, length - xs), torch.minimum(ys, height - ys)
    # 0 at the outer edge of the frame, 1 at its inner edge, where it casts its shadow.
    depth = torch.minimum(from_side, from_top) / width
    profile = 0.85 + 0.2 * torch.sin(2 * math.pi * bevels * depth) - 0.3 * depth**6
    # Galleries are lit from above: the lower bar's bevel faces the lamps.
    lit = torch.where(from_top < from_side, torch.where(ys > height / 2, 1.15, 0.85), 1.0)
    bars = (colour * profile * lit).clamp(0, 1)
    return torch.where(depth < 1, bars, framed)


def _hang_on_wall(
    picture: torch.Tensor, strengths: VisitStrengths, seed: int, longest_side: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the picture from somewhere, with wall around it or cut off by the photograph's edge.

    Returns:
        The photograph, ``(3, H', W')``, and the picture's share of each of its pixels, ``(1, H', W')``.
    """
    height, width = picture.shape[1:]
    if strengths.wall == strengths.crop == strengths.perspective == strengths.rotation == 0:
        zoom = min(1.0, longest_side / max(height, width))
        picture = F.resize(picture, [_pixels(height * zoom), _pixels(width * zoom)], antialias=True)
        return picture, torch.ones_like(picture[:1])

    corners = _project_corners(width, height, strengths, seed)
    surround = strengths.wall + strengths.crop
    cropped = surround == 0 or _Stream(seed, "crop or wall").uniform() * surround < strengths.crop
    if cropped:
        window = _window_inside(corners, width, height, strengths.crop, _Stream(seed, "crop"))
    else:
        window = _window_around(corners, strengths.wall, _Stream(seed, "margin"))

    # window: left, top, width, height in the picture's pixels, its centre at 0
    zoom = min(1.0, longest_side / max(window[2:]))
    size = (_pixels(window[3] * zoom), _pixels(window[2] * zoom))
    corners = (corners - torch.tensor(window[:2])) * torch.tensor([size[1] / window[2], size[0] / window[3]])
    # The warp below does not antialias, so the picture shrinks to its size in the photograph first.
    picture = F.resize(picture, [_pixels(height * zoom), _pixels(width * zoom)], antialias=True)
    seen = _warp(picture, corners, size)
    wall = _paint_wall(seen[3:], strengths.wall, _Stream(seed, "wall"))
    return seen[:3] + (1 - seen[3:]) * wall, seen[3:]


def _project_corners(width: int, height: int, strengths: VisitStrengths, seed: int) -> torch.Tensor:
    """Where a camera in front of the picture sees its corners, clockwise from top left, ``(4, 2)``."""
    stream = _Stream(seed, "perspective")
    yaw = math.radians(45) * stream.sign() * stream.effect(strengths.perspective)
    pitch = math.radians(25) * stream.sign() * stream.effect(strengths.perspective)
    stream = _Stream(seed, "rotation")
    roll = math.radians(15) * stream.sign() * stream.effect(strengths.rotation)

    xs = torch.tensor([-0.5, 0.5, 0.5, -0.5]) * width
    ys = torch.tensor([-0.5, -0.5, 0.5, 0.5]) * height
    # From 1.5 longest sides away a picture fills a phone's field of view.
    depth = 1 + (xs * math.sin(yaw) + ys * math.sin(pitch)) / (1.5 * max(width, height))
    xs, ys = xs * math.cos(yaw) / depth, ys * math.cos(pitch) / depth
    turned_xs = xs * math.cos(roll) - ys * math.sin(roll)
    turned_ys = xs * math.sin(roll) + ys * math.cos(roll)
    return torch.stack([turned_xs, turned_ys], dim=1)


def _window_inside(
    corners: torch.Tensor, width: int, height: int, strength: float, stream: _Stream
) -> tuple[float, float, float, float]:
    """Left, top, width, height of a photograph that shows nothing but the picture."""
    edges = corners.roll(-1, 0) - corners
    outward = torch.stack([edges[:, 1], -edges[:, 0]], dim=1)  # the corners run clockwise
    reach = (outward * corners).sum(1)
    share = (reach / (outward.abs() @ torch.tensor([width / 2, height / 2]))).min().item()
    kept_x, kept_y = 1 - 0.5 * stream.effect(strength), 1 - 0.5 * stream.effect(strength)
    full_width, full_height = share * width, share * height
    left = -full_width / 2 + stream.uniform() * (1 - kept_x) * full_width
    top = -full_height / 2 + stream.uniform() * (1 - kept_y) * full_height
    return left, top, kept_x * full_width, kept_y * full_height


def _window_around(corners: torch.Tensor, strength: float, stream: _Stream) -> tuple[float, float, float, float]:
    """Left, top, width, height of a photograph that shows the whole picture and wall on each side."""
    (left, top), (right, bottom) = corners.min(0).values.tolist(), corners.max(0).values.tolist()
    width, height = right - left, bottom - top
    margins = [0.6 * strength * stream.uniform(0.05, 1.0) for _ in range(4)]
    return (
        left - margins[0] * width,
        top - margins[1] * height,
        (1 + margins[0] + margins[2]) * width,
        (1 + margins[1] + margins[3]) * height,
    )


def _warp(picture: torch.Tensor, corners: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Place the picture's corners in a photograph of that size: premultiplied RGB and coverage, (4, H, W)."""
    height, width = picture.shape[1:]
    layers = torch.cat([picture, torch.ones_like(picture[:1])])
    # torchvision's perspective keeps the canvas, so make room for whichever is larger.
    layers = F.pad(layers, [0, 0, max(0, size[1] - width), max(0, size[0] - height)])
    upright = [[0, 0], [width, 0], [width, height], [0, height]]
    layers = F.perspective(layers, upright, corners.tolist(), interpolation=InterpolationMode.BILINEAR)
    return layers[:, : size[0], : size[1]]


def _paint_wall(coverage: torch.Tensor, strength: float, stream: _Stream) -> torch.Tensor:
    """The wall behind the picture, ``(3, H, W)``: plaster, the picture's shadow and its label."""
    height, width = coverage.shape[1:]
    colour = stream.choose(_WALL_COLOURS) * stream.uniform(0.85, 1.05)
    plaster = F.resize(1 + 0.03 * stream.normal(1, 12, 12), [height, width], antialias=True)
    offset = max(1, round(0.02 * max(height, width)))
    shadow = _gaussian_blur(coverage.roll(offset, 1), offset, offset)
    wall = colour * plaster * (1 - 0.45 * shadow)
    if strength > 0 and stream.uniform() < 0.6:
        left, top = int(stream.uniform(0, 0.9) * width), int(stream.uniform(0.5, 0.9) * height)
        label = wall[:, top : top + max(1, height // 18), left : left + max(1, width // 12)]
        label.copy_(0.25 * label + 0.7)
    return wall


def _light(image: torch.Tensor, strength: float, stream: _Stream) -> torch.Tensor:
    if strength == 0:
        return image
    image = F.adjust_brightness(image, 1 - 0.6 * stream.effect(strength))
    image = F.adjust_saturation(image, 1 - 0.4 * stream.effect(strength))
    # Lamps are warm more often than cold: red up and blue down, or the other way round.
    warmth = 0.3 * stream.effect(strength) * (1 if stream.uniform() < 0.7 else -1)
    green = 0.05 * strength * stream.uniform(-1, 1)
    gains = torch.tensor([1 + warmth / 2, 1 + green, 1 - warmth / 2])[:, None, None]
    ys, xs = _pixel_centres(image)
    angle = stream.uniform(0, 2 * math.pi)
    along = math.cos(angle) * (xs / image.shape[2] - 0.5) + math.sin(angle) * (ys / image.shape[1] - 0.5)
    # along spans at most ±√½: 0 nearest to the lamp, 1 in the far corner
    falloff = 1 - 0.6 * stream.effect(strength) * (along / math.sqrt(2) + 0.5)
    return (image * gains * falloff).clamp(0, 1)


def _add_glare(image: torch.Tensor, coverage: torch.Tensor, strength: float, stream: _Stream) -> torch.Tensor:
    if strength == 0:
        return image
    ys, xs = _pixel_centres(image)
    ys, xs = ys / image.shape[1], xs / image.shape[2]
    lamps = 1 + int(stream.uniform(0, 3) * strength)
    for _ in range(lamps):
        centre_x, centre_y = stream.uniform(0.15, 0.85), stream.uniform(0.1, 0.8)
        radius_x = 0.12 * stream.effect(strength) + 0.02
        radius_y = radius_x * stream.uniform(0.5, 1.8)
        # A fourth power has the flat top and soft rim of a mirrored lamp or window.
        shape = torch.exp(-(((xs - centre_x) / radius_x) ** 4) - ((ys - centre_y) / radius_y) ** 4)
        halo = torch.exp(-((xs - centre_x) ** 2 + (ys - centre_y) ** 2) / (3 * radius_x) ** 2)
        amount = stream.effect(strength) * (0.8 * shape + 0.25 * halo)
        # Varnish and glass mirror lamps, a painted wall does not.
        image = image + (1 - image) * amount * coverage
    return image.clamp(0, 1)


def _blur(image: torch.Tensor, strength: float, stream: _Stream) -> torch.Tensor:
    if strength == 0:
        return image
    # Less than 0.3 px would not show.
    sigma = max(0.3, 0.012 * max(image.shape[1:]) * stream.effect(strength))
    shake = stream.uniform(0.4, 1.0)
    return (
        _gaussian_blur(image, sigma, sigma * shake)
        if stream.sign() > 0
        else _gaussian_blur(image, sigma * shake, sigma)
    )


def _gaussian_blur(image: torch.Tensor, sigma_x: float, sigma_y: float) -> torch.Tensor:
    """Blur along one axis after the other: the same as the square kernel, in a tenth of the time."""
    height, width = image.shape[1:]
    # torchvision pads by reflection, which cannot reach past the opposite edge.
    size_x = 2 * min(math.ceil(3 * sigma_x), width - 1) + 1
    size_y = 2 * min(math.ceil(3 * sigma_y), height - 1) + 1
    image = F.gaussian_blur(image, [size_x, 1], [sigma_x, sigma_x])
    return F.gaussian_blur(image, [1, size_y], [sigma_y, sigma_y])


def _shrink(image: torch.Tensor, strength: float, stream: _Stream) -> torch.Tensor:
    if strength == 0:
        return image
    share = 1 - 0.75 * stream.effect(strength)
    height, width = image.shape[1:]
    return F.resize(image, [_pixels(height * share), _pixels(width * share)], antialias=True)


def _add_noise(image: torch.Tensor, strength: float, stream: _Stream) -> torch.Tensor:
    if strength == 0:
        return image
    # torchvision's gaussian_noise draws from the global random state, which a visit must leave alone.
    sigma = 0.12 * stream.effect(strength)
    height, width = image.shape[1:]
    fine = stream.normal(1, height, width)
    blotches = F.resize(stream.normal(3, _pixels(height / 3), _pixels(width / 3)), [height, width], antialias=True)
    return image + sigma * (0.8 * fine + 0.6 * blotches)


def _compress(image: torch.Tensor, strength: float, stream: _Stream) -> torch.Tensor:
    if strength == 0:
        return image
    # Pillow's encoder, since torchvision deprecated its own, which transforms.v2 still calls.
    file = io.BytesIO()
    to_pil(image).save(file, "JPEG", quality=round(95 - 85 * stream.effect(strength)))
    with Image.open(file) as compressed:
        return to_tensor(compressed)


def _pixel_centres(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows ``(H, 1)`` and columns ``(1, W)`` of the pixels' centres."""
    height, width = image.shape[1:]
    return torch.arange(height)[:, None] + 0.5, torch.arange(width)[None, :] + 0.5


def _pixels(side: float) -> int:
    return max(1, round(side))


def _find_images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name a folder of images")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not paths:
        raise UserError(f"{folder}: no images inside; name a folder with {', '.join(sorted(IMAGE_SUFFIXES))} files")
    return paths


def _read_image(path: Path) -> torch.Tensor:
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as an image ({error}); repair or remove it") from error
    image.thumbnail((500, 500))  # the Met's own size; a sheet shows no more
    return to_tensor(image)


def _arrange(rows: list[list[torch.Tensor]], cell: int = 200, gap: int = 6) -> Image.Image:
    sheet = Image.new("RGB", (gap + len(rows[0]) * (cell + gap), gap + len(rows) * (cell + gap)), "white")
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            tile = to_pil(image)
            tile.thumbnail((cell, cell))
            left = gap + column * (cell + gap) + (cell - tile.width) // 2
            top = gap + row * (cell + gap) + (cell - tile.height) // 2
            sheet.paste(tile, (left, top))
    return sheet
