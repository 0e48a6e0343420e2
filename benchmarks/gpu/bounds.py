"""What a step must at least read and compute, from the shapes alone."""

from dataclasses import dataclass
from typing import Self

from torch import nn

from gemma_serve.gemma.loading import LoadedGemma
from gemma_serve.gemma.quantization.matrices import stored_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCosts:
    """Of the language model, the vision tower aside."""

    weights_bytes: int
    """Read by every step; the embedding is the output head, so all of it."""
    matrix_parameters: int
    """Of the layers: each costs two operations per token."""
    cache_bytes_per_token: int
    """Of one layer."""
    attention_flops_per_key: int
    """Of one query in one layer."""
    windows: tuple[int | None, ...]
    """Per layer."""

    @classmethod
    def of(cls, gemma: LoadedGemma) -> Self:
        decoder: nn.Module = gemma.model.get_decoder()
        config = gemma.model.config.get_text_config()
        heads = config.num_attention_heads + 2 * config.num_key_value_heads
        per_layer = config.hidden_size * (
            heads * config.head_dim
            + config.num_attention_heads * config.head_dim
            + 3 * config.intermediate_size
        )
        return cls(
            weights_bytes=stored_bytes(decoder),
            matrix_parameters=per_layer * config.num_hidden_layers,
            cache_bytes_per_token=2 * config.num_key_value_heads * config.head_dim * 2,
            attention_flops_per_key=4 * config.num_attention_heads * config.head_dim,
            windows=tuple(
                config.sliding_window if kind == "sliding_attention" else None
                for kind in config.layer_types
            ),
        )

    def decode_bytes(self, num_streams: int, context: int) -> int:
        """Read by a step of ``num_streams``, each of which sees ``context`` tokens."""
        num_keys = sum(context if w is None else min(w, context) for w in self.windows)
        return self.weights_bytes + num_streams * num_keys * self.cache_bytes_per_token

    def prefill_flops(self, num_tokens: int) -> int:
        """Of a prompt; the head sees its last token only, which is left out."""
        pairs = sum(_visible_pairs(num_tokens, window) for window in self.windows)
        matrices = 2 * self.matrix_parameters * num_tokens
        return matrices + pairs * self.attention_flops_per_key


def _visible_pairs(num_tokens: int, window: int | None) -> int:
    """Pairs of a query and a key that it sees."""
    reach = num_tokens if window is None else min(window, num_tokens)
    return reach * (reach + 1) // 2 + (num_tokens - reach) * reach
