"""Applies clients' restrictions to logits."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gemma_serve.engine.sampling_state import SamplingState
from gemma_serve.engine.transfers import upload


def restrict(logits: Tensor, states: Sequence[SamplingState]) -> None:
    """Make what each row's ``Restrictions`` ban impossible.

    ``logits``: ``[num_seqs, vocab_size]``, modified.
    """
    rows: list[int] = []
    token_ids: list[int] = []
    for row, state in enumerate(states):
        if state.restrictions is None:
            continue
        if state.restrictions.allowed_token_ids is not None:
            _keep_only(logits[row], state.restrictions.allowed_token_ids)
        banned = state.restrictions.banned_token_ids
        rows += [row] * len(banned)
        token_ids += banned
    if rows:
        places = upload(torch.tensor([rows, token_ids]), logits.device)
        logits[places[0], places[1]] = -math.inf


def _keep_only(logits: Tensor, token_ids: Sequence[int]) -> None:
    """``logits``: ``[vocab_size]``, modified."""
    allowed = upload(torch.tensor(token_ids), logits.device)
    kept = logits[allowed]
    logits.fill_(-math.inf)
    logits[allowed] = kept
