"""Compiles what serving launches for GPUs that are not here, down to their machine code.

    python -m tests.gemma.triton_without_gpu h100 1b 4b

The launches are those of a server, with tensors on the CPU. Triton asks a *driver* which GPU there
is and has it load and launch what was compiled; ours names any GPU and launches nothing. Prints a
line of JSON for each compiled kernel.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any, Final

import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from gemma_serve.gemma.attention.block_tables import BlockTables
from gemma_serve.gemma.attention.step import Chunk
from gemma_serve.gemma.attention.triton_attention import GpuProperties, TritonBackend
from gemma_serve.gemma.dummy import dummy_config
from gemma_serve.gemma.fused_gate import fused_gelu_gate
from gemma_serve.gemma.fused_norms import FusedHeadNorms, FusedNorm
from gemma_serve.gemma.kv_cache import CacheLayout, KVCache
from gemma_serve.gemma.norms import Rotation
from gemma_serve.gemma.quantization.fp8 import FP8

_BLOCK_SIZE: Final = 16
_MAX_LEN: Final = 4096
_CPU: Final = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Gpu:
    capability: int
    """Compute capability, times ten."""
    shared_kib: int
    """Of one program at most: the CUDA C++ Programming Guide's table of technical specifications.
    """
    num_multiprocessors: int


GPUS: Final = {
    "a100": Gpu(80, 163, 108),
    "rtx4090": Gpu(89, 99, 128),
    "h100": Gpu(90, 227, 132),
    "b200": Gpu(100, 227, 148),
    "rtx5090": Gpu(120, 99, 170),
}


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel."""

    name: str
    num_warps: int
    shared_bytes: int
    num_registers: int
    """Of one thread."""
    stack_bytes: int
    """Memory of one thread for what its registers do not hold."""


class CompilingDriver:
    """Stands for the driver of a GPU."""

    def __init__(self, gpu: Gpu) -> None:
        self.compiled: list[Compiled] = []
        self.utils = SimpleNamespace(
            get_device_properties=lambda _device: {"max_shared_mem": gpu.shared_kib * 1024},
            load_binary=self._load_binary,
        )
        self._gpu = gpu
        self._num_warps = 0

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._gpu.capability, 32)

    def launcher_cls(self, _source: object, metadata: Any) -> Callable[..., None]:
        self._num_warps = metadata.num_warps
        return lambda *_args: None

    def _load_binary(
        self, name: str, binary: bytes, shared_bytes: int, _device: int
    ) -> tuple[str, str, int, int, int]:
        registers, stack_bytes = resources(binary)
        self.compiled.append(Compiled(name, self._num_warps, shared_bytes, registers, stack_bytes))
        return "module", "function", registers, 0, 1024


def resources(binary: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of each thread of a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return int(found[1]), int(found[2])


def launch_attention(size: str, gpu: Gpu, stored: torch.dtype) -> None:
    """Every kernel that steps of Gemma 3 ``size`` launch, in a layer of each kind.

    ``stored``: what the cache holds.
    """
    config = dummy_config(size).get_text_config()
    layers = [_CPU] * config.num_hidden_layers
    layout = CacheLayout.of(config, layers, stored).one_layer_per_window()
    cache = KVCache(layout, num_blocks=1, block_size=_BLOCK_SIZE)
    properties = GpuProperties(gpu.shared_kib * 1024, gpu.num_multiprocessors)
    for lengths in ([1], [1] * 1000, [2048, 1]):
        tables = BlockTables(cache, num_seats=len(lengths), max_model_len=_MAX_LEN)
        backend = TritonBackend(
            cache, tables, config.num_attention_heads, torch.bfloat16, properties
        )
        attention = backend.begin(cache, _chunks(lengths, len(layout.windows)))
        num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        shape = (sum(lengths), num_heads + 2 * num_kv_heads, config.head_dim)
        heads = torch.empty(shape, dtype=torch.bfloat16)
        query, key, value = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
        for layer in range(len(layout.windows)):
            attention.attend(layer, query, key, value, 1.0)


def launch_between_products(size: str) -> None:
    """What stands between the matrix products of a layer."""
    config = dummy_config(size).get_text_config()
    width, heads = config.hidden_size, config.num_attention_heads + config.num_key_value_heads
    norm = FusedNorm(Gemma3RMSNorm(width, config.rms_norm_eps))
    head_norm = Gemma3RMSNorm(config.head_dim, config.rms_norm_eps)
    head_norms = FusedHeadNorms(
        head_norm,
        head_norm,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
    )
    hidden, branch = torch.empty(2, width), torch.empty(2, width, dtype=torch.bfloat16)
    norm(hidden, torch.bfloat16)
    norm.add(hidden, branch)
    norm.add_and_norm(hidden, branch, norm, torch.bfloat16)
    angles = torch.empty(2, 1, config.head_dim)
    products = torch.empty(2, heads, config.head_dim, dtype=torch.bfloat16)
    head_norms(products, Rotation(angles, angles), torch.bfloat16)
    fused_gelu_gate(torch.empty(2, 2 * config.intermediate_size, dtype=torch.bfloat16))


def _chunks(lengths: Iterable[int], num_groups: int) -> list[Chunk]:
    """Of sequences that have no past, in block 0."""
    chunks = []
    row = 0
    for index, length in enumerate(lengths):
        blocks = tuple([0] * -(-length // _BLOCK_SIZE) for _ in range(num_groups))
        chunks.append(Chunk(row, 0, length, (), blocks, blocks_id=(index, 0)))
        row += length
    return chunks


def main(argv: Sequence[str]) -> None:
    """``argv``: one of ``GPUS``, then sizes of Gemma 3."""
    gpu = GPUS[argv[0]]
    compiling = CompilingDriver(gpu)
    driver.set_active(compiling)
    for size in argv[1:]:
        for stored in (torch.bfloat16, FP8) if gpu.capability >= 89 else (torch.bfloat16,):
            launch_attention(size, gpu, stored)
        launch_between_products(size)
    for kernel in compiling.compiled:
        print(json.dumps(asdict(kernel)))  # noqa: T201  # what it is for


if __name__ == "__main__":
    main(sys.argv[1:])
