"""Choose the next token of many sequences at once, each by its own parameters."""

import logging
import math
from array import array
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_serve.engine.constraint import MaskThreads, PendingMasks
from gemma_serve.engine.model_runner import SampledToken
from gemma_serve.engine.sampler_logprobs import RowLogprobs
from gemma_serve.engine.sampler_masks import MaskApplier
from gemma_serve.engine.sampler_restrictions import restrict
from gemma_serve.engine.sampler_rows import (
    in_slices,
    most_probable,
    rows_per_pass,
    slice_at,
    unnormalised,
)
from gemma_serve.engine.sampling_state import LogitAdjustments, SamplingState
from gemma_serve.generation import SamplingParams

logger = logging.getLogger(__name__)

_NUM_SPARE_CANDIDATES = 64
"""Candidates beyond ``top_k``, for tokens as probable as the last one: top_k keeps them all."""

_NUM_NUCLEUS_CANDIDATES = 1024
"""Candidates for top_p and min_p without top_k. Flatter distributions are sorted whole."""

_MIN_TEMPERATURE = 1e-30
"""Float32 holds its reciprocal; any temperature near it leaves only the most probable tokens."""


@dataclass(frozen=True, slots=True)
class _Method:
    """What sequences must have in common to be sampled by the same tensor operations."""

    num_candidates: int | None
    """Most probable tokens that are looked at: 1 is greedy, ``None`` weighs all without order."""
    is_adjusted: bool
    """Whether penalties or biases change the logits first."""

    @classmethod
    def of(cls, state: SamplingState, vocab_size: int) -> "_Method":
        return cls(_num_candidates(state.sampling, vocab_size), state.adjustments is not None)

    def thorough(self, vocab_size: int) -> "_Method":
        """The same, and sure to find a token."""
        return self if self.num_candidates == 1 else _Method(vocab_size, self.is_adjusted)


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
class _Parameters:
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
        # Copied without waiting from pinned memory alone.
        host = torch.tensor(values, dtype=torch.float64, pin_memory=device.type == "cuda")
        return host.to(device, non_blocking=True)

    @classmethod
    def of(cls, table: Tensor) -> "_Parameters":
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
class _Choice:
    token_ids: Tensor
    """``[num_seqs]`` int64."""
    is_final: Tensor
    """``[num_seqs]`` bool: false where the candidates did not suffice or logits are not finite."""


class Sampler:
    """Chooses tokens for one model's vocabulary.

    A row's token depends on its logits and its ``SamplingState`` alone, never on its neighbours.
    ``forbidden_token_ids`` are never chosen. Belongs to the thread that runs the model.
    """

    def __init__(
        self, *, vocab_size: int, forbidden_token_ids: Sequence[int], device: torch.device
    ) -> None:
        forbidden = frozenset(forbidden_token_ids)
        self._vocab_size = vocab_size
        self._device = device
        self._forbidden = torch.tensor(sorted(forbidden), dtype=torch.int64, device=device)
        self._last_resort = min(set(range(vocab_size)) - forbidden)
        self._mask_threads = MaskThreads()
        self._mask_applier = MaskApplier(vocab_size, device)

    def start_masks(self, states: Sequence[SamplingState]) -> PendingMasks:
        """Begin to compute which tokens constraints allow, while the model computes the logits."""
        return self._mask_threads.start([state.constraint for state in states])

    @torch.inference_mode()
    def sample(
        self, logits: Tensor, states: Sequence[SamplingState], masks: PendingMasks | None = None
    ) -> list[SampledToken]:
        """The next token of each sequence.

        ``logits``: ``[num_seqs, vocab_size]`` bfloat16 or float32, modified. NaN counts as never.
        ``masks``: what ``start_masks`` gave for ``states``.
        A row without one finite logit, which only a broken model gives, gets the lowest id that is
        not forbidden: nothing can save its text, and the other rows must not suffer. One with a
        constraint gets none: its text must be right or end.
        """
        logprobs = RowLogprobs.read(logits, states)
        allowed = (masks or self.start_masks(states)).result()
        logits.index_fill_(1, self._forbidden, -math.inf)
        self._mask_applier.apply(
            logits, {row: mask for row, mask in allowed.items() if mask is not None}
        )
        restrict(logits, states)
        chosen = self._choose_all(logits, states)
        for row, mask in allowed.items():
            if mask is None:
                chosen.pop(row, None)
        return self._sampled_tokens(logits, states, chosen, logprobs)

    def _sampled_tokens(
        self,
        logits: Tensor,
        states: Sequence[SamplingState],
        chosen: Mapping[int, int],
        logprobs: RowLogprobs | None,
    ) -> list[SampledToken]:
        token_ids = [chosen.get(row, self._last_resort) for row in range(len(states))]
        reports = {} if logprobs is None else logprobs.report(logits, token_ids)
        return [
            SampledToken(None)
            if row not in chosen and states[row].constraint is not None
            else SampledToken(token_id, reports.get(row, ()))
            for row, token_id in enumerate(token_ids)
        ]

    def _choose_all(self, logits: Tensor, states: Sequence[SamplingState]) -> dict[int, int]:
        """Token ids by row, without the rows that have no finite logit."""
        methods = [_Method.of(state, self._vocab_size) for state in states]
        chosen = self._choose(logits, states, methods)
        if len(chosen) < len(states):
            remaining = [row for row in range(len(states)) if row not in chosen]
            chosen |= self._choose_thoroughly(logits, states, remaining)
        return chosen

    def _choose_thoroughly(
        self, logits: Tensor, states: Sequence[SamplingState], rows: Sequence[int]
    ) -> dict[int, int]:
        """For the few rows that need a full sort, or have logits that are not finite."""
        repaired = _finite_or_never(logits[rows].float())
        remaining = [states[row] for row in rows]
        methods = [
            _Method.of(state, self._vocab_size).thorough(self._vocab_size) for state in remaining
        ]
        chosen = self._choose(repaired, remaining, methods)
        if len(chosen) < len(rows):
            num_hopeless = len(rows) - len(chosen)
            logger.warning("%d of %d sequences have no finite logit", num_hopeless, len(states))
        return {rows[i]: token_id for i, token_id in chosen.items()}

    def _choose(
        self, logits: Tensor, states: Sequence[SamplingState], methods: Sequence[_Method]
    ) -> dict[int, int]:
        """Token ids by row, without the rows that need a more thorough search."""
        passes = self._passes(methods)
        rows = [row for _, group in passes for row in group]
        table = _Parameters.upload(states, rows, self._device)
        choices = []
        for (method, group), group_table in zip(
            passes, torch.split(table, [len(group) for _, group in passes]), strict=True
        ):
            parameters = _Parameters.of(group_table)
            group_logits = _select(logits, group, parameters.row)
            if method.is_adjusted:
                group_logits = _adjust(group_logits, [states[row] for row in group], parameters)
            choices.append(_choose_by(method, group_logits, parameters))
        token_ids = torch.cat([choice.token_ids for choice in choices])
        is_final = torch.cat([choice.is_final for choice in choices])
        # The one copy to the host.
        results = torch.stack((token_ids, is_final.long())).tolist()
        return {row: i for row, i, final in zip(rows, *results, strict=True) if final}

    def _passes(self, methods: Sequence[_Method]) -> list[tuple[_Method, list[int]]]:
        """Which rows are sampled together, and how."""
        groups: defaultdict[_Method, list[int]] = defaultdict(list)
        for row, method in enumerate(methods):
            groups[method].append(row)
        max_rows = rows_per_pass(len(methods), self._device)
        return [
            (method, rows[start : start + max_rows])
            for method, rows in groups.items()
            for start in range(0, len(rows), max_rows)
        ]


