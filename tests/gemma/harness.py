"""Logits of whole prompts through the paged engine, and through transformers itself."""

from collections.abc import Sequence as Seq
from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache

from gemma_serve.engine.block_manager import BlockManager
from gemma_serve.engine.sampling.sampler import Sampler
from gemma_serve.engine.sequence import ImageSpan, PromptInputs
from gemma_serve.gemma.attention.base import AttentionFactory
from gemma_serve.gemma.attention.block_tables import BlockTables
from gemma_serve.gemma.attention.native import NativeAttention
from gemma_serve.gemma.attention.paged import PagedAttention
from gemma_serve.gemma.decoder import Decoder
from gemma_serve.gemma.dummy import Gemma3Model
from gemma_serve.gemma.kv_cache import CacheLayout, KVCache
from gemma_serve.gemma.loading import LoadedGemma
from gemma_serve.gemma.model_runner import GemmaModelRunner
from gemma_serve.gemma.token_feed import TokenFeed
from gemma_serve.generation import SamplingParams, VisionInput
from tests.engine.builders import make_scheduler, make_sequence
from tests.tiny import IMAGE_SIZE, IMAGE_TOKEN_ID, MAX_MODEL_LEN, tiny_tokenizer

BLOCK_SIZE = 4


def loaded(model: Gemma3Model) -> LoadedGemma:
    """A tiny model as the loader would hand it over."""
    has_vision = hasattr(model.config, "vision_config")
    tokens_per_view = getattr(model.config, "mm_tokens_per_image", 0)
    return LoadedGemma(
        name="tiny",
        model=model,
        tokenizer=tiny_tokenizer(vision=has_vision),
        max_model_len=MAX_MODEL_LEN,
        default_sampling=SamplingParams(),
        eos_token_ids=frozenset({1, 106}),
        stop_strings=(),
        vision=VisionInput(IMAGE_SIZE, tokens_per_view) if has_vision else None,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
    )


def prompt(num_tokens: int, *, images: Seq[tuple[int, int]] = (), seed: int = 0) -> PromptInputs:
    """Random text with an image at each ``(start, end)``."""
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(5, 500, (num_tokens,), generator=generator).tolist()
    spans = []
    for start, end in images:
        token_ids[start:end] = [IMAGE_TOKEN_ID] * (end - start)
        view = torch.randint(256, (IMAGE_SIZE, IMAGE_SIZE, 3), generator=generator)
        spans.append(ImageSpan(start, end - start, bytes(view.flatten().tolist())))
    return PromptInputs(tuple(token_ids), tuple(spans))


def paged_logits(
    gemma: LoadedGemma,
    prompts: Seq[PromptInputs],
    *,
    chunk_size: int,
    attention: type[PagedAttention],
    block_size: int = BLOCK_SIZE,
    num_decoded: int = 0,
    cache_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Logits ``[num_tokens, vocab_size]`` of each prompt, all computed together in chunks.

    ``num_decoded``: so many of each prompt's last tokens come one a step, as if they were sampled.
    """
    model = gemma.model
    text_model = model.get_decoder()
    device = text_model.embed_tokens.weight.device
    devices = [device] * len(text_model.layers)
    layout = CacheLayout.of(text_model.config, devices, cache_dtype or model.dtype)
    blocks = BlockManager(num_blocks=2000, block_size=block_size, windows=layout.windows)
    cache = KVCache(layout, num_blocks=2000, block_size=block_size)
    sampler = Sampler(vocab_size=model.lm_head.out_features, forbidden_token_ids=(), device=device)
    runner = GemmaModelRunner(
        gemma,
        Decoder(model, "native" if attention is NativeAttention else "torch"),
        cache,
        sampler,
        _factory(attention, cache, prompts),
        TokenFeed(max_rows=len(prompts), device=device),
    )
    scheduler = make_scheduler(blocks, prefill_chunk_size=chunk_size)
    logits: list[list[Tensor]] = [[] for _ in prompts]
    for arrival, inputs in enumerate(prompts):
        sequence = make_sequence(blocks, arrival=arrival)
        sequence.prompt = inputs
        sequence.token_ids = list(inputs.token_ids[: len(inputs.token_ids) - num_decoded])
        scheduler.add(sequence)
    while batch := scheduler.schedule():
        rows = runner.logits(batch)
        row = 0
        for scheduled in batch.scheduled:
            num_tokens = scheduled.end - scheduled.start
            logits[scheduled.sequence.arrival].append(rows[row : row + num_tokens])
            row += num_tokens
        scheduler.mark_computed(batch)
        for sequence in [s.sequence for s in batch.sampling]:
            num_known = len(sequence.token_ids)
            if num_known == len(sequence.prompt.token_ids):
                scheduler.remove([sequence])
            else:
                sequence.token_ids.append(sequence.prompt.token_ids[num_known])
    return [torch.cat(of_prompt) for of_prompt in logits]


def _factory(
    attention: type[PagedAttention], cache: KVCache, prompts: Seq[PromptInputs]
) -> AttentionFactory:
    if attention is not NativeAttention:
        return attention
    max_len = max(len(inputs.token_ids) for inputs in prompts)
    return partial(NativeAttention, BlockTables(cache, num_seats=8, max_model_len=max_len))


@torch.inference_mode()
def transformers_logits(model: Gemma3Model, inputs: PromptInputs) -> Tensor:
    """Logits ``[num_tokens, vocab_size]`` of transformers' own forward with its own masks."""
    has_vision = hasattr(model.config, "vision_config")
    model.set_attn_implementation({"text_config": "eager"} if has_vision else "eager")
    token_ids = torch.tensor([inputs.token_ids])
    if not has_vision:
        logits: Tensor = model(input_ids=token_ids).logits
        return logits[0]
    token_types = torch.zeros_like(token_ids)
    for image in inputs.images:
        token_types[0, image.start : image.end] = 1
    pixels = [
        torch.frombuffer(bytearray(i.view), dtype=torch.uint8)
        .view(IMAGE_SIZE, IMAGE_SIZE, 3)
        .permute(2, 0, 1)
        .to(model.dtype)
        / 127.5
        - 1
        for i in inputs.images
    ]
    logits = model(
        input_ids=token_ids,
        token_type_ids=token_types,
        pixel_values=torch.stack(pixels) if pixels else None,
    ).logits
    return logits[0]


@torch.inference_mode()
def last_transformers_logits(
    model: Gemma3Model, inputs: PromptInputs, *, chunk_size: int
) -> Tensor:
    """Logits ``[vocab_size]`` after a prompt of text whose whole mask would take gigabytes.

    transformers' own forward and cache, ``chunk_size`` tokens at a time.
    """
    model.set_attn_implementation("sdpa")
    cache = DynamicCache(config=model.config)
    for start in range(0, len(inputs.token_ids), chunk_size):
        chunk = torch.tensor([inputs.token_ids[start : start + chunk_size]])
        logits: Tensor = model(chunk, past_key_values=cache, logits_to_keep=1).logits
    return logits[0, -1]
