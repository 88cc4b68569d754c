"""A contact sheet: images of a folder, each beside a few simulated visits to it."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from PIL import Image, ImageDraw, ImageFont

from metilr.data.decode import BadImageError, load_image
from metilr.data.folder import find_images
from metilr.errors import UserError
from metilr.files import write_picture

if TYPE_CHECKING:
    from torch import Tensor

LONGEST_SIDE = 500  # px of a visit's source: the Met's own images are as large; a sheet shows no more
CELL, MARGIN = 200, 6  # px of a sheet: longest side that an image is reduced to, and between images


def write_contact_sheet(
    folder: Path,
    output: Path,
    preset: Literal["mild", "medium", "severe"] = "medium",
    visits: int = 5,
    images: int = 8,
    seed: int = 0,
) -> Path:
    """Draw simulated visits to the images of a folder on one sheet.

    A row an image: first the image itself, then its visits. A chosen image that cannot be decoded ends the command by
    name: a sheet with gaps would pass for the whole folder.

    Args:
        folder: Folder of images, searched with its subfolders.
        output: File to write, .png or .jpg.
        preset: How strong the visits are.
        visits: Visits per image.
        images: At most so many images, spread evenly over the folder in the order of their paths.
        seed: Another seed, from 0 up, gives other visits.
    """
    from metilr.data.visits import PRESETS, derive_seed, refuse_bad_seed, simulate_visit  # torch, too slow for --help

    folder, output = Path(folder), Path(output)
    for name, number in (("visits", visits), ("images", images)):
        if number < 1:
            raise UserError(f"{number}: choose 1 or more", name)
    kind = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}.get(output.suffix.lower())
    if kind is None:
        raise UserError(f"{output}: a contact sheet is a PNG or JPEG file; end its name with .png or .jpg", "output")
    refuse_bad_seed(seed)

    paths, left_aside = find_images(folder)
    chosen = [paths[row * len(paths) // images] for row in range(images)] if len(paths) > images else paths
    rows = []
    for path in chosen:
        try:
            image = load_image(path)
            image = load_image(path, LONGEST_SIDE) if max(image.shape) > LONGEST_SIDE else image
        except BadImageError as error:
            remedy = f"replace it, or move it out of {folder}"
            raise UserError(f"{path}: cannot be decoded ({error.reason}); {remedy}") from None
        name = path.relative_to(folder).as_posix()
        seeds = [derive_seed(seed, name, visit) for visit in range(visits)]
        rows.append([image, *(simulate_visit(image, PRESETS[preset], each) for each in seeds)])
    output.parent.mkdir(parents=True, exist_ok=True)
    write_picture(output, partial(arrange(rows).save, format=kind))
    print(f"wrote {output}" + (f"; left aside: {left_aside}" if left_aside else ""))
    return output


def arrange(rows: "Sequence[Sequence[Tensor]]", captions: Sequence[str] = ()) -> Image.Image:
    """Lay rows of images, uint8 ``(3, H, W)`` each, out on a white sheet, each under its caption if there is one."""
    line = 24 if captions else 0
    columns = max(len(images) for images in rows)
    height = MARGIN + len(rows) * (line + CELL + MARGIN)
    sheet = Image.new("RGB", (MARGIN + columns * (CELL + MARGIN), height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=16)
    for row, images in enumerate(rows):
        row_top = MARGIN + row * (line + CELL + MARGIN)
        if captions:
            draw.text((MARGIN, row_top), captions[row], fill="black", font=font)
        for column, image in enumerate(images):
            tile = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
            tile.thumbnail((CELL, CELL))
            left = MARGIN + column * (CELL + MARGIN) + (CELL - tile.width) // 2
            sheet.paste(tile, (left, row_top + line + (CELL - tile.height) // 2))
    return sheet
