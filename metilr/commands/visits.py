"""A contact sheet: images of a folder, each beside a few simulated visits to it."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.v2 import functional as F

from metilr.data.decode import BadImageError, find_images, load_image, resized_shape
from metilr.data.visits import PRESETS, derive_seed, refuse_bad_seed, simulate_visit
from metilr.errors import UserError
from metilr.files import write_picture

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

    paths, left_aside = find_images(folder)
    chosen = [paths[row * len(paths) // images] for row in range(images)] if len(paths) > images else paths
    rows = []
    for path in chosen:
        image = _read_image(path, folder)
        name = path.relative_to(folder).as_posix()
        seeds = [derive_seed(seed, name, visit) for visit in range(visits)]
        rows.append([image, *(simulate_visit(image, PRESETS[preset], each) for each in seeds)])
    sheet = arrange(rows)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        kind = "PNG" if output.suffix.lower() == ".png" else "JPEG"
        write_picture(output, partial(sheet.save, format=kind))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {output} ({reason}); choose another --output") from error
    print(f"wrote {output}" + (f"; left aside: {left_aside}" if left_aside else ""))
    return output


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


def arrange(
    rows: Sequence[Sequence[torch.Tensor]], captions: Sequence[str] = (), cell: int = 200, margin: int = 6
) -> Image.Image:
    """Lay images out on a white sheet.

    Args:
        rows: Images, uint8 ``(3, H, W)`` each; rows may differ in length.
        captions: A line above each row; none if empty.
        cell: Longest side that an image is reduced to, in px.
        margin: Between images, in px.
    """
    line = 24 if captions else 0
    columns = max(len(images) for images in rows)
    height = margin + len(rows) * (line + cell + margin)
    sheet = Image.new("RGB", (margin + columns * (cell + margin), height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=16)
    for row, images in enumerate(rows):
        row_top = margin + row * (line + cell + margin)
        if captions:
            draw.text((margin, row_top), captions[row], fill="black", font=font)
        for column, image in enumerate(images):
            tile = F.to_pil_image(image)
            tile.thumbnail((cell, cell))
            left = margin + column * (cell + margin) + (cell - tile.width) // 2
            top = row_top + line + (cell - tile.height) // 2
            sheet.paste(tile, (left, top))
    return sheet