def _select(logits: Tensor, rows: Sequence[int], row_column: Tensor) -> Tensor:
    """``rows`` of ``logits``, ascending; ``row_column`` holds the same on the device."""
    if rows[-1] - rows[0] == len(rows) - 1:
        return logits[rows[0] : rows[-1] + 1]  # no gaps: no copy
    return logits.index_select(0, row_column.flatten().long())


def _choose_by(method: _Method, logits: Tensor, parameters: _Parameters) -> _Choice:
    if method.num_candidates == 1:
        return _choose_greedily(logits)
    if method.num_candidates is None:
        return _choose_from_all(logits, parameters)
    return _choose_from_candidates(logits, parameters, method.num_candidates)


def _adjust(logits: Tensor, states: Sequence[SamplingState], parameters: _Parameters) -> Tensor:
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
    adjusted[rows, token_ids] = _finite_or_never((touched + biases).float())
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
    return torch.stack([_as_float64(column) for column in columns]).to(device, non_blocking=True)


def _as_float64(column: "array[int] | array[float]") -> Tensor:
    dtype = torch.float64 if column.typecode == "d" else torch.int64
    if not column:  # frombuffer refuses empty buffers
        return torch.empty(0, dtype=torch.float64)
    return torch.frombuffer(column, dtype=dtype).double()


def _finite_or_never(logits: Tensor) -> Tensor:
    return torch.nan_to_num(logits, nan=-math.inf, neginf=-math.inf)


def _choose_greedily(logits: Tensor) -> _Choice:
    """The most probable token; of equals the lowest id."""
    slices = in_slices(logits)
    maxima = slices.amax(dim=2)  # [num_seqs, num_slices]
    best_slice = maxima.argmax(dim=1, keepdim=True)  # the first of equals
    within = slice_at(slices, best_slice).argmax(dim=1, keepdim=True)
    token_ids = best_slice * slices.shape[2] + within
    return _Choice(token_ids.flatten(), maxima.amax(dim=1).isfinite())


def _choose_from_all(logits: Tensor, parameters: _Parameters) -> _Choice:
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
    return _Choice(token_ids.flatten(), maximum.isfinite().flatten())


def _choose_from_candidates(
    logits: Tensor, parameters: _Parameters, num_candidates: int
) -> _Choice:
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
    return _Choice(candidate_ids.gather(1, ranks).flatten(), is_final.flatten())


def _inverse_cdf(masses: Tensor, target: Tensor, total: Tensor) -> Tensor:
    """The first index whose cumulative mass exceeds ``target``: never one without mass of its own.

    ``target`` is below ``total`` but for rounding, which is undone. All but ``masses``:
    ``[num_seqs, 1]``.
    """
    below_total = torch.nextafter(total, torch.zeros_like(total))
    return (masses <= torch.minimum(target, below_total)).sum(dim=1, keepdim=True)
