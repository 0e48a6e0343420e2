"""Tokens per second with and without speculation: texts that repeat their prompt, and others.

    python -m benchmarks.bench_speculation --model demo --concurrency 1 4
    python -m benchmarks.bench_speculation --model google/gemma-3-4b-it \\
        --draft-model google/gemma-3-270m-it

One engine decodes the same prompts with guesses and without, one after another in every round, so
that a machine whose speed drifts still gives fair ratios. Prompts are computed before the clock
starts. The texts of both are compared.
"""

import argparse
import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter

import torch

from benchmarks.environment import write_json
from gemma_serve.engine.config import EngineConfig
from gemma_serve.engine.engine import Engine, EngineRequest
from gemma_serve.engine.sequence import PromptInputs
from gemma_serve.gemma.config import ModelConfig
from gemma_serve.gemma.draft_model import load_draft
from gemma_serve.gemma.engine_builder import build_engine
from gemma_serve.gemma.loading import LoadedGemma, load_gemma
from gemma_serve.generation import SamplingParams

_NAMES = ("Alma", "Boris", "Chen", "Dora", "Emil", "Farah", "Goran", "Hana", "Ines", "Jonas")
_PLACES = ("Kyoto", "Lagos", "Lima", "Oslo", "Paris", "Perth", "Quito", "Riga", "Sofia", "Turin")
_TRADES = ("baker", "diver", "judge", "miner", "nurse", "pilot", "smith", "tutor", "vet", "welder")


@dataclass(frozen=True, slots=True)
class Result:
    """Medians over the rounds."""

    text: str
    concurrency: int
    plain_tokens_per_s: float
    speculating_tokens_per_s: float
    ratio: float
    """Median of the rounds' ratios."""
    num_drafted_tokens: int
    num_accepted_tokens: int
    num_same_texts: int
    """Of ``num_texts``. Rounding depends on how many tokens are computed together, so that in
    bfloat16 two tokens of nearly the same probability may change places."""
    num_texts: int


@dataclass(frozen=True, slots=True)
class Round:
    """What one way of decoding some prompts took."""

    tokens_per_s: float
    completions: tuple[tuple[int, ...], ...]


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    torch.set_num_threads(args.threads)
    model = ModelConfig(model=args.model, dtype=args.dtype)
    draft = None if args.draft_model is None else load_draft(args.draft_model, model)
    gemma = load_gemma(model)
    engine = build_engine(
        gemma,
        EngineConfig(
            max_num_seqs=args.max_num_seqs,
            enable_prefix_cache=False,  # or the second to decode a prompt would find it there
            speculation=args.speculation or ("off" if draft else "prompt_lookup"),
            draft_model=args.draft_model,
            num_speculative_tokens=args.num_speculative_tokens,
        ),
        draft=draft,
    )
    rng = random.Random(args.seed)
    results = []
    print(f"{'text':10} {'streams':>7} {'plain/s':>8} {'drafts/s':>8} {'ratio':>6}  hits   same")
    for concurrency in args.concurrency:
        for text in args.texts:
            results.append(_measure(gemma, engine, text, concurrency, args, rng))
            _print(results[-1])
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k != "json"}
        write_json(args.json, {"settings": settings, "results": [asdict(r) for r in results]})


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--draft-model", help="a smaller model that guesses")
    parser.add_argument(
        "--speculation",
        choices=["off", "prompt_lookup"],
        help="by default prompt_lookup, but with a draft model off, so that it alone guesses",
    )
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1])
    parser.add_argument("--texts", nargs="+", default=["repeating", "fresh"])
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument(
        "--num-speculative-tokens", type=int, default=EngineConfig().num_speculative_tokens
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the results there")
    return parser.parse_args(argv)


def _measure(
    gemma: LoadedGemma,
    engine: Engine,
    text: str,
    concurrency: int,
    args: argparse.Namespace,
    rng: random.Random,
) -> Result:
    pairs: list[tuple[Round, Round]] = []
    before = engine.stats
    for index in range(args.rounds + 1):  # the first warms up
        prompts = [_prompt(gemma, text, rng) for _ in range(concurrency)]
        # Greedy text would soon repeat itself, which is what "fresh" must not do.
        temperature = 0.0 if text == "repeating" else 1.0
        sampling = SamplingParams(
            temperature=temperature, seed=index, max_tokens=args.max_tokens, ignore_eos=True
        )
        if index == 1:
            before = engine.stats
        pairs.append(
            (
                _decode(engine, prompts, sampling, speculation=False),
                _decode(engine, prompts, sampling, speculation=True),
            )
        )
    plain, speculating = zip(*pairs[1:], strict=True)
    same = [
        a == b
        for one, other in pairs[1:]
        for a, b in zip(one.completions, other.completions, strict=True)
    ]
    return Result(
        text=text,
        concurrency=concurrency,
        plain_tokens_per_s=statistics.median(r.tokens_per_s for r in plain),
        speculating_tokens_per_s=statistics.median(r.tokens_per_s for r in speculating),
        ratio=statistics.median(s.tokens_per_s / p.tokens_per_s for p, s in pairs[1:]),
        num_drafted_tokens=engine.stats.num_drafted_tokens - before.num_drafted_tokens,
        num_accepted_tokens=engine.stats.num_accepted_tokens - before.num_accepted_tokens,
        num_same_texts=sum(same),
        num_texts=len(same),
    )


def _prompt(gemma: LoadedGemma, text: str, rng: random.Random) -> tuple[int, ...]:
    """Records that are being copied, or words without any order."""
    if text == "fresh":
        return (2, *(rng.randrange(1000, 200_000) for _ in range(200)))
    records = "".join(
        f"{rng.choice(_NAMES)}, {rng.randint(20, 80)}, {rng.choice(_TRADES)} in "
        f"{rng.choice(_PLACES)}\n"
        for _ in range(20)
    )
    return tuple(gemma.tokenizer(f"{records}\n{records}\n").input_ids)


def _decode(
    engine: Engine,
    prompts: Sequence[tuple[int, ...]],
    sampling: SamplingParams,
    *,
    speculation: bool,
) -> Round:
    """All together. The clock starts when each has its first token."""
    for key, token_ids in enumerate(prompts):
        request = replace(sampling, speculation=speculation)
        engine.add(EngineRequest(key=key, prompt=PromptInputs(token_ids), sampling=request))
    completions: list[tuple[int, ...]] = [()] * len(prompts)
    started_at, num_before = None, 0
    while engine.has_work:
        if started_at is None and all(completions):
            started_at, num_before = perf_counter(), sum(map(len, completions))
        for output in engine.step():
            for delta in output.deltas:
                completions[output.key] += delta.token_ids
    assert started_at is not None
    num_tokens = sum(map(len, completions)) - num_before
    return Round(num_tokens / (perf_counter() - started_at), tuple(completions))


def _print(result: Result) -> None:
    print(
        f"{result.text:10} {result.concurrency:7} {result.plain_tokens_per_s:8.1f} "
        f"{result.speculating_tokens_per_s:8.1f} {result.ratio:6.2f}  "
        f"{result.num_accepted_tokens}/{result.num_drafted_tokens}  "
        f"{result.num_same_texts}/{result.num_texts}"
    )


if __name__ == "__main__":
    main()
