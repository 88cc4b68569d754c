"""The image files of a folder."""

from pathlib import Path

from metilr.errors import UserError

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


def find_images(folder: Path) -> list[Path]:
    """List a folder's images with its sub-folders', in the order of their paths.

    Raises:
        UserError: If the folder is missing or holds no image.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name a folder of images")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not paths:
        raise UserError(f"{folder}: no images inside; name a folder with {', '.join(sorted(IMAGE_SUFFIXES))} files")
    return paths
