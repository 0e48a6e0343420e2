"""What a decode step costs on the host beside the model: scheduling, bookkeeping and text.

    python -m benchmarks.bench_host_step

The runner prepares each decode step as for a GPU that replays it, and computes nothing. Then, how
long a device would wait for the host between its steps, with a device that only takes its time: if
each step begins after the tokens of the last one were taken in, and if it begins before. Neither
has the sampler in it, which the host launches while the device works.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, sleep, thread_time

import torch

from benchmarks.environment import write_json
from gemma_serve.engine.block_manager import BlockManager
from gemma_serve.engine.engine import Engine, EngineRequest
from gemma_serve.engine.model_runner import SampledToken
from gemma_serve.engine.scheduler import ScheduledBatch, Scheduler
from gemma_serve.engine.sequence import PromptInputs
from gemma_serve.engine.vocabulary import Vocabulary
from gemma_serve.gemma.attention.base import StepAttention
from gemma_serve.gemma.attention.block_tables import BlockTables
from gemma_serve.gemma.attention.device import DeviceBackend, StepTokens, TileSizes
from gemma_serve.gemma.decode_steps import DecodeSteps
from gemma_serve.gemma.decoder import Decoder
from gemma_serve.gemma.dummy import dummy_config, empty_model
from gemma_serve.gemma.kv_cache import CacheLayout, KVCache
from gemma_serve.gemma.model_runner import chunks_of
from gemma_serve.gemma.token_feed import TokenFeed
from gemma_serve.generation import SamplingParams

WINDOWS = (None, None, *(1024,) * 11)
"""The groups of Gemma 3 27B, of which the other sizes have about half as many."""
MAX_MODEL_LEN = 8192
BLOCK_SIZE = 16
DEVICE_STEPS_MS = (3.0, 19.0)
"""About what 4B and 27B take on an H100, which reads 3 TB/s."""
_SLEEP_LATENCY_S = 0.0005
"""Sleeping shorter than that would be waiting longer."""


class Device:
    """Works on what is launched, one step after the other, each for ``step_s`` seconds."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._free_at = perf_counter()
        self.waited_s = 0.0
        """For the host."""

    def launch(self) -> float:
        """Returns when it will be done."""
        now = perf_counter()
        self.waited_s += max(0.0, now - self._free_at)
        self._free_at = max(now, self._free_at) + self._step_s
        return self._free_at


class Replay:
    """A step under way, which ends at ``done_at`` and says the same letter to everybody."""

    def __init__(self, num_tokens: int, done_at: float) -> None:
        self._num_tokens = num_tokens
        self._done_at = done_at

    def sample(self) -> None:
        """Nothing to be chosen."""

    def tokens(self) -> list[SampledToken]:
        while (left := self._done_at - perf_counter()) > 0:
            sleep(max(0.0, left - _SLEEP_LATENCY_S))
        return [SampledToken(7)] * self._num_tokens


class ReplayingRunner:
    """Tells a device of each decode step."""

    def __init__(self, num_seqs: int, device: Device) -> None:
        self._device = device
        model = empty_model(dummy_config("27b"), dtype=torch.bfloat16, device=torch.device("meta"))
        text_model = model.get_decoder()
        layout = CacheLayout.of(
            text_model.config, [torch.device("cpu")] * len(text_model.layers), torch.bfloat16
        )
        assert layout.windows == WINDOWS
        cache = KVCache(layout, num_blocks=1, block_size=BLOCK_SIZE)
        tables = BlockTables(cache, num_seats=num_seqs, max_model_len=MAX_MODEL_LEN)
        self._feed = TokenFeed(max_rows=num_seqs, device=torch.device("cpu"))
        self._tokens = torch.full((num_seqs,), 7)
        self._steps = DecodeSteps(
            Decoder(model),
            text_model.embed_tokens,
            NoKernels(cache, tables, TileSizes(short=1, long=64)),
            max_num_tokens=num_seqs,
            record=lambda _: lambda: torch.empty(num_seqs, 0),
        )
        self._steps.record()

    def begin(self, batch: ScheduledBatch) -> Replay:
        chunks = chunks_of(batch)
        if self._steps.takes(chunks):
            self._steps.run(self._feed.names(batch), chunks)
        num_tokens = len(batch.sampling)
        self._feed.remember(batch, self._tokens[:num_tokens])
        return Replay(num_tokens, self._device.launch())


