"""The device that is measured, and how fast it can be at all."""

from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Final

import torch

from benchmarks.gpu.findings import Finding
from benchmarks.gpu.scale import Scale
from benchmarks.memory_bandwidth import measure_read_bandwidth

_REPEATS: Final = 10


class Ceilings:
    """Measured once: what no step can be faster than."""

    def __init__(self, device: torch.device, scale: Scale) -> None:
        self.bytes_per_s = _bandwidth(device, scale.bandwidth_bytes)
        """Of reading memory."""
        self.flops = _matmul_rate(device, scale.matmul_size)
        """Of bfloat16 products, per second."""

    def findings(self) -> Iterator[Finding]:
        yield Finding(what="memory read", value=self.bytes_per_s / 1e9, unit="GB/s")
        yield Finding(what="bfloat16 matmul", value=self.flops / 1e12, unit="TFLOP/s")


def seconds_of(run: Callable[[], object], device: torch.device, repeats: int = _REPEATS) -> float:
    """The best of three series of ``repeats``, per repetition; the first call is not counted."""
    run()
    return min(_series(run, device, repeats) for _ in range(3)) / repeats


def _series(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    synchronize(device)
    begin = perf_counter()
    for _ in range(repeats):
        run()
    synchronize(device)
    return perf_counter() - begin


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release_memory(device: torch.device) -> None:
    """What deleted models and engines have left in torch's pools."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _bandwidth(device: torch.device, num_bytes: int) -> float:
    if device.type == "cpu":
        return measure_read_bandwidth(num_bytes)
    words = torch.ones(num_bytes // 4, device=device)
    matrix, vector = words.view(-1, 4096), torch.ones(4096, device=device)
    # Neither reaches the bound on every GPU: the faster one is nearer.
    reads = (words.amax, lambda: torch.mv(matrix, vector))
    return max(num_bytes / seconds_of(read, device) for read in reads)


def _matmul_rate(device: torch.device, size: int) -> float:
    factors = [torch.randn(size, size, device=device).bfloat16() for _ in range(2)]
    return 2 * size**3 / seconds_of(lambda: torch.mm(*factors), device)
