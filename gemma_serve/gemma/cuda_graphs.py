"""Records computations as CUDA graphs. Not measured on a GPU."""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

_NUM_WARM_UPS: Final = 2
"""Runs before the recording: kernels are compiled and libraries make their workspaces, which a
graph could not hold."""


class GraphRecorder:
    """Records on one GPU. The graphs share memory for what they compute on the way, so no two of
    them may run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        # One for all: cuBLAS keeps a workspace, tens of megabytes, for each stream it worked on.
        # And one that was made before the recording does not lie in the graphs' memory.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """A function that replays ``compute`` and returns the tensor that it returned."""
        with torch.cuda.device(self._device):
            self._warm_up(compute)
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the GPU meanwhile, as another engine's does.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                output = compute()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay

    def _warm_up(self, compute: Callable[[], Tensor]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(_NUM_WARM_UPS):
                compute()
        torch.cuda.current_stream().wait_stream(self._stream)
