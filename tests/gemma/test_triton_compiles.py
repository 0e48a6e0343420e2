"""Our kernels compile for GPUs and fit them; this needs Triton, and no GPU.

It runs in a process of its own, as this one may have been told to interpret kernels instead.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs the package triton, which comes with torch for CUDA")

MOST_STACK_BYTES = 128
"""Of a thread: a few numbers that its registers do not hold cost little, hundreds would cost most
of the time."""


@pytest.mark.parametrize(("gpu", "size"), [("a100", "4b"), ("rtx4090", "27b"), ("h100", "4b")])
def test_kernels_fit_shared_memory_and_registers(gpu: str, size: str, tmp_path: Path) -> None:
    kernels = compiled(gpu, size, cache=tmp_path)
    names = Counter(kernel["name"] for kernel in kernels)
    num_caches = 1 if gpu == "a100" else 2  # it has no float8
    # Of a short chunk, split or not, and a long one; in a layer that sees all, and one that does
    # not. No length of a sequence and no place in memory compiles another.
    assert names["attend_kernel"] == 2 * 3 * num_caches
    assert names["write_kernel"] == num_caches
    assert set(names) == {
        "write_kernel",
        "attend_kernel",
        "join_kernel",
        "norm_kernel",
        "add_norm_kernel",
        "rotate_kernel",
        "gelu_gate_kernel",
    }
    assert max(kernel["stack_bytes"] for kernel in kernels) <= MOST_STACK_BYTES


def compiled(gpu: str, size: str, *, cache: Path) -> list[dict[str, Any]]:
    """What ``triton_without_gpu`` tells of each kernel; it fails if one does not compile or fit."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, "-m", "tests.gemma.triton_without_gpu", gpu, size],
        cwd=Path(__file__).parents[2],
        env=environment | {"TRITON_CACHE_DIR": str(cache)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in process.stdout.splitlines()]
