"""Whether steps that are recorded, and begin before the last one's tokens are known, say the same
as steps that are launched operation by operation, one after the other.

Sums are rounded by how many rows are computed together, and which are differs between the two. So
where two tokens are about as probable, either may be chosen, and the texts go apart from there: a
token that is read from the wrong place parts them at once.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from benchmarks.gpu import models, work
from benchmarks.gpu.findings import Finding, Target
from benchmarks.gpu.scale import Scale
from gemma_serve.gemma.config import Device
from gemma_serve.gemma.engine_builder import build_engine
from gemma_serve.gemma.placement import Placement

_NUM_REQUESTS: Final = 6
_NUM_TOKENS: Final = 24
_MIN_SHARE: Final = 0.8


def compare(size: str, device: Device, placement: Placement, scale: Scale) -> Iterator[Finding]:
    """The share of equal tokens."""
    in_turn, ahead = (
        _answers(size, device, placement, scale, enforce_eager=eager) for eager in (True, False)
    )
    pairs = [
        pair for answers in zip(in_turn, ahead, strict=True) for pair in zip(*answers, strict=True)
    ]
    yield Finding(
        what=f"{size} tokens as when launched one by one",
        value=sum(ours == theirs for ours, theirs in pairs) / len(pairs),
        unit="",
        target=Target(limit=_MIN_SHARE),
    )


def _answers(
    size: str, device: Device, placement: Placement, scale: Scale, *, enforce_eager: bool
) -> list[list[int]]:
    """Greedy tokens of requests that come one step after the other."""
    gemma = models.load(size, device)
    engine = build_engine(gemma, replace(models.engine_config(scale), enforce_eager=enforce_eager))
    prompts = work.prompts(_NUM_REQUESTS, scale.prompt_tokens, gemma.model.lm_head.out_features)
    answers: dict[int, list[int]] = {}
    waiting = deque(prompts)
    while waiting or engine.has_work:
        if waiting:
            answers[work.add(engine, waiting.popleft(), _NUM_TOKENS)] = []
        for key, token_ids in work.tokens_of_step(engine).items():
            answers[key] += token_ids
    del engine, gemma
    models.collect(placement.devices[0])
    return list(answers.values())
