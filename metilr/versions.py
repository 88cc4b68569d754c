"""Which versions of the libraries made a result."""

import platform
from importlib.metadata import PackageNotFoundError, version

from metilr import __version__

LIBRARIES = (
    "torch", "torchvision", "pytorch-lightning", "torchmetrics", "timm", "numpy", "pillow", "faiss-gpu", "faiss-cpu",
    "opencv-python-headless", "openvino",
)  # fmt: skip


def library_versions() -> dict[str, str]:
    """Versions of metilr, Python and the installed libraries that numbers can depend on."""
    found = {"metilr": __version__, "python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:  # faiss comes as one of two packages
            continue
    return found
