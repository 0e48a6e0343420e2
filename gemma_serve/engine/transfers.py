"""Copies between the host and a device, for neither of which the host waits."""

from typing import Any

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """The same on ``device``.

    A GPU copies from pinned memory while the host goes on. From other memory the copy would begin
    at once, so that the host would wait for all that the GPU has yet to do.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Download:
    """A tensor's numbers on their way to the host, begun when this is made."""

    def __init__(self, tensor: Tensor) -> None:
        self._arrival: torch.cuda.Event | None = None
        if tensor.device.type != "cuda":
            self._host = tensor.to("cpu")
            return
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        self._arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's
        self._arrival.record(torch.cuda.current_stream(tensor.device))

    def wait(self) -> list[Any]:
        """The numbers, nested as in ``Tensor.tolist``, once they are there. What the device does
        after the copy is not waited for."""
        if self._arrival is not None:
            self._arrival.synchronize()
        numbers: list[Any] = self._host.tolist()
        return numbers
