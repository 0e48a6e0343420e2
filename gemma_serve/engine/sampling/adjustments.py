"""Applies penalties and biases to logits."""

import math
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from gemma_serve.engine.sampling.choices import Parameters
from gemma_serve.engine.sampling_state import LogitAdjustments, SamplingState
from gemma_serve.engine.transfers import upload


def adjust(logits: Tensor, states: Sequence[SamplingState], parameters: Parameters) -> Tensor:
    """A float32 copy of ``logits`` with penalties and biases applied to the tokens they touch."""
    adjustments = [state.adjustments for state in states if state.adjustments is not None]
    rows, token_ids, is_in_text, counts, biases = _upload(adjustments, logits.device)
    rows, token_ids = rows.long(), token_ids.long()
    adjusted = logits.to(torch.float32, copy=True)

    touched = adjusted[rows, token_ids].double()
    repetition = torch.where(is_in_text > 0, parameters.repetition_penalty[rows, 0], 1.0)
    touched = torch.where(touched > 0, touched / repetition, touched * repetition)
    touched -= parameters.frequency_penalty[rows, 0] * counts
    touched -= parameters.presence_penalty[rows, 0] * (counts > 0)
    adjusted[rows, token_ids] = finite_or_never((touched + biases).float())
    return adjusted


def _upload(adjustments: Sequence[LogitAdjustments], device: torch.device) -> Tensor:
    """Row, token id, is-in-text, count and bias of every touched token: ``[5, n]`` float64."""
    rows, token_ids, is_in_text, counts = (array("q") for _ in range(4))
    biases = array("d")
    for row, adjustment in enumerate(adjustments):
        rows.extend(array("q", [row]) * len(adjustment.token_ids))
        token_ids.extend(adjustment.token_ids)
        is_in_text.extend(adjustment.is_in_text)
        counts.extend(adjustment.counts)
        biases.extend(adjustment.biases)
    columns = (rows, token_ids, is_in_text, counts, biases)
    return upload(torch.stack([_as_float64(column) for column in columns]), device)


def _as_float64(column: "array[int] | array[float]") -> Tensor:
    dtype = torch.float64 if column.typecode == "d" else torch.int64
    if not column:  # frombuffer refuses empty buffers
        return torch.empty(0, dtype=torch.float64)
    return torch.frombuffer(column, dtype=dtype).double()


def finite_or_never(logits: Tensor) -> Tensor:
    return torch.nan_to_num(logits, nan=-math.inf, neginf=-math.inf)
