"""What is read from rows of logits that are as wide as a vocabulary."""

from typing import Final

import torch
from torch import Tensor

_NUM_SLICES: Final = 64
"""Slices that a vocabulary is searched in: about its square root (262144 = 64 * 4096), which makes
"the best of each, then the best of those" cheap."""

_MAX_ROWS_ON_CPU: Final = 8
"""Rows per pass on a CPU, whose caches hold a few rows of a large vocabulary and not 32."""

_MAX_ROWS: Final = 64
"""On a GPU: 64 rows of 262,144 numbers of 32 bits are 64 MiB, and enough work for it."""

_MAX_SORTED_ROWS: Final = 16
"""Sorting takes some 50 bytes per number."""


def rows_per_pass(num_rows: int, device: torch.device, *, sorts: bool = False) -> int:
    """How many rows the same operations had better take at once.

    What a pass takes of a GPU's memory is not there for keys and values.
    """
    most = _MAX_ROWS_ON_CPU if device.type == "cpu" else _MAX_SORTED_ROWS if sorts else _MAX_ROWS
    return min(num_rows, most)


def in_slices(logits: Tensor) -> Tensor:
    """View ``[num_seqs, vocab_size]`` as ``[num_seqs, num_slices, slice_size]``."""
    num_seqs, vocab_size = logits.shape
    return logits.view(num_seqs, _NUM_SLICES if vocab_size % _NUM_SLICES == 0 else 1, -1)


def slice_at(slices: Tensor, index: Tensor) -> Tensor:
    """One slice of each row, ``[num_seqs, slice_size]``. ``index``: ``[num_seqs, 1]``."""
    return slices.gather(1, index.unsqueeze(2).expand(-1, 1, slices.shape[2])).squeeze(1)


def most_probable(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Values and ids of the ``count`` best tokens per row, descending; of equals the lowest id."""
    num_seqs, vocab_size = logits.shape
    if count == vocab_size:
        ordered = logits.sort(dim=1, descending=True, stable=True)
        return ordered.values, ordered.indices
    slices = in_slices(logits)
    num_slices, slice_size = slices.shape[1:]
    if count >= slice_size:
        values, token_ids = logits.topk(count, dim=1, sorted=False)
    else:
        # A column holds the same place of every slice. The best tokens are in the best columns.
        columns = slices.amax(dim=1).topk(count, dim=1, sorted=False).indices
        contenders = slices.gather(2, columns.unsqueeze(1).expand(-1, num_slices, -1))
        values, places = contenders.reshape(num_seqs, -1).topk(count, dim=1, sorted=False)
        token_ids = places // count * slice_size + columns.gather(1, places % count)
    token_ids, by_id = token_ids.sort(dim=1)
    values, by_value = values.gather(1, by_id).sort(dim=1, descending=True, stable=True)
    return values, token_ids.gather(1, by_value)


def unnormalised(logits: Tensor, maximum: Tensor, temperature: Tensor) -> Tensor:
    """Unnormalised probabilities of all tokens, float32; the most probable has 1."""
    return torch.sub(logits, maximum.float()).div_(temperature.float()).exp_()