class NoKernels(DeviceBackend):
    """Is asked for none, as nothing is computed."""

    def over(self, tokens: StepTokens) -> StepAttention:
        raise NotImplementedError(f"{len(tokens.positions)} tokens")


def main(argv: Seq[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-seqs", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--prompt-tokens", type=int, default=1500)
    parser.add_argument("--num-steps", type=int, default=512)
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    args = parser.parse_args(argv)
    results = {}
    for num_seqs in args.num_seqs:
        load = Load(num_seqs, args.prompt_tokens, args.num_steps)
        times_ms = sorted(host_steps_ms(load))
        mean, longest = statistics.fmean(times_ms), times_ms[-1]
        p99 = times_ms[int(len(times_ms) * 0.99)]
        results[num_seqs] = {"mean_ms": mean, "p99_ms": p99, "max_ms": longest}
        print(f"{num_seqs:3} sequences: {mean:.3f} ms a step, p99 {p99:.3f}, max {longest:.3f}")
        for step_ms in DEVICE_STEPS_MS:
            after, before = (
                device_wait_ms(load, step_ms, runs_ahead=ahead) for ahead in (False, True)
            )
            results[num_seqs][f"device_of_{step_ms:g}_ms_waits_ms"] = after
            results[num_seqs][f"device_of_{step_ms:g}_ms_waits_ms_running_ahead"] = before
            print(
                f"    a device of {step_ms:g} ms a step waits {after:.3f} ms for each, "
                f"{before:.3f} ms when the engine runs ahead"
            )
    if args.output is not None:
        write_json(args.output, {"host_step": results, "num_groups": len(WINDOWS)})


@dataclass(frozen=True, slots=True)
class Load:
    """Sequences that decode together for so many steps."""

    num_seqs: int
    num_prompt_tokens: int
    num_steps: int


def host_steps_ms(load: Load) -> list[float]:
    """Milliseconds of each step; of CPU time, so that what else the machine does counts less."""
    engine = decoding_engine(load, Device(0.0), runs_ahead=False)
    times_ms = []
    for _ in range(load.num_steps):
        started_at = thread_time()
        engine.step()
        times_ms.append((thread_time() - started_at) * 1000)
    return times_ms


def device_wait_ms(load: Load, step_ms: float, *, runs_ahead: bool) -> float:
    """Milliseconds per step for which the device has nothing to do."""
    device = Device(step_ms / 1000)
    engine = decoding_engine(load, device, runs_ahead=runs_ahead)
    device.waited_s = 0.0
    for _ in range(load.num_steps):
        engine.step()
    return device.waited_s / load.num_steps * 1000


def decoding_engine(load: Load, device: Device, *, runs_ahead: bool) -> Engine:
    """One whose prompts are computed."""
    engine = make_engine(load.num_seqs, device, runs_ahead=runs_ahead)
    sampling = SamplingParams(ignore_eos=True)
    for key in range(load.num_seqs):
        # Different beginnings, so that nothing is shared and blocks fill up at different steps.
        token_ids = (key, *range(load.num_prompt_tokens + key))
        engine.add(EngineRequest(key=key, prompt=PromptInputs(token_ids), sampling=sampling))
    while engine.stats.num_waiting or not engine.step():
        engine.step()
    return engine


def make_engine(num_seqs: int, device: Device, *, runs_ahead: bool) -> Engine:
    blocks = BlockManager(num_blocks=64 * 2000, block_size=BLOCK_SIZE, windows=WINDOWS)
    return Engine(
        runner=ReplayingRunner(num_seqs, device),
        scheduler=Scheduler(
            block_manager=blocks, max_num_seqs=num_seqs, prefill_chunk_size=MAX_MODEL_LEN
        ),
        block_manager=blocks,
        vocabulary=Vocabulary(token_bytes=[b"x"] * 10_000, eos_token_ids=frozenset()),
        max_model_len=MAX_MODEL_LEN,
        runs_ahead=runs_ahead,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
