"""Greedy completions of one model by the engine and by transformers' ``generate``."""

import pydoc_data.topics
from collections.abc import Sequence as Seq

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from gemma_serve.engine.config import EngineConfig
from gemma_serve.engine.engine import Engine, EngineRequest
from gemma_serve.engine.sequence import PromptInputs
from gemma_serve.gemma.engine_builder import build_engine
from gemma_serve.gemma.loading import LoadedGemma
from gemma_serve.generation import SamplingParams

NUM_TOKENS = 16
MAX_REFERENCE_CHUNK = 4096
Prompt = tuple[int, ...]


def english_prompts(tokenizer: PreTrainedTokenizerBase, lengths: Seq[int]) -> list[Prompt]:
    """Prompts of exactly ``lengths`` tokens, each another piece of Python's own manual."""
    manual = " ".join(pydoc_data.topics.topics.values())
    prompts = []
    for i, length in enumerate(lengths):
        text = manual[i * 4000 : i * 4000 + 12 * length]
        token_ids = tokenizer(text, add_special_tokens=False).input_ids
        prompts.append((2, *token_ids[: length - 1]))
    assert [len(prompt) for prompt in prompts] == list(lengths)
    return prompts


def log_spaced_lengths(num: int, shortest: int, longest: int) -> list[int]:
    """``num`` lengths from ``shortest`` to ``longest``, as many short ones as long ones."""
    growth = longest / shortest
    return [round(shortest * growth ** (i / (num - 1))) for i in range(num)]


def generate_greedily(gemma: LoadedGemma, prompts: Seq[Prompt]) -> list[Prompt]:
    """``NUM_TOKENS`` tokens after each prompt by transformers, one prompt at a time."""
    gemma.model.set_attn_implementation("sdpa")
    # Neither the checkpoint's stops nor its sampling. Its mask of a whole long prompt would take
    # gigabytes; shorter ones are computed at once.
    gemma.model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=NUM_TOKENS, prefill_chunk_size=MAX_REFERENCE_CHUNK
    )
    completions = []
    for prompt in prompts:
        input_ids = torch.tensor([prompt])
        output = gemma.model.generate(input_ids, attention_mask=torch.ones_like(input_ids))
        completions.append(tuple(output[0, len(prompt) :].tolist()))
    return completions


def complete_greedily(engine: Engine, prompts: Seq[Prompt], *, together: bool) -> list[Prompt]:
    """The same by the engine, all prompts at once or one after another."""
    sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    completions: dict[int, Prompt] = dict.fromkeys(range(len(prompts)), ())
    for key, prompt in enumerate(prompts):
        engine.add(EngineRequest(key=key, prompt=PromptInputs(prompt), sampling=sampling))
        if not together or key == len(prompts) - 1:
            while engine.has_work:
                for output in engine.step():
                    assert output.error is None
                    for delta in output.deltas:
                        completions[output.key] += delta.token_ids
    return list(completions.values())


def make_engine(gemma: LoadedGemma, *, chunk_size: int, max_model_len: int = 4096) -> Engine:
    """An engine that computes ``chunk_size`` prompt tokens a step."""
    config = EngineConfig(
        max_num_seqs=16, prefill_chunk_size=chunk_size, max_model_len=max_model_len, block_size=16
    )
    return build_engine(gemma, config)
