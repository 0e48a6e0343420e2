"""The engine's limits."""

from dataclasses import dataclass
from typing import Literal

from gemma_serve.errors import ConfigurationError

AttentionSetting = Literal["auto", "triton", "varlen", "native", "sdpa", "reference"]
Speculation = Literal["off", "prompt_lookup"]
CacheDType = Literal["auto", "fp8"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How much the engine takes on at once. Every default says why in ``config/settings.py``."""

    max_model_len: int | None = None
    """Tokens of prompt and completion together; ``None``: what the checkpoint was trained for."""
    max_num_seqs: int = 32
    """Sequences that are computed together."""
    max_queued_requests: int = 256
    """Sequences that wait for one of those places before new requests are refused."""
    prefill_chunk_size: int = 512
    """Prompt tokens computed per step, over all sequences. An image is never cut."""
    max_prefill_slowdown: float | None = None
    """While sequences decode, a step with prompts may take so many times as long as one without;
    ``None``: what suits the device."""
    block_size: int = 16
    """Tokens per block of the KV cache."""
    kv_cache_memory_bytes: int | None = None
    """Memory for keys and values; ``None``: sized from the device and ``max_model_len``."""
    kv_cache_dtype: CacheDType = "auto"
    """How keys and values are stored; ``auto`` is as the model computes them."""
    vision_cache_memory_bytes: int | None = None
    """Memory for features of images seen lately; 0 keeps none, ``None``: sized from the device."""

    attention: AttentionSetting = "auto"
    """Whose attention kernels compute; ``auto``: the fastest that work here."""
    enforce_eager: bool = False
    """Launch each operation of a decode step by itself, although a GPU could replay them all, and
    only when the last step's tokens are known."""

    enable_prefix_cache: bool = True
    """Whether prompts that begin alike share keys and values, also one after the other."""

    speculation: Speculation = "off"
    """Whether tokens are guessed from the text that is there."""
    draft_model: str | None = None
    """A smaller model that guesses them, where the text has no guess; as ``ModelConfig.model``."""
    num_speculative_tokens: int = 8
    """Guesses per sequence and step, at most."""

    @property
    def speculates(self) -> bool:
        return self.speculation != "off" or self.draft_model is not None

    @property
    def max_sampled_rows(self) -> int:
        """Tokens sampled in one step. Guesses take places that sequences leave free, but a server
        for one user has room for them too."""
        if not self.speculates:
            return self.max_num_seqs
        return max(self.max_num_seqs, 1 + self.num_speculative_tokens)

    def __post_init__(self) -> None:
        for name in (
            "max_num_seqs",
            "prefill_chunk_size",
            "block_size",
            "num_speculative_tokens",
        ):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_queued_requests", "vision_cache_memory_bytes"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigurationError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.speculates and self.num_speculative_tokens >= self.prefill_chunk_size:
            # A sequence's blocks are counted for chunks, one token and its guesses among them.
            raise ConfigurationError(
                f"num_speculative_tokens is {self.num_speculative_tokens}, which must be less than "
                f"prefill_chunk_size, {self.prefill_chunk_size}"
            )
        if self.max_prefill_slowdown is not None and self.max_prefill_slowdown <= 1:
            raise ConfigurationError(
                f"max_prefill_slowdown must be greater than 1, got {self.max_prefill_slowdown}"
            )
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ConfigurationError(
                f"max_model_len must hold a prompt and an answer: at least 2, "
                f"got {self.max_model_len}"
            )
