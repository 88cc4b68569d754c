"""What computes a backbone's features: PyTorch, PyTorch compiled, or OpenVINO."""

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from metilr.errors import UserError
from metilr.models.features import Backbone, Features

Engine = Literal["torch", "compile", "openvino"]


def check_engine(engine: Engine, device: str) -> None:
    """Refuse an engine that does not run on a device, before any work.

    Raises:
        UserError: If it does not, or is not installed.
    """
    if engine not in ("torch", "compile", "openvino"):
        raise UserError(f"--engine {engine}: unknown; choose torch, compile or openvino")
    if engine != "openvino":
        return
    if device != "cpu":
        raise UserError("--engine openvino: runs on the CPU; add --accelerator cpu, or take --engine torch or compile")
    try:
        import openvino  # noqa: F401
    except ImportError:
        raise UserError(
            "--engine openvino: OpenVINO is not installed; pip install openvino, or describe with --engine torch"
        ) from None


def start_engine(
    engine: Engine, backbone: Backbone, precision: str, n_streams: int = 1
) -> Callable[[Tensor], Features] | None:
    """Make an engine ready to compute a backbone's features, in this process.

    Args:
        engine: Which.
        backbone: In its place on its device, in eval mode.
        precision: ``32`` or ``bf16-mixed``, for OpenVINO; the others take it from autocast.
        n_streams: Threads that may call the engine at a time, for OpenVINO; the cores are divided among them.

    Returns:
        Images to features, for ``Embedder.engine``; None for PyTorch as it is.

    Raises:
        UserError: If the engine cannot run this backbone so.
    """
    if engine == "torch":
        return None
    if engine == "compile":
        from metilr.compiled_engine import CompiledEngine  # seconds to import

        return CompiledEngine(backbone)
    from metilr.openvino_engine import OpenVINOEngine

    return OpenVINOEngine(backbone, precision, n_streams)
