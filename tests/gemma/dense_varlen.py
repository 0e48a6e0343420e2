"""``torch.nn.attention.varlen.varlen_attn`` as its documentation reads, on any device."""

from itertools import pairwise

import torch
from torch import Tensor


def dense_varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Tensor,
    block_table: Tensor,
) -> Tensor:
    """Of pages alone. The last query of a sequence stands at its last key."""
    assert cu_seq_k is None
    assert enable_gqa
    starts, num_keys = cu_seq_q.tolist(), seqused_k.tolist()
    assert max_q == max(end - start for start, end in pairwise(starts))
    assert max_k == max(num_keys)
    outputs = []
    for index, (start, end) in enumerate(pairwise(starts)):
        pages = block_table[index].long()
        keys, values = (pool[pages].flatten(0, 1)[: num_keys[index]] for pool in (key, value))
        group_size = query.shape[1] // keys.shape[1]
        keys, values = (t.repeat_interleave(group_size, 1).transpose(0, 1) for t in (keys, values))
        scores = query[start:end].transpose(0, 1) @ keys.transpose(1, 2) * scale
        scores = scores.masked_fill(
            ~_visible(end - start, num_keys[index], window_size), float("-inf")
        )
        outputs.append((scores.softmax(-1) @ values).transpose(0, 1))
    return torch.cat(outputs)


def _visible(num_queries: int, num_keys: int, window_size: tuple[int, int]) -> Tensor:
    left, right = window_size
    distance = (
        torch.arange(num_keys) - torch.arange(num_keys - num_queries, num_keys)[:, None]
    )  # of each key behind each query
    visible = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        visible &= distance >= -left
    if right >= 0:
        visible &= distance <= right
    return visible
