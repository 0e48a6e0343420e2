"""Ways to choose tokens: which of them a sequence needs, and their tensor operations."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_serve.engine.sampling.rows import in_slices, most_probable, slice_at, unnormalised
from gemma_serve.engine.sampling_state import SamplingState
from gemma_serve.engine.transfers import upload
from gemma_serve.generation import SamplingParams

_NUM_SPARE_CANDIDATES = 64
"""Candidates beyond ``top_k``, for tokens as probable as the last one: top_k keeps them all."""

_NUM_NUCLEUS_CANDIDATES = 1024
"""Candidates for top_p and min_p without top_k. Flatter distributions are sorted whole."""

_MIN_TEMPERATURE = 1e-30
"""Float32 holds its reciprocal; any temperature near it leaves only the most probable tokens."""


@dataclass(frozen=True, slots=True)
class Method:
    """What sequences must have in common to be sampled by the same tensor operations."""

    num_candidates: int | None
    """Most probable tokens that are looked at: 1 is greedy, ``None`` weighs all without order."""
    is_adjusted: bool
    """Whether penalties or biases change the logits first."""

    @classmethod
    def of(cls, state: SamplingState, vocab_size: int) -> "Method":
        return cls(_num_candidates(state.sampling, vocab_size), state.adjustments is not None)

    def thorough(self, vocab_size: int) -> "Method":
        """The same, and sure to find a token."""
        return self if self.num_candidates == 1 else Method(vocab_size, self.is_adjusted)


def _num_candidates(sampling: SamplingParams, vocab_size: int) -> int | None:
    if sampling.temperature == 0 or sampling.top_p == 0 or sampling.top_k == 1:
        return 1
    if sampling.top_k is None or sampling.top_k >= vocab_size:
        if sampling.top_p >= 1 and sampling.min_p <= 0:
            return None
        return min(_NUM_NUCLEUS_CANDIDATES, vocab_size)
    # Powers of two: a row's arithmetic then depends on its own top_k alone, not on the batch.
    num_candidates = 1 << (sampling.top_k + _NUM_SPARE_CANDIDATES - 1).bit_length()
    return num_candidates if num_candidates <= vocab_size // 4 else vocab_size


@dataclass(frozen=True, slots=True)
class Parameters:
    """One column per parameter, ``[num_seqs, 1]`` float64 on the device."""

    row: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    repetition_penalty: Tensor
    presence_penalty: Tensor
    frequency_penalty: Tensor
    uniform: Tensor

    @staticmethod
    def upload(
        states: Sequence[SamplingState], rows: Sequence[int], device: torch.device
    ) -> Tensor:
        """The table of parameters of ``rows``, in that order: ``[len(rows), num_parameters]``."""
        values = [_parameter_values(row, states[row]) for row in rows]
        return upload(torch.tensor(values, dtype=torch.float64), device)

    @classmethod
    def of(cls, table: Tensor) -> "Parameters":
        return cls(*torch.split(table, 1, dim=1))


def _parameter_values(row: int, state: SamplingState) -> tuple[float, ...]:
    sampling = state.sampling
    return (
        row,
        max(sampling.temperature, _MIN_TEMPERATURE),
        math.inf if sampling.top_k is None else sampling.top_k,
        sampling.top_p,
        sampling.min_p,
        sampling.repetition_penalty,
        sampling.presence_penalty,
        sampling.frequency_penalty,
        state.uniform(),
    )


@dataclass(frozen=True, slots=True)
class Choice:
    token_ids: Tensor
    """``[num_seqs]`` int64."""
    is_final: Tensor
    """``[num_seqs]`` bool: false where the candidates did not suffice or logits are not finite."""


def choose_by(method: Method, logits: Tensor, parameters: Parameters) -> Choice:
    if method.num_candidates == 1:
        return _choose_greedily(logits)
    if method.num_candidates is None:
        return _choose_from_all(logits, parameters)
    return _choose_from_candidates(logits, parameters, method.num_candidates)


def _choose_greedily(logits: Tensor) -> Choice:
    """The most probable token; of equals the lowest id."""
    slices = in_slices(logits)
    maxima = slices.amax(dim=2)  # [num_seqs, num_slices]
    best_slice = maxima.argmax(dim=1, keepdim=True)  # the first of equals
    within = slice_at(slices, best_slice).argmax(dim=1, keepdim=True)
    token_ids = best_slice * slices.shape[2] + within
    return Choice(token_ids.flatten(), maxima.amax(dim=1).isfinite())


def _choose_from_all(logits: Tensor, parameters: Parameters) -> Choice:
    """Inverse CDF over the whole vocabulary in the order of ids: nothing needs sorting."""
    maximum = in_slices(logits).amax(dim=2).amax(dim=1, keepdim=True)
    weights = in_slices(unnormalised(logits, maximum, parameters.temperature))
    masses = weights.sum(dim=2, dtype=torch.float64).cumsum(dim=1)  # up to and with each slice
    target = parameters.uniform * masses[:, -1:]
    chosen_slice = _inverse_cdf(masses, target, masses[:, -1:])
    mass_before = torch.where(
        chosen_slice > 0, masses.gather(1, (chosen_slice - 1).clamp(min=0)), 0.0
    )
    masses_within = slice_at(weights, chosen_slice).double().cumsum(dim=1)
    within = _inverse_cdf(masses_within, target - mass_before, masses_within[:, -1:])
    token_ids = chosen_slice * weights.shape[2] + within
    return Choice(token_ids.flatten(), maximum.isfinite().flatten())


def _choose_from_candidates(logits: Tensor, parameters: Parameters, num_candidates: int) -> Choice:
    """Inverse CDF over the most probable tokens, the most probable first.

    Every limit keeps a prefix of them: top_k by rank (and what equals the last rank), top_p by the
    mass before a token, min_p by the weight, which is relative to the first token's.
    """
    values, candidate_ids = most_probable(logits, num_candidates)  # [num_seqs, num_candidates]
    weights = ((values.double() - values[:, :1].double()) / parameters.temperature).exp()
    last_rank = (parameters.top_k.clamp(max=num_candidates) - 1).long()
    is_kept = values >= values.gather(1, last_rank)
    masses = (weights * is_kept).cumsum(dim=1)  # up to and with each candidate
    total = masses[:, -1:]
    if num_candidates == _NUM_NUCLEUS_CANDIDATES:
        whole = in_slices(unnormalised(logits, values[:, :1], parameters.temperature))
        whole_mass = whole.sum(dim=1).double().sum(dim=1, keepdim=True)
        total = torch.where(parameters.top_k.isinf(), whole_mass, total)
    is_kept &= (masses - weights < parameters.top_p * total) | (parameters.top_p >= 1)
    is_kept &= (weights >= parameters.min_p) & (weights > 0)

    last_kept = (is_kept.sum(dim=1, keepdim=True) - 1).clamp(min=0)
    kept_mass = masses.gather(1, last_kept)
    ranks = _inverse_cdf(masses, parameters.uniform * kept_mass, kept_mass)
    is_final = values[:, :1].isfinite()
    if num_candidates < logits.shape[1]:
        # Tokens as probable as the last candidate may be missing, and so may all after it.
        is_final &= values.gather(1, last_kept) > values[:, -1:]
    return Choice(candidate_ids.gather(1, ranks).flatten(), is_final.flatten())


def _inverse_cdf(masses: Tensor, target: Tensor, total: Tensor) -> Tensor:
    """The first index whose cumulative mass exceeds ``target``: never one without mass of its own.

    ``target`` is below ``total`` but for rounding, which is undone. All but ``masses``:
    ``[num_seqs, 1]``.
    """
    below_total = torch.nextafter(total, torch.zeros_like(total))
    return (masses <= torch.minimum(target, below_total)).sum(dim=1, keepdim=True)
