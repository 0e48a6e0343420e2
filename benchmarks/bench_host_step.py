"""What a decode step costs on the host beside the model: scheduling, bookkeeping and text.

    python -m benchmarks.bench_host_step

The runner returns at once, so whatever is measured is time in which a device would wait.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence as Seq
from pathlib import Path
from time import thread_time

from benchmarks.environment import write_json
from gemma_serve.engine.block_manager import BlockManager
from gemma_serve.engine.engine import Engine, EngineRequest, Vocabulary
from gemma_serve.engine.model_runner import SampledToken
from gemma_serve.engine.scheduler import ScheduledBatch, Scheduler
from gemma_serve.engine.sequence import PromptInputs
from gemma_serve.generation import SamplingParams

WINDOWS = (None, None, *(1024,) * 11)
"""The groups of Gemma 3 27B, of which the other sizes have about half as many."""
MAX_MODEL_LEN = 8192


class StubRunner:
    """Says the same letter to everybody."""

    def run(self, batch: ScheduledBatch) -> list[SampledToken]:
        return [SampledToken(7)] * len(batch.sampling)


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
    blocks = BlockManager(num_blocks=64 * 2000, block_size=16, windows=WINDOWS)
    return Engine(
        runner=StubRunner(),
        scheduler=Scheduler(
            block_manager=blocks, max_num_seqs=num_seqs, prefill_chunk_size=MAX_MODEL_LEN
        ),
        block_manager=blocks,
        vocabulary=Vocabulary(token_bytes=[b"x"] * 10_000, eos_token_ids=frozenset()),
        max_model_len=MAX_MODEL_LEN,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
