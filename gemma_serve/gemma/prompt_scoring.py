"""Logprobs of prompt tokens, a slice of the prompt at a time."""

import math
from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from gemma_serve.engine.prompt_scores import TokenScore
from gemma_serve.engine.sampling.logprobs import LOGPROB_OF_NEVER
from gemma_serve.engine.scheduler import ScheduledBatch
from gemma_serve.engine.transfers import upload
from gemma_serve.gemma.decoder import Decoder

_MAX_ROWS: Final = 64
"""Per pass through the output head: 64 rows of 262,144 float32 logits are 64 MiB."""


def score_prompts(batch: ScheduledBatch, hidden_states: Tensor, decoder: Decoder) -> None:
    """Fill the ``PromptScores`` of the sequences that have some.

    ``hidden_states``: of the batch's tokens, as ``Decoder.forward`` gives them.
    """
    row = 0
    for scheduled in batch.scheduled:
        sequence, start = scheduled.sequence, scheduled.start
        if (scores := sequence.prompt_scores) is not None:
            missing = scores.missing(start, scheduled.end)
            for first in range(missing.start, missing.stop, _MAX_ROWS):
                last = min(first + _MAX_ROWS, missing.stop)
                logits = decoder.logits(hidden_states[row + first - start : row + last - start])
                next_ids = sequence.token_ids[first + 1 : last + 1]
                scores.extend(_scores(logits, next_ids, scores.num_top))
        row += scheduled.end - start


def _scores(logits: Tensor, next_ids: list[int], num_top: int) -> Iterator[TokenScore]:
    """``logits``: ``[num_rows, vocab_size]``, of the tokens before ``next_ids``."""
    logprobs = (
        logits.float().log_softmax(dim=1).nan_to_num_(nan=-math.inf).clamp_(min=LOGPROB_OF_NEVER)
    )
    chosen = logprobs.gather(1, upload(torch.tensor(next_ids), logits.device).unsqueeze(1))
    top = logprobs.topk(num_top, dim=1)
    columns = (chosen[:, 0].tolist(), top.indices.tolist(), top.values.tolist())
    for logprob, ids, values in zip(*columns, strict=True):
        yield TokenScore(logprob, tuple(zip(ids, values, strict=True)))
