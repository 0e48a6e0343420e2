"""Work for an engine, and the clock beside it."""

import random
from collections.abc import Sequence as Seq
from itertools import count
from time import perf_counter
from typing import Final

from gemma_serve.engine.engine import Engine, EngineRequest
from gemma_serve.engine.sequence import PromptInputs
from gemma_serve.generation import SamplingParams

_KEYS: Final = count()
_WARM_UP_STEPS: Final = 4
_FIRST_ORDINARY_TOKEN: Final = 300  # behind the bytes and the special tokens of every vocabulary


def prompts(number: int, length: int, vocab_size: int, *, seed: int = 0) -> list[tuple[int, ...]]:
    """Random tokens, no two alike."""
    rng = random.Random(seed)
    last = min(vocab_size, 200_000) - 16
    return [
        (2, *(rng.randrange(_FIRST_ORDINARY_TOKEN, last) for _ in range(length - 1)))
        for _ in range(number)
    ]


def add(engine: Engine, token_ids: tuple[int, ...], max_tokens: int) -> int:
    """A greedy request for exactly ``max_tokens``. Returns its key."""
    key = next(_KEYS)
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    engine.add(EngineRequest(key=key, prompt=PromptInputs(token_ids), sampling=sampling))
    return key


def tokens_of_step(engine: Engine) -> dict[int, list[int]]:
    """What one step brought, by request. Raises what ended a request, if anything did."""
    tokens: dict[int, list[int]] = {}
    for output in engine.step():
        if output.error is not None:
            raise output.error
        tokens[output.key] = [i for delta in output.deltas for i in delta.token_ids]
    return tokens


def step(engine: Engine) -> int:
    """How many tokens one step brought."""
    return sum(map(len, tokens_of_step(engine).values()))


def run_until_idle(engine: Engine) -> int:
    """Tokens that were produced."""
    num_tokens = 0
    while engine.has_work:
        num_tokens += step(engine)
    return num_tokens


def burst_rate(engine: Engine, requests: Seq[tuple[int, ...]], max_tokens: int) -> float:
    """Tokens per second of requests that all come at once, prompts included."""
    begin = perf_counter()
    for token_ids in requests:
        add(engine, token_ids, max_tokens)
    num_tokens = run_until_idle(engine)
    return num_tokens / (perf_counter() - begin)


def decode_step_s(engine: Engine, streams: Seq[tuple[int, ...]], num_steps: int) -> float:
    """Mean seconds of a step in which all ``streams`` decode, and nothing else happens.

    They must fit the cache together.
    """
    keys = start_streams(engine, streams, num_steps)
    begin = perf_counter()
    num_tokens = sum(step(engine) for _ in range(num_steps))
    elapsed_s = perf_counter() - begin
    if num_tokens != num_steps * len(streams):
        raise RuntimeError(f"{num_tokens} tokens in {num_steps} steps of {len(streams)} streams")
    stop(engine, keys)
    return elapsed_s / num_steps


def start_streams(engine: Engine, streams: Seq[tuple[int, ...]], num_steps: int) -> list[int]:
    """Keys of ``streams``, all of which decode now, and will for ``num_steps`` more."""
    # The first ones go on until the last prompt is computed.
    max_tokens = num_steps + sum(map(len, streams)) + _WARM_UP_STEPS
    keys = [add(engine, token_ids, max_tokens) for token_ids in streams]
    while step(engine) < len(streams):
        pass
    for _ in range(_WARM_UP_STEPS):
        step(engine)
    return keys


def stop(engine: Engine, keys: Seq[int]) -> None:
    for key in keys:
        engine.abort(key)
    run_until_idle(engine)
