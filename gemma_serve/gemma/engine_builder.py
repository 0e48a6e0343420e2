"""Puts cache, scheduler, sampler and runner of one loaded model together."""

import math
from dataclasses import replace
from typing import Final

from gemma_serve.engine.block_manager import BlockManager
from gemma_serve.engine.config import EngineConfig
from gemma_serve.engine.drafter import Drafter
from gemma_serve.engine.engine import Engine
from gemma_serve.engine.prefill_budget import PrefillBudget
from gemma_serve.engine.prompt_lookup import LookupDrafter
from gemma_serve.engine.scheduler import Scheduler
from gemma_serve.engine.speculation import Speculation
from gemma_serve.engine.vocabulary import Vocabulary
from gemma_serve.errors import ConfigurationError
from gemma_serve.gemma.attention.base import AttentionFactory
from gemma_serve.gemma.cache_budget import (
    draft_cache_budget,
    kv_cache_budget,
    vision_cache_budget,
)
from gemma_serve.gemma.cache_sizing import log_capacity, num_cache_blocks
from gemma_serve.gemma.draft_model import DraftModel
from gemma_serve.gemma.loading import LoadedGemma
from gemma_serve.gemma.runner_factory import RunnerFactory
from gemma_serve.gemma.token_bytes import control_token_names, token_bytes

_GPU_PREFILL_SLOWDOWN: Final = 1.75
"""So that the longest gaps between tokens stay below twice the usual one. On a CPU a prompt token
takes as long in any step, so that a limit would only make prompts wait."""


def build_engine(
    gemma: LoadedGemma,
    config: EngineConfig,
    attention: AttentionFactory | None = None,
    draft: LoadedGemma | None = None,
) -> Engine:
    """Put cache, scheduler, sampler and runner of one loaded model together.

    ``attention``: instead of what ``config`` names. ``draft``: ``config.draft_model``, loaded.
    Raises ``ConfigurationError`` if the devices cannot hold what ``config`` asks for.
    """
    assert (draft is None) == (config.draft_model is None)
    _check_images_fit(gemma, config)
    longest = max_model_len(gemma, config)
    runners = RunnerFactory(
        gemma,
        config,
        max_model_len=longest,
        vision_cache_bytes=vision_cache_budget(gemma, config),
        attention=attention,
    )
    layout, vocab_size = runners.layout, runners.vocab_size
    drafters: list[Drafter] = [LookupDrafter()] if config.speculation == "prompt_lookup" else []
    if draft is not None:
        draft_model = DraftModel(draft, gemma, config, max_model_len=longest)
        num_bytes = draft_cache_budget(layout, draft_model.layout, config, max_model_len=longest)
        # Before the rest of the memory is measured, and off what the operator gave.
        drafters.append(draft_model.drafter(num_bytes))
        if config.kv_cache_memory_bytes is not None:
            left = config.kv_cache_memory_bytes - num_bytes
            config = replace(config, kv_cache_memory_bytes=left)
    budget = kv_cache_budget(
        gemma, layout, config, max_model_len=longest, make_runner=lambda: runners.make(1)
    )
    num_blocks = num_cache_blocks(layout, config, budget_bytes=budget, max_model_len=longest)
    runner = runners.make_for_serving(num_blocks)
    log_capacity(layout, config, num_blocks, max_model_len=longest)
    block_manager = BlockManager(
        num_blocks=num_blocks, block_size=config.block_size, windows=layout.windows
    )
    return Engine(
        runner=runner,
        scheduler=Scheduler(
            block_manager=block_manager,
            max_num_seqs=config.max_num_seqs,
            prefill_chunk_size=config.prefill_chunk_size,
            prefill_budget=_prefill_budget(gemma, config),
            speculation=_speculation(drafters, config, vocab_size),
        ),
        block_manager=block_manager,
        vocabulary=Vocabulary(
            token_bytes=token_bytes(gemma.tokenizer, vocab_size),
            eos_token_ids=gemma.eos_token_ids,
            stop_strings=gemma.stop_strings,
            control_token_names=control_token_names(gemma.tokenizer),
        ),
        max_model_len=longest,
        enable_prefix_cache=config.enable_prefix_cache,
        runs_ahead=_runs_ahead(gemma, config),
    )


def max_model_len(gemma: LoadedGemma, config: EngineConfig) -> int:
    """Tokens of prompt and completion together: the operator's limit, or the model's."""
    if config.max_model_len is None:
        return gemma.max_model_len
    if config.max_model_len > gemma.max_model_len:
        raise ConfigurationError(
            f"max_model_len is {config.max_model_len}, but {gemma.name} was trained for "
            f"{gemma.max_model_len} tokens."
        )
    return config.max_model_len


def _prefill_budget(gemma: LoadedGemma, config: EngineConfig) -> PrefillBudget | None:
    """An image is computed in one step, so there is always room for one."""
    max_slowdown = config.max_prefill_slowdown
    if max_slowdown is None:
        max_slowdown = _GPU_PREFILL_SLOWDOWN if _is_on_gpu(gemma) else math.inf
    if math.isinf(max_slowdown):
        return None
    return PrefillBudget(
        chunk_size=config.prefill_chunk_size,
        max_slowdown=max_slowdown,
        min_tokens=gemma.vision.tokens_per_view if gemma.vision else 0,
    )


def _runs_ahead(gemma: LoadedGemma, config: EngineConfig) -> bool:
    """Whether steps begin before the tokens of the last one are known: on a GPU, which computes
    while the host goes on, and unless guesses are made from those tokens."""
    return _is_on_gpu(gemma) and not config.speculates and not config.enforce_eager


def _is_on_gpu(gemma: LoadedGemma) -> bool:
    return bool(gemma.model.lm_head.weight.device.type == "cuda")


def _speculation(
    drafters: list[Drafter], config: EngineConfig, vocab_size: int
) -> Speculation | None:
    if not drafters:
        return None
    return Speculation(
        drafters,
        max_drafts=config.num_speculative_tokens,
        max_rows=config.max_sampled_rows,
        vocab_size=vocab_size,
    )


def _check_images_fit(gemma: LoadedGemma, config: EngineConfig) -> None:
    if gemma.vision and config.prefill_chunk_size < gemma.vision.tokens_per_view:
        raise ConfigurationError(
            f"prefill_chunk_size is {config.prefill_chunk_size}, but an image of {gemma.name} has "
            f"{gemma.vision.tokens_per_view} tokens, which are computed together."
        )
