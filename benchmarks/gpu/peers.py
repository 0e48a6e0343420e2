"""transformers' own ways to answer many requests, on the same model and prompts.

They run in a process of their own, so that one that hangs or breaks the device ends with it:

    python -m benchmarks.gpu.peers tiny cpu
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from time import perf_counter
from typing import Any, Final

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from benchmarks.gpu import models, work
from benchmarks.gpu.findings import Finding, Target
from benchmarks.gpu.scale import FULL, TINY, Scale
from gemma_serve.gemma.config import Device
from gemma_serve.gemma.loading import LoadedGemma

_ONE_BY_ONE: Final = "generate, batches of one"
_BATCHED: Final = "continuous batching"
_TARGETS: Final = {_ONE_BY_ONE: 5.0, _BATCHED: 1.5}
_NUM_ONE_BY_ONE: Final = 4


def compare(size: str, device: Device, ours: float | None, timeout_s: float) -> Iterator[Finding]:
    """A burst of requests by ``generate`` in batches of one, and by continuous batching.

    ``ours``: tokens per second of the same burst, to compare with; ``None`` if there is none.
    Raises ``RuntimeError`` unless both were measured in ``timeout_s``.
    """
    command = [sys.executable, "-m", "benchmarks.gpu.peers", size, device]
    rates, problem = _rates(command, timeout_s)
    for peer, rate in rates.items():
        yield Finding(what=f"{size} transformers {peer}", value=rate, unit="tokens/s")
        if ours is not None:
            yield Finding(
                what=f"{size} gemma-serve over {peer}",
                value=ours / rate,
                unit="times",
                target=None if size == models.TINY else Target(limit=_TARGETS[peer]),
            )
    if problem is not None:
        raise RuntimeError(problem)


def _rates(command: Seq[str], timeout_s: float) -> tuple[dict[str, float], str | None]:
    """Of each peer, as far as they came; and what stopped them."""
    problem = None
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, timeout=timeout_s)
        output = done.stdout
        if done.returncode:
            problem = f"the peers' process ended with status {done.returncode}"
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout or b""
        problem = f"the peers took longer than {timeout_s:.0f} s"
    rates: dict[str, float] = {}
    for line in output.decode().splitlines():
        if line.startswith("{"):
            rates |= json.loads(line)
    return rates, problem


def main(argv: Seq[str]) -> None:
    """``argv``: a size and a device. Prints a JSON object for each peer."""
    size, device = argv
    scale = TINY if size == models.TINY else FULL
    gemma = models.load(size, "cuda" if device == "cuda" else "cpu")
    requests = work.prompts(
        scale.burst_requests, scale.prompt_tokens, gemma.model.lm_head.out_features
    )
    _print_rate(_ONE_BY_ONE, _one_by_one(gemma, requests[:_NUM_ONE_BY_ONE], scale.burst_tokens))
    _print_rate(_BATCHED, _continuous_batching(gemma, requests, scale))


def _print_rate(peer: str, rate: float) -> None:
    print(json.dumps({peer: rate}), flush=True)


def _one_by_one(gemma: LoadedGemma, requests: Seq[tuple[int, ...]], max_tokens: int) -> float:
    """A few do: each takes as long as the last. The first warms up."""
    gemma.model.generation_config = _greedy(max_tokens)
    num_tokens, begin = 0, perf_counter()
    for index, token_ids in enumerate(requests):
        if index == 1:
            num_tokens, begin = 0, perf_counter()
        input_ids = torch.tensor([token_ids], device=gemma.model.device)
        output = gemma.model.generate(input_ids, attention_mask=torch.ones_like(input_ids))
        num_tokens += output.shape[1] - len(token_ids)
    return num_tokens / (perf_counter() - begin)


def _continuous_batching(gemma: LoadedGemma, requests: Seq[tuple[int, ...]], scale: Scale) -> float:
    """The manager is kept after a first, small burst, and what is timed starts with it warm."""
    model: Any = gemma.model  # of its mixins, transformers exports no types
    inputs = [list(token_ids) for token_ids in requests]
    config = _greedy(scale.burst_tokens)
    # On a GPU it sizes its cache itself; on a CPU it would take nearly all of the memory.
    cache = None if gemma.model.device.type == "cuda" else _small_cache()
    model.generate_batch(inputs[:2], config, cache)
    with model.continuous_batching_context_manager(
        generation_config=config, continuous_batching_config=cache
    ) as manager:
        begin = perf_counter()
        manager.add_requests(inputs=inputs, max_new_tokens=scale.burst_tokens)
        num_tokens, num_finished = 0, 0
        while num_finished < len(inputs):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                num_finished += 1
                num_tokens += len(result.generated_tokens)
            elif result is None and not manager.is_running():
                raise RuntimeError("continuous batching stopped by itself")
        elapsed_s = perf_counter() - begin
    if num_tokens != len(inputs) * scale.burst_tokens:
        raise RuntimeError(f"expected {len(inputs) * scale.burst_tokens} tokens, got {num_tokens}")
    return num_tokens / elapsed_s


def _small_cache() -> ContinuousBatchingConfig:
    return ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)


def _greedy(max_tokens: int) -> GenerationConfig:
    return GenerationConfig(do_sample=False, max_new_tokens=max_tokens, pad_token_id=0)


if __name__ == "__main__":
    main(sys.argv[1:])
