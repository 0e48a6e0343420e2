"""What a decode step costs on the host beside the model: scheduling, bookkeeping and text.

    python -m benchmarks.bench_host_step

The runner prepares each decode step as for a GPU that replays it, and computes nothing: whatever is
measured is time in which a device would wait. The sampler is not in it, which the host launches
while the device works.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence as Seq
from pathlib import Path
from time import thread_time

import torch

from benchmarks.environment import write_json
from gemma_serve.engine.block_manager import BlockManager
from gemma_serve.engine.engine import Engine, EngineRequest, Vocabulary
from gemma_serve.engine.model_runner import SampledToken
from gemma_serve.engine.scheduler import ScheduledBatch, Scheduler
from gemma_serve.engine.sequence import PromptInputs
from gemma_serve.gemma.attention.base import StepAttention
from gemma_serve.gemma.attention.block_tables import BlockTables
from gemma_serve.gemma.attention.device import DeviceBackend, StepTokens, TileSizes
from gemma_serve.gemma.decode_steps import DecodeSteps
from gemma_serve.gemma.decoder import Decoder
from gemma_serve.gemma.dummy import dummy_config, empty_model
from gemma_serve.gemma.kv_cache import CacheLayout, KVCache
from gemma_serve.gemma.model_runner import chunks_of
from gemma_serve.generation import SamplingParams

WINDOWS = (None, None, *(1024,) * 11)
"""The groups of Gemma 3 27B, of which the other sizes have about half as many."""
MAX_MODEL_LEN = 8192
BLOCK_SIZE = 16


class ReplayingRunner:
    """Tells a device of each decode step, and says the same letter to everybody."""

    def __init__(self, num_seqs: int) -> None:
        model = empty_model(dummy_config("27b"), dtype=torch.bfloat16, device=torch.device("meta"))
        text_model = model.get_decoder()
        layout = CacheLayout.of(
            text_model.config, [torch.device("cpu")] * len(text_model.layers), torch.bfloat16
        )
        assert layout.windows == WINDOWS
        cache = KVCache(layout, num_blocks=1, block_size=BLOCK_SIZE)
        tables = BlockTables(cache, num_seats=num_seqs, max_model_len=MAX_MODEL_LEN)
        self._steps = DecodeSteps(
            Decoder(model),
            text_model.embed_tokens,
            NoKernels(cache, tables, TileSizes(short=1, long=64)),
            max_num_tokens=num_seqs,
            record=lambda _: lambda: torch.empty(num_seqs, 0),
        )
        self._steps.record()

    def run(self, batch: ScheduledBatch) -> list[SampledToken]:
        chunks = chunks_of(batch)
        if self._steps.takes(chunks):
            token_ids = [i for s in batch.scheduled for i in s.token_ids]
            self._steps.run(token_ids, chunks)
        return [SampledToken(7)] * len(batch.sampling)


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
        times_ms = sorted(decode_steps_ms(num_seqs, args.prompt_tokens, args.num_steps))
        mean, longest = statistics.fmean(times_ms), times_ms[-1]
        p99 = times_ms[int(len(times_ms) * 0.99)]
        results[num_seqs] = {"mean_ms": mean, "p99_ms": p99, "max_ms": longest}
        print(f"{num_seqs:3} sequences: {mean:.3f} ms a step, p99 {p99:.3f}, max {longest:.3f}")
    if args.output is not None:
        write_json(args.output, {"host_step": results, "num_groups": len(WINDOWS)})


def decode_steps_ms(num_seqs: int, num_prompt_tokens: int, num_steps: int) -> list[float]:
    """Milliseconds of each step in which ``num_seqs`` sequences decode; of CPU time, so that what
    else the machine does counts less."""
    engine = make_engine(num_seqs)
    sampling = SamplingParams(ignore_eos=True)
    for key in range(num_seqs):
        # Different beginnings, so that nothing is shared and blocks fill up at different steps.
        token_ids = (key, *range(num_prompt_tokens + key))
        engine.add(EngineRequest(key=key, prompt=PromptInputs(token_ids), sampling=sampling))
    while engine.stats.num_waiting or not engine.step():
        engine.step()
    times_ms = []
    for _ in range(num_steps):
        started_at = thread_time()
        engine.step()
        times_ms.append((thread_time() - started_at) * 1000)
    return times_ms


def make_engine(num_seqs: int) -> Engine:
    blocks = BlockManager(num_blocks=64 * 2000, block_size=BLOCK_SIZE, windows=WINDOWS)
    return Engine(
        runner=ReplayingRunner(num_seqs),
        scheduler=Scheduler(
            block_manager=blocks, max_num_seqs=num_seqs, prefill_chunk_size=MAX_MODEL_LEN
        ),
        block_manager=blocks,
        vocabulary=Vocabulary(token_bytes=[b"x"] * 10_000, eos_token_ids=frozenset()),
        max_model_len=MAX_MODEL_LEN,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
