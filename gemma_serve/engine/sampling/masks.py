"""Rule out the tokens that a grammar does not allow."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from gemma_serve.engine.sampling.rows import rows_per_pass
from gemma_serve.engine.transfers import upload


class MaskApplier:
    """Lowers logits to what packed masks allow.

    A mask is a bit per token id, lowest bit first, set where the token is allowed; ids beyond its
    end are not.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        values = torch.arange(256, device=device).unsqueeze(1)
        bits = values >> torch.arange(8, device=device) & 1
        # Looking eight ceilings up and taking minima is ten times as fast as masked_fill on a CPU.
        self._ceilings_by_byte = torch.where(bits == 1, math.inf, -math.inf)  # [256, 8] float32

    def apply(self, logits: Tensor, masks: Mapping[int, bytes]) -> None:
        """``logits``: ``[num_seqs, vocab_size]``, modified. ``masks``: by row."""
        if not masks:
            return
        rows = list(masks)
        packed = self._upload(masks)  # [num_rows, num_bytes]
        step = rows_per_pass(len(rows), self._device)
        for start in range(0, len(rows), step):
            ceilings = self._ceilings_by_byte.to(logits.dtype).index_select(
                0, packed[start : start + step].flatten().int()
            )
            ceilings = ceilings.view(-1, packed.shape[1] * 8)[:, : self._vocab_size]
            index = _index(rows[start : start + step], self._device)
            logits[index] = torch.minimum(logits[index], ceilings)

    def _upload(self, masks: Mapping[int, bytes]) -> Tensor:
        num_bytes = (self._vocab_size + 7) // 8
        joined = bytearray().join(
            mask[:num_bytes].ljust(num_bytes, b"\0") for mask in masks.values()
        )
        packed = torch.frombuffer(joined, dtype=torch.uint8).view(len(masks), num_bytes)
        return upload(packed, self._device)


def _index(rows: list[int], device: torch.device) -> slice | Tensor:
    """A slice where there are no gaps: it makes views instead of copies."""
    if rows[-1] - rows[0] == len(rows) - 1:
        return slice(rows[0], rows[-1] + 1)
    return upload(torch.tensor(rows), device)  # a list would be copied with waiting
