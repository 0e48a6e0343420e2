"""How much of everything is measured: the real thing, or a rehearsal of it on a CPU."""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Sizes of models and of work."""

    sizes: tuple[str, ...]
    """Of ``models.load``, the most important first."""
    peer_sizes: tuple[str, ...]
    quantized_sizes: tuple[str, ...]
    num_streams: tuple[int, ...]
    prompt_tokens: int
    """Of streams that decode."""
    decode_steps: int
    long_prompt_tokens: int
    arrival_streams: int
    arrival_steps: int
    steps_per_arrival: int
    """A long prompt arrives so often."""
    burst_requests: int
    burst_tokens: int
    max_model_len: int
    chat_tokens: int
    """Of the chats that capacity is counted in."""
    prefill_chunk_size: int
    kv_cache_memory_bytes: int | None
    bandwidth_bytes: int
    matmul_size: int
    host_steps: int
    host_streams: tuple[int, ...]
    model_s: float
    """What loading one model and measuring it takes at most, for ``--budget-s``."""


FULL: Final = Scale(
    sizes=("27b", "4b", "12b"),
    peer_sizes=("4b", "12b"),
    quantized_sizes=("27b", "4b"),
    num_streams=(1, 8, 64, 256),
    prompt_tokens=256,
    decode_steps=64,
    long_prompt_tokens=4096,
    arrival_streams=32,
    arrival_steps=256,
    steps_per_arrival=32,
    burst_requests=64,
    burst_tokens=64,
    max_model_len=8192,
    chat_tokens=8192,
    prefill_chunk_size=2048,
    kv_cache_memory_bytes=None,
    bandwidth_bytes=4 * 2**30,
    matmul_size=8192,
    host_steps=256,
    host_streams=(1, 8, 64),
    model_s=60.0,
)

TINY: Final = Scale(
    sizes=("tiny",),
    peer_sizes=("tiny",),
    quantized_sizes=("tiny",),
    num_streams=(1, 4),
    prompt_tokens=12,
    decode_steps=4,
    long_prompt_tokens=96,
    arrival_streams=3,
    arrival_steps=12,
    steps_per_arrival=4,
    burst_requests=4,
    burst_tokens=4,
    max_model_len=256,
    chat_tokens=128,
    prefill_chunk_size=32,
    kv_cache_memory_bytes=2**22,
    bandwidth_bytes=64 * 2**20,
    matmul_size=256,
    host_steps=16,
    host_streams=(1, 8),
    model_s=5.0,
)
