"""Describe photos by a file of ``metilr export`` and search an index's descriptors, without PyTorch.

Stands by itself, to be copied: needs NumPy, Pillow and ONNX Runtime. A photo is decoded as metilr does it: turned as
EXIF says, transparent parts on white, colours to sRGB by an RGB profile, resized alike. Not so: grey of more than 8
bits, which is refused, grey and CMYK by a profile, unusual kinds of TIFF, and metilr's limits for hostile files.
"""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageCms, ImageOps


class OnnxEmbedder:
    """The model in a file of ``metilr export``; ``notes`` is what the file says of it."""

    def __init__(self, path: str | Path) -> None:
        content = Path(path).read_bytes()
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        self.notes = json.loads(self.session.get_modelmeta().custom_metadata_map["metilr"])

    def describe(self, photo: str | Path | Image.Image) -> np.ndarray:
        """Describe a photo, a file or an opened image: float32 ``(dim,)``, unit length; ValueError if it is unfit."""
        if not isinstance(photo, Image.Image):
            with Image.open(photo) as image:
                return self.describe(image)
        rgb = to_rgb(photo)
        size = self.notes["image_size"]
        if isinstance(size, list):
            width, height = size
        else:
            ratio = 1 if size is None else size / max(rgb.size)
            width, height = (max(1, round(side * ratio)) for side in rgb.size)
        if not self.notes["least_side"] <= min(width, height) <= max(width, height) <= self.notes["most_side"]:
            limits = f"{self.notes['least_side']} to {self.notes['most_side']} px"
            raise ValueError(f"{height}x{width} px: the model takes sides of {limits}")
        if (width, height) != rgb.size:
            rgb = rgb.resize((width, height), Image.Resampling.BILINEAR)
        [[descriptor]] = self.session.run(None, {"image": np.asarray(rgb).transpose(2, 0, 1)[None]})
        return np.asarray(descriptor)

    def search(self, descriptor: np.ndarray, index: str | Path, n: int = 5) -> list[tuple[str, float]]:
        """The names of the n images in a ``.npz`` of ``metilr export`` most similar to a photo, with similarities."""
        with np.load(index) as arrays:
            if arrays["model"] != self.sha256:
                raise ValueError(f"{index}: holds descriptors of another model")
            similarities, names = arrays["descriptors"] @ descriptor, arrays["names"]
        return [(str(names[i]), float(similarities[i])) for i in np.argsort(-similarities, kind="stable")[:n]]


def to_rgb(image: Image.Image) -> Image.Image:
    """An image upright, in 8-bit sRGB, what is transparent laid on white."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        raise ValueError(f"pixels of mode {image.mode}: convert the image to 8 bits")
    profile, image = image.info.get("icc_profile"), ImageOps.exif_transpose(image)
    if not image.has_transparency_data:
        return _to_srgb(image, profile)
    layered = image.convert("RGBA")
    if layered.getchannel("A").getbbox() is None:
        raise ValueError("wholly transparent: save the image without transparency")
    colours = _to_srgb(layered.convert("RGB"), profile)
    return Image.composite(colours, Image.new("RGB", colours.size, "white"), layered.getchannel("A"))


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert by an RGB profile that moves a colour by more than two levels; others are sRGB, or damaged."""
    rgb = image.convert("RGB")
    try:
        transform = ImageCms.buildTransform(
            io.BytesIO(profile or b""), ImageCms.createProfile("sRGB"), "RGB", "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )  # fmt: skip
    except (ImageCms.PyCMSError, OSError):
        return rgb
    steps = np.linspace(0, 255, 9).round().astype(np.uint8)
    samples = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(27, 27, 3)
    moved = np.asarray(transform.apply(Image.fromarray(samples))).astype(int) - samples
    return transform.apply(rgb) if np.abs(moved).max() > 2 else rgb
