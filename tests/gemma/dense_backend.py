"""What the kernels on a GPU are told, read by plain torch: tests what they are told."""

import torch
from torch import Tensor

from gemma_serve.gemma.attention.block_tables import BlockTables
from gemma_serve.gemma.attention.device import (
    DeviceAttention,
    DeviceBackend,
    StepTokens,
    TileSizes,
)
from gemma_serve.gemma.kv_cache import KVCache


class DenseBackend(DeviceBackend):
    """Every query against all keys that its table has room for. Slow."""

    def __init__(self, cache: KVCache, *, num_seats: int, max_model_len: int) -> None:
        tables = BlockTables(cache, num_seats=num_seats, max_model_len=max_model_len)
        super().__init__(cache, tables, TileSizes(short=2, long=5))

    def over(self, tokens: StepTokens) -> "DenseAttention":
        return DenseAttention(self.cache, self.tables, tokens)


class DenseAttention(DeviceAttention):
    def _write(self, layer: int, tokens: StepTokens, key: Tensor, value: Tensor) -> None:
        there = torch.nonzero(tokens.key_ends)[:, 0]
        slots = self._slots(layer, tokens.seats[there])
        slots = slots.gather(1, tokens.positions[there, None])[:, 0]
        self._cache.write(layer, slots, key[there], value[there])

    def _attend(self, layer: int, tokens: StepTokens, query: Tensor, scale: float) -> Tensor:
        slots = self._slots(layer, tokens.seats)
        keys, values = self._cache.read(layer, slots, torch.float32)
        num_tokens, _, head_dim = query.shape
        queries = query.view(num_tokens, keys.shape[2], -1, head_dim).float()
        scores = torch.einsum("tkgd,tnkd->tkgn", queries, keys) * scale
        places = torch.arange(keys.shape[1])
        visible = places < tokens.key_ends[:, None]
        if (window := self._window(layer)) is not None:
            visible &= places > tokens.positions[:, None] - window
        scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
        weights = scores.softmax(-1).nan_to_num(0.0)  # padding sees nothing
        output = torch.einsum("tkgn,tnkd->tkgd", weights, values)
        tiles = torch.cat((tokens.short_tiles, tokens.long_tiles))
        rows = [row for first, num in tiles.tolist() for row in range(first, first + num)]
        assert sorted(rows) == list(range(num_tokens))
        return output.reshape(query.shape).to(query.dtype)

    def _slots(self, layer: int, seats: Tensor) -> Tensor:
        """Of all that a seat's table names: ``[num_tokens, max_blocks * block_size]``."""
        size = self._cache.block_size
        table = self._table(layer, seats.device)[seats].long()
        return (table[:, :, None] * size + torch.arange(size)).flatten(1)
