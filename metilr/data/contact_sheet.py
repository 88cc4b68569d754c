"""A contact sheet: images of a folder, each beside a few simulated visits to it."""

from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from metilr.data.transforms import BadImageError, load_image, resized_shape
from metilr.data.visits import PRESETS, derive_seed, refuse_bad_seed, simulate_visit
from metilr.errors import UserError

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
_LONGEST_SIDE = 500  # the Met's own images are as large; a sheet shows no more


def write_contact_sheet(
    folder: Path, output: Path, preset: str = "medium", visits: int = 5, images: int = 8, seed: int = 0
) -> Path:
    """Draw simulated visits to the images of a folder on one sheet.

    One row per image: first the image itself, then its visits. The first chosen image that cannot be decoded ends
    the command, by name, and no sheet is written: a sheet with gaps would pass for the whole folder.

    Args:
        folder: Folder of images, searched with its subfolders.
        output: File to write, .png or .jpg.
        preset: How strong the visits are: mild, medium or severe.
        visits: Visits per image.
        images: At most so many images, spread evenly over the folder in the order of their paths.
        seed: Another seed, from 0 up, gives other visits.

    Returns:
        The written file.

    Raises:
        UserError: If the folder or its images are missing, an image cannot be decoded, the preset is unknown,
            a number is below 1, the seed is outside [0, 2⁶³), or the output cannot be written.
    """
    folder, output = Path(folder), Path(output)
    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}; choose one of {', '.join(PRESETS)}")
    if visits < 1 or images < 1:
        raise UserError(f"visits is {visits} and images is {images}; choose numbers from 1 up")
    if output.suffix.lower() not in {".png", ".jpg", ".jpeg"}:
        raise UserError(f"{output}: a contact sheet is a PNG or JPEG file; end its name with .png or .jpg")
    refuse_bad_seed(seed)

    paths = _find_images(folder)
    chosen = [paths[row * len(paths) // images] for row in range(images)] if len(paths) > images else paths
    rows = []
    for path in chosen:
        image = _read_image(path, folder)
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
    print(f"wrote {output}")
    return output


def _find_images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name a folder of images")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not paths:
        raise UserError(f"{folder}: no images inside; name a folder with {', '.join(sorted(IMAGE_SUFFIXES))} files")
    return paths


def _read_image(path: Path, folder: Path) -> torch.Tensor:
    try:
        image = load_image(path)
    except BadImageError as error:
        cause, _, _ = str(error).rpartition("; ")  # the rest is an option of other commands
        raise UserError(f"{cause}; replace it, or move it out of {folder}") from None
    height, width = image.shape[1:]
    if max(height, width) > _LONGEST_SIDE:
        image = F.resize(image, list(resized_shape(height, width, _LONGEST_SIDE)), antialias=True)
    return image


def _arrange(rows: list[list[torch.Tensor]], cell: int = 200, margin: int = 6) -> Image.Image:
    sheet = Image.new("RGB", (margin + len(rows[0]) * (cell + margin), margin + len(rows) * (cell + margin)), "white")
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            tile = F.to_pil_image(image)
            tile.thumbnail((cell, cell))
            left = margin + column * (cell + margin) + (cell - tile.width) // 2
            top = margin + row * (cell + margin) + (cell - tile.height) // 2
            sheet.paste(tile, (left, top))
    return sheet
