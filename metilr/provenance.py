"""What made a result besides options and data: code, libraries, and the machine."""

import contextlib
import functools
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from metilr import __version__

LIBRARIES = (
    "torch", "torchvision", "pytorch-lightning", "torchmetrics", "timm", "numpy", "pillow", "faiss-gpu", "faiss-cpu",
    "opencv-python-headless", "openvino",
)  # fmt: skip


def library_versions() -> dict[str, str]:
    """Versions of metilr, Python and the installed libraries that numbers can depend on."""
    found = {"metilr": __version__, "python": platform.python_version()}
    for library in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):  # faiss comes as one of two packages
            found[library] = version(library)
    return found


@functools.cache
def commit() -> str | None:
    """The commit that metilr runs from, ``-dirty`` if files were changed since; None if it is no git checkout."""
    folder = Path(__file__).parents[1]
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    if not (folder / ".git").exists():
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return None


def machine() -> dict[str, Any]:
    """What computes here: figures differ in the last digits from one kind of processor to another."""
    import torch

    gpu = None
    if torch.cuda.is_available():
        cudnn = torch.backends.cudnn.version()
        gpu = {"name": torch.cuda.get_device_name(0), "cuda": torch.version.cuda, "cudnn": cudnn}
    return {
        "system": platform.platform(),
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),  # that PyTorch uses, such as AVX512
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


@functools.cache
def processor() -> str:
    """The processor's model, as far as the system tells."""
    return _of_processor("model name") or platform.processor() or platform.machine()


def has_bfloat16() -> bool:
    """Whether the processor computes in bfloat16 itself, as far as the system tells; else it gains nothing there."""
    flags = {*_of_processor("flags").split(), *_of_processor("Features").split()}  # of x86 and of ARM
    return not flags.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def _of_processor(wanted: str) -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == wanted:
                return value.strip()
    return ""


def command() -> str | None:
    """The command line, if this is one of metilr's; None where a program of the user's calls."""
    script = Path(sys.argv[0])
    if script.stem == "metilr":
        return shlex.join(["metilr", *sys.argv[1:]])
    return shlex.join([Path(sys.executable).name, *sys.argv]) if script.name == "evaluate.py" else None


def peak_memory_gb() -> float | None:
    """Most memory that one process of this run has held, memory-mapped files included; None where nothing tells."""
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e9, 3)
