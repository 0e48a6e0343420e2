"""Choose the next token of many sequences at once, each by its own parameters."""

import logging
import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from gemma_serve.engine.constraint import MaskThreads, PendingMasks
from gemma_serve.engine.model_runner import SampledToken
from gemma_serve.engine.sampling.adjustments import adjust, finite_or_never
from gemma_serve.engine.sampling.choices import Method, Parameters, choose_by
from gemma_serve.engine.sampling.logprobs import RowLogprobs, TokenLogprobs
from gemma_serve.engine.sampling.masks import MaskApplier
from gemma_serve.engine.sampling.restrictions import restrict
from gemma_serve.engine.sampling.rows import rows_per_pass
from gemma_serve.engine.sampling_state import SamplingState
from gemma_serve.engine.transfers import Download, upload

logger = logging.getLogger(__name__)


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
        self.last_resort = min(set(range(vocab_size)) - forbidden)
        self._mask_threads = MaskThreads()
        self._mask_applier = MaskApplier(vocab_size, device)

    def start_masks(self, states: Sequence[SamplingState]) -> PendingMasks:
        """Begin to compute which tokens constraints allow, while the model computes the logits."""
        return self._mask_threads.start([state.constraint for state in states])

    def sample(
        self, logits: Tensor, states: Sequence[SamplingState], masks: PendingMasks | None = None
    ) -> list[SampledToken]:
        """As ``start``, and wait for the tokens."""
        return self.start(logits, states, masks).result()

    @torch.inference_mode()
    def start(
        self, logits: Tensor, states: Sequence[SamplingState], masks: PendingMasks | None = None
    ) -> "PendingTokens":
        """Have the next token of each sequence chosen, without waiting for the device.

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
        methods = [Method.of(state, self._vocab_size) for state in states]
        return PendingTokens(
            self,
            logits,
            states,
            self._choose(logits, states, methods),
            logprobs,
            stuck_rows={row for row, mask in allowed.items() if mask is None},
        )

    @torch.inference_mode()
    def choose_thoroughly(
        self, logits: Tensor, states: Sequence[SamplingState], rows: Sequence[int]
    ) -> dict[int, int]:
        """Token ids of the few rows that need a full sort, or have logits that are not finite; none
        for those that have no finite logit. ``logits``: as ``start`` left them."""
        repaired = finite_or_never(logits[rows].float())
        remaining = [states[row] for row in rows]
        methods = [
            Method.of(state, self._vocab_size).thorough(self._vocab_size) for state in remaining
        ]
        chosen = _final(self._choose(repaired, remaining, methods).tolist())
        if len(chosen) < len(rows):
            num_hopeless = len(rows) - len(chosen)
            logger.warning("%d of %d sequences have no finite logit", num_hopeless, len(states))
        return {rows[i]: token_id for i, token_id in chosen.items()}

    def _choose(
        self, logits: Tensor, states: Sequence[SamplingState], methods: Sequence[Method]
    ) -> Tensor:
        """Token ids, and 1 where no more thorough search is needed: ``[2, num_seqs]`` int64."""
        passes = self._passes(methods)
        rows = [row for _, group in passes for row in group]
        table = Parameters.upload(states, rows, self._device)
        choices = []
        for (method, group), group_table in zip(
            passes, torch.split(table, [len(group) for _, group in passes]), strict=True
        ):
            parameters = Parameters.of(group_table)
            group_logits = _select(logits, group, parameters.row)
            if method.is_adjusted:
                group_logits = adjust(group_logits, [states[row] for row in group], parameters)
            choices.append(choose_by(method, group_logits, parameters))
        token_ids = torch.cat([choice.token_ids for choice in choices])
        is_final = torch.cat([choice.is_final for choice in choices])
        results = torch.stack((token_ids, is_final.long()))
        if rows == sorted(rows):
            return results
        return torch.empty_like(results).index_copy_(
            1, Parameters.of(table).row[:, 0].long(), results
        )

    def _passes(self, methods: Sequence[Method]) -> list[tuple[Method, list[int]]]:
        """Which rows are sampled together, and how."""
        groups: defaultdict[Method, list[int]] = defaultdict(list)
        for row, method in enumerate(methods):
            groups[method].append(row)
        passes = []
        for method, rows in groups.items():
            sorts = method.num_candidates == self._vocab_size
            max_rows = rows_per_pass(len(rows), self._device, sorts=sorts)
            passes += [
                (method, rows[start : start + max_rows]) for start in range(0, len(rows), max_rows)
            ]
        return passes


def _select(logits: Tensor, rows: Sequence[int], row_column: Tensor) -> Tensor:
    """``rows`` of ``logits``, ascending; ``row_column`` holds the same on the device."""
    if rows[-1] - rows[0] == len(rows) - 1:
        return logits[rows[0] : rows[-1] + 1]  # no gaps: no copy
    return logits.index_select(0, row_column.flatten().long())


class PendingTokens:
    """The tokens of a step, which the device chooses, or those of its rows that are not final."""

    def __init__(
        self,
        sampler: Sampler,
        logits: Tensor,
        states: Sequence[SamplingState],
        chosen: Tensor,
        logprobs: RowLogprobs | None,
        *,
        stuck_rows: Collection[int],
    ) -> None:
        """All but the last as ``Sampler`` has them. ``stuck_rows``: can have no token."""
        self.token_ids = chosen[0]
        """On the device, ``[num_rows]`` int64. The few that ``result`` calls revised were others,
        which nobody asked for."""
        self._sampler = sampler
        self._logits = logits
        self._states = states
        self._stuck_rows = stuck_rows
        self._logprobs = logprobs
        self._reports = None if logprobs is None else logprobs.report(logits, self.token_ids)
        self._chosen = Download(chosen)

    def result(self) -> list[SampledToken]:
        """Wait for them."""
        num_rows = len(self._states)
        final = _final(self._chosen.wait())
        missing = [row for row in range(num_rows) if row not in final]
        if missing:
            final |= self._sampler.choose_thoroughly(self._logits, self._states, missing)
        token_ids = [final.get(row, self._sampler.last_resort) for row in range(num_rows)]
        reports = self._report(token_ids, revised=bool(missing))
        stuck = {row for row in missing if row not in final and self._is_constrained(row)}
        stuck.update(self._stuck_rows)
        return [
            SampledToken(None if row in stuck else token_id, reports.get(row, ()), row in missing)
            for row, token_id in enumerate(token_ids)
        ]

    def _is_constrained(self, row: int) -> bool:
        return self._states[row].constraint is not None

    def _report(self, token_ids: Sequence[int], *, revised: bool) -> Mapping[int, TokenLogprobs]:
        if self._logprobs is None or self._reports is None:
            return {}
        if revised:
            sampled = upload(torch.tensor(token_ids), self._logits.device)
            return self._logprobs.report(self._logits, sampled).result()
        return self._reports.result()


def _final(chosen: Sequence[Sequence[int]]) -> dict[int, int]:
    """Token ids by row. ``chosen``: as ``Sampler._choose`` gives them."""
    token_ids, is_final = chosen
    return {row: i for row, (i, final) in enumerate(zip(token_ids, is_final, strict=True)) if final}
