"""Copies between host and GPU that go on while the GPU computes."""

import torch
from torch import Tensor


class HostCopy:
    """Descriptors on their way from a GPU, which may still be computing them; used as a future is.

    Args:
        descriptors: On a GPU; the copy is in line behind what computes them.
    """

    def __init__(self, descriptors: Tensor) -> None:
        self._copy = descriptors.to("cpu", non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record(torch.cuda.current_stream(descriptors.device))

    def done(self) -> bool:
        """Whether they have arrived."""
        return bool(self._copied.query())

    def result(self) -> Tensor:
        """Wait for them, and for nothing that was begun later."""
        self._copied.synchronize()
        return self._copy


class SideStream:
    """Where batches are copied to a GPU while it computes what was begun before."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def copy(self, images: Tensor) -> Tensor:
        """Begin to copy images from pinned memory; what uses them from here on waits for the copy."""
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            copied = images.to(self._device, non_blocking=True)
        computing.wait_stream(self._stream)
        copied.record_stream(computing)  # else its memory would be given to the next copy too early
        return copied
