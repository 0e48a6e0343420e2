"""Choose the next token of many sequences at once, each by its own parameters."""

import logging
import math
from array import array
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_serve.engine.sampler_restrictions import restrict
from gemma_serve.engine.sampling_state import LogitAdjustments, SamplingState
from gemma_serve.generation import SamplingParams

logger = logging.getLogger(__name__)

_NUM_SLICES = 64
"""Slices that a vocabulary is searched in: about its square root (262144 = 64 * 4096), which makes
"the best of each, then the best of those" cheap."""

_NUM_SPARE_CANDIDATES = 64
"""Candidates beyond ``top_k``, for tokens as probable as the last one: top_k keeps them all."""

_NUM_NUCLEUS_CANDIDATES = 1024
"""Candidates for top_p and min_p without top_k. Flatter distributions are sorted whole."""

_MAX_ROWS_ON_CPU = 8
"""Rows per pass on a CPU, whose caches hold a few rows of a large vocabulary and not 32."""

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
        return torch.tensor(values, dtype=torch.float64).to(device, non_blocking=True)

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

    @torch.inference_mode()
    def sample(self, logits: Tensor, states: Sequence[SamplingState]) -> list[int]:
        """The next token of each sequence.

        ``logits``: ``[num_seqs, vocab_size]`` bfloat16 or float32, modified. NaN counts as never.
        A row without one finite logit, which only a broken model gives, gets the lowest id that is
        not forbidden: nothing can save its text, and the other rows must not suffer.
        """
        logits.index_fill_(1, self._forbidden, -math.inf)
        restrict(logits, states)
        methods = [_Method.of(state, self._vocab_size) for state in states]
        chosen = self._choose(logits, states, methods)
        if len(chosen) < len(states):
            remaining = [row for row in range(len(states)) if row not in chosen]
            chosen |= self._choose_thoroughly(logits, states, remaining)
        return [chosen[row] for row in range(len(states))]

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
        return {row: chosen.get(i, self._last_resort) for i, row in enumerate(rows)}

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
        max_rows = _MAX_ROWS_ON_CPU if self._device.type == "cpu" else len(methods)
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


def _slices(logits: Tensor) -> Tensor:
    """View ``[num_seqs, vocab_size]`` as ``[num_seqs, num_slices, slice_size]``."""
    num_seqs, vocab_size = logits.shape
    return logits.view(num_seqs, _NUM_SLICES if vocab_size % _NUM_SLICES == 0 else 1, -1)


def _slice_at(slices: Tensor, index: Tensor) -> Tensor:
    """One slice of each row, ``[num_seqs, slice_size]``. ``index``: ``[num_seqs, 1]``."""
    return slices.gather(1, index.unsqueeze(2).expand(-1, 1, slices.shape[2])).squeeze(1)


def _choose_greedily(logits: Tensor) -> _Choice:
    """The most probable token; of equals the lowest id."""
    slices = _slices(logits)
    maxima = slices.amax(dim=2)  # [num_seqs, num_slices]
    best_slice = maxima.argmax(dim=1, keepdim=True)  # the first of equals
    within = _slice_at(slices, best_slice).argmax(dim=1, keepdim=True)
    token_ids = best_slice * slices.shape[2] + within
    return _Choice(token_ids.flatten(), maxima.amax(dim=1).isfinite())


def _choose_from_all(logits: Tensor, parameters: _Parameters) -> _Choice:
    """Inverse CDF over the whole vocabulary in the order of ids: nothing needs sorting."""
    maximum = _slices(logits).amax(dim=2).amax(dim=1, keepdim=True)
    weights = _slices(_weights(logits, maximum, parameters.temperature))
    masses = weights.sum(dim=2, dtype=torch.float64).cumsum(dim=1)  # up to and with each slice
    target = parameters.uniform * masses[:, -1:]
    chosen_slice = _inverse_cdf(masses, target, masses[:, -1:])
    mass_before = torch.where(
        chosen_slice > 0, masses.gather(1, (chosen_slice - 1).clamp(min=0)), 0.0
    )
    masses_within = _slice_at(weights, chosen_slice).double().cumsum(dim=1)
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
    values, candidate_ids = _most_probable(logits, num_candidates)  # [num_seqs, num_candidates]
    weights = ((values.double() - values[:, :1].double()) / parameters.temperature).exp()
    last_rank = (parameters.top_k.clamp(max=num_candidates) - 1).long()
    is_kept = values >= values.gather(1, last_rank)
    masses = (weights * is_kept).cumsum(dim=1)  # up to and with each candidate
    total = masses[:, -1:]
    if num_candidates == _NUM_NUCLEUS_CANDIDATES:
        whole = _slices(_weights(logits, values[:, :1], parameters.temperature))
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


def _most_probable(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Values and ids of the ``count`` best tokens per row, descending; of equals the lowest id."""
    num_seqs, vocab_size = logits.shape
    if count == vocab_size:
        ordered = logits.sort(dim=1, descending=True, stable=True)
        return ordered.values, ordered.indices
    slices = _slices(logits)
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


def _weights(logits: Tensor, maximum: Tensor, temperature: Tensor) -> Tensor:
    """Unnormalised probabilities of all tokens, float32; the most probable has 1."""
    return torch.sub(logits, maximum.float()).div_(temperature.float()).exp_()


def _inverse_cdf(masses: Tensor, target: Tensor, total: Tensor) -> Tensor:
    """The first index whose cumulative mass exceeds ``target``: never one without mass of its own.

    ``target`` is below ``total`` but for rounding, which is undone. All but ``masses``:
    ``[num_seqs, 1]``.
    """
    below_total = torch.nextafter(total, torch.zeros_like(total))
    return (masses <= torch.minimum(target, below_total)).sum(dim=1, keepdim=True)
