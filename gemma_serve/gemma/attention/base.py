"""What the decoder asks of attention, however it is computed."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from torch import Tensor

from gemma_serve.gemma.attention.step import Chunk
from gemma_serve.gemma.kv_cache import KVCache


class StepAttention(ABC):
    """Attention of one step over the paged cache, for all layers.

    All keys and values of the step are written before any of its queries attends.
    """

    @abstractmethod
    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Queries ``[num_tokens, num_heads, head_dim]``, keys and values with ``num_kv_heads``.

        Returns the shape of the queries.
        """


AttentionFactory = Callable[[KVCache, Sequence[Chunk]], StepAttention]
"""Begins the attention of a step whose tokens are those of the chunks, one after another."""
