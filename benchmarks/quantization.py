"""What each kind of quantised weights takes of memory, and what it costs in quality.

    python -m benchmarks.quantization --model demo

Quality is the perplexity of a fixed English text, computed as the server computes prompts: through
the paged cache, in chunks. Kinds that this machine cannot run are named as not measured.
"""

import argparse
import math
import sys
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Final, get_args

import torch

from benchmarks.environment import write_json
from gemma_serve.engine.config import CacheDType, EngineConfig
from gemma_serve.engine.engine import Engine, EngineRequest
from gemma_serve.engine.sequence import PromptInputs
from gemma_serve.errors import ConfigurationError
from gemma_serve.gemma.config import ModelConfig, Quantization
from gemma_serve.gemma.dummy import dummy_config
from gemma_serve.gemma.engine_builder import build_engine
from gemma_serve.gemma.loading import LoadedGemma, load_gemma
from gemma_serve.gemma.quantization.matrices import quantized_shapes, stored_bytes
from gemma_serve.generation import SamplingParams

TEXT: Final = Path(__file__).parent / "texts" / "lighthouse.txt"
KINDS: Final[tuple[Quantization, ...]] = get_args(Quantization)
SIZES: Final = ("270m", "1b", "4b", "12b", "27b")
_GIB: Final = 1024**3


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """One kind of weights and of cache, or why it was not measured."""

    quantization: Quantization
    kv_cache_dtype: CacheDType
    not_measured: str | None = None
    weights_bytes: int = 0
    perplexity: float = math.nan
    prompt_tokens_per_s: float = math.nan
    decode_tokens_per_s: float = math.nan
    """Of one stream."""


def main(argv: Seq[str]) -> None:
    args = _parse(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    results = [_measure(args, kind, "auto") for kind in args.kinds]
    results.append(_measure(args, "none", "fp8"))
    text_bytes = len(TEXT.read_text())
    print(f"\n{args.model}, perplexity of {TEXT.name} ({text_bytes} characters)")
    _print_qualities(results)
    print("\nGiB of weights of each size (computed from the shapes, vision tower included)")
    sizes = {size: {kind: _weights_gib(size, kind) for kind in KINDS} for size in SIZES}
    _print_sizes(sizes)
    if args.output is not None:
        report = {
            "model": args.model,
            "kinds": [asdict(result) for result in results],
            "weights_gib": sizes,
        }
        write_json(args.output, report)


def _parse(argv: Seq[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--max-tokens", type=int, default=4096, help="of the text, at most")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    return parser.parse_args(argv)


def _measure(args: argparse.Namespace, kind: Quantization, cache: CacheDType) -> Quality:
    print(f"{kind}, cache {cache} ...", file=sys.stderr, flush=True)
    try:
        gemma = load_gemma(ModelConfig(model=args.model, device=args.device, quantization=kind))
    except ConfigurationError as error:
        return Quality(quantization=kind, kv_cache_dtype=cache, not_measured=str(error))
    weights_bytes = stored_bytes(gemma.model)
    token_ids = _token_ids(gemma, args.max_tokens)
    config = EngineConfig(kv_cache_dtype=cache, max_model_len=len(token_ids) + 64)
    engine = build_engine(gemma, config)
    perplexity, prompt_tokens_per_s = perplexity_of(engine, token_ids)
    return Quality(
        quantization=kind,
        kv_cache_dtype=cache,
        weights_bytes=weights_bytes,
        perplexity=perplexity,
        prompt_tokens_per_s=prompt_tokens_per_s,
        decode_tokens_per_s=_decode_rate(engine, token_ids[:64]),
    )


def _token_ids(gemma: LoadedGemma, max_tokens: int) -> tuple[int, ...]:
    encoded = gemma.tokenizer(TEXT.read_text(), add_special_tokens=False)["input_ids"]
    return (gemma.tokenizer.bos_token_id, *islice(encoded, max_tokens))


def perplexity_of(engine: Engine, token_ids: tuple[int, ...]) -> tuple[float, float]:
    """Of every token but the first; and prompt tokens per second, scoring included."""
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0)
    prompt = PromptInputs(token_ids)
    begin = perf_counter()
    engine.add(EngineRequest(key=0, prompt=prompt, sampling=sampling))
    logprobs: list[float] = []
    while engine.has_work:
        for output in engine.step():
            logprobs += [p.chosen.logprob for d in output.deltas for p in d.prompt_logprobs]
    elapsed_s = perf_counter() - begin
    if len(logprobs) != len(token_ids) - 1:
        sys.exit(f"expected {len(token_ids) - 1} logprobs, got {len(logprobs)}")
    return math.exp(-math.fsum(logprobs) / len(logprobs)), len(token_ids) / elapsed_s


def _decode_rate(engine: Engine, token_ids: tuple[int, ...], num_tokens: int = 32) -> float:
    sampling = SamplingParams(max_tokens=num_tokens + 1, temperature=0, ignore_eos=True)
    engine.add(EngineRequest(key=1, prompt=PromptInputs(token_ids), sampling=sampling))
    while not engine.step():
        pass
    begin = perf_counter()
    while engine.has_work:
        engine.step()
    return num_tokens / (perf_counter() - begin)


def _weights_gib(size: str, kind: Quantization) -> float:
    return stored_bytes(quantized_shapes(dummy_config(size), torch.bfloat16, kind)) / _GIB


def _print_qualities(results: Seq[Quality]) -> None:
    print(f"{'weights':20} {'cache':6} {'GiB':>6} {'perplexity':>10} {'prompt/s':>9} {'tok/s':>6}")
    for r in results:
        row = f"{r.quantization:20} {r.kv_cache_dtype:6}"
        if r.not_measured is not None:
            print(f"{row} not measured: {r.not_measured}")
            continue
        print(
            f"{row} {r.weights_bytes / _GIB:6.2f} {r.perplexity:10.3f} "
            f"{r.prompt_tokens_per_s:9.0f} {r.decode_tokens_per_s:6.1f}"
        )


def _print_sizes(sizes: dict[str, dict[Quantization, float]]) -> None:
    print(f"{'weights':20}" + "".join(f"{size:>8}" for size in sizes))
    for kind in KINDS:
        print(f"{kind:20}" + "".join(f"{of_size[kind]:8.2f}" for of_size in sizes.values()))


if __name__ == "__main__":
    main(sys.argv[1:])
