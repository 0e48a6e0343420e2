"""How fast this machine reads memory: what bounds a decode step, which reads every weight once.

    python -m benchmarks.memory_bandwidth

The best of several reads of a bfloat16 buffer far larger than any cache, by all of torch's threads:
noise only ever slows a read down.
"""

from time import perf_counter
from typing import Final

import torch

BUFFER_BYTES: Final = 2**30
NUM_READS: Final = 7
_ROW_LENGTH: Final = 1024


def measure_read_bandwidth(buffer_bytes: int = BUFFER_BYTES, num_reads: int = NUM_READS) -> float:
    """Bytes per second. ``buffer_bytes``: a multiple of 4096."""
    weights = torch.ones(buffer_bytes // 2, dtype=torch.bfloat16)
    # As a float32 matrix times a vector, of the reads tried the fastest: two operations per word.
    matrix, vector = weights.view(torch.float32).view(-1, _ROW_LENGTH), torch.ones(_ROW_LENGTH)
    seconds = min(_seconds_of_product(matrix, vector) for _ in range(num_reads))
    return buffer_bytes / seconds


def _seconds_of_product(matrix: torch.Tensor, vector: torch.Tensor) -> float:
    begin = perf_counter()
    torch.mv(matrix, vector)
    return perf_counter() - begin


if __name__ == "__main__":
    bandwidth = measure_read_bandwidth()
    print(f"{bandwidth / 1e9:.1f} GB/s with {torch.get_num_threads()} threads")
