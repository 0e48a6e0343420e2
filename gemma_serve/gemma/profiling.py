"""Runs the largest steps that can come, to see how much memory they take beside the weights."""

from collections.abc import Callable, Collection
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from gemma_serve.engine.block_manager import BlockManager, BlockTable
from gemma_serve.engine.config import EngineConfig
from gemma_serve.engine.detokenizer import Detokenizer
from gemma_serve.engine.sampling_state import SamplingState
from gemma_serve.engine.scheduler import ScheduledBatch, ScheduledSequence
from gemma_serve.engine.sequence import ImageSpan, PromptInputs, Sequence
from gemma_serve.gemma.model_runner import GemmaModelRunner, GemmaStep
from gemma_serve.generation import SamplingParams, VisionInput


def largest_steps(
    config: EngineConfig,
    *,
    max_model_len: int,
    windows: Seq[int | None],
    vocab_size: int,
    vision: VisionInput | None,
) -> list[ScheduledBatch]:
    """The step with the most text and, if there is ``vision``, the one with the most images.

    One sequence computes the last chunk of the longest prompt while all others decode at the end of
    the context, whose last token is never computed. If more rows can be sampled than there are
    sequences, the chunk has the drafts: it matters not who does. Sampling is the costliest there
    is. Every token's keys and values lie in block 0: how much a step reads matters, not what, so
    that a cache of one block will do.
    """
    longest = max_model_len - 1
    num_chunk_tokens = min(config.prefill_chunk_size, longest)
    num_drafts = min(config.max_sampled_rows - config.max_num_seqs, num_chunk_tokens - 1)
    prompts = [(PromptInputs((0,) * (longest - num_drafts)), num_drafts)]
    if vision is not None and vision.tokens_per_view <= num_chunk_tokens:
        images = _images(longest - num_chunk_tokens, longest, vision)
        prompts.append((PromptInputs((0,) * longest, images), 0))

    blocks = BlockManager(num_blocks=1, block_size=config.block_size, windows=windows)

    def sequence(arrival: int, prompt: PromptInputs) -> Sequence:
        table = blocks.new_table()
        table.groups = [[0] * -(-longest // config.block_size) for _ in windows]
        return _sequence(arrival, prompt, table, vocab_size)

    # Of different lengths, so that batches of them are padded and masked.
    decoding = [
        _scheduled(sequence(i, PromptInputs((0,) * max(1, longest - i))), num_tokens=1)
        for i in range(1, config.max_num_seqs)
    ]
    return [
        ScheduledBatch((*decoding, _scheduled(sequence(0, prompt), num_chunk_tokens, num_drafts)))
        for prompt, num_drafts in prompts
    ]


@dataclass(frozen=True, slots=True)
class GpuUse:
    """``free_bytes``: of the GPU, with the weights loaded. ``step_bytes``: what the runner, its
    recorded steps and the largest step at its peak take of them."""

    free_bytes: int
    step_bytes: int


def measure_gpus(
    make_runner: Callable[[], GemmaModelRunner],
    steps: Seq[ScheduledBatch],
    devices: Collection[torch.device],
) -> dict[torch.device, GpuUse]:
    """Run ``steps`` on a runner of their own, which is gone afterwards, as is what they left.

    ``devices``: the GPUs that hold the model. Raises ``MemoryError`` if one is too small.
    """
    torch.cuda.empty_cache()  # what loading the weights left behind
    step_bytes = _bytes_taken(make_runner, steps, devices)
    torch.cuda.empty_cache()
    # Only now: the libraries' own workspaces, which stay, were made by the first step.
    return {device: GpuUse(_free_bytes(device), step_bytes[device]) for device in devices}


def _bytes_taken(
    make_runner: Callable[[], GemmaModelRunner],
    steps: Seq[ScheduledBatch],
    devices: Collection[torch.device],
) -> dict[torch.device, int]:
    allocated_before = {device: torch.cuda.memory_allocated(device) for device in devices}
    runner = make_runner()
    own = {d: torch.cuda.memory_allocated(d) - allocated_before[d] for d in devices}
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    _run_ahead(runner, steps)
    peaks = {
        d: torch.cuda.max_memory_allocated(d) - torch.cuda.memory_allocated(d) for d in devices
    }
    torch.cuda.empty_cache()
    free_before = {device: _free_bytes(device) for device in devices}
    runner.record_decode_steps()
    torch.cuda.empty_cache()
    # Asked of the driver: torch does not count what graphs themselves take.
    recorded = {device: free_before[device] - _free_bytes(device) for device in devices}
    return {device: own[device] + peaks[device] + recorded[device] for device in devices}


def _run_ahead(runner: GemmaModelRunner, steps: Seq[ScheduledBatch]) -> None:
    """Each of ``steps`` beside what the step before it keeps until its tokens are taken in."""
    last: GemmaStep | None = None
    for batch in (*steps, *steps):
        step = runner.begin(batch)
        if last is not None:
            last.tokens()
        step.sample()
        last = step


def _free_bytes(device: torch.device) -> int:
    num_free, _ = torch.cuda.mem_get_info(device)
    return num_free


def _images(start: int, end: int, vision: VisionInput) -> tuple[ImageSpan, ...]:
    """As many as lie in ``[start, end)``, no two alike."""
    num_bytes = 3 * vision.view_size**2
    return tuple(
        ImageSpan(first, vision.tokens_per_view, first.to_bytes(4, "big").ljust(num_bytes, b"\0"))
        for first in range(start, end - vision.tokens_per_view + 1, vision.tokens_per_view)
    )


def _scheduled(sequence: Sequence, num_tokens: int, num_drafts: int = 0) -> ScheduledSequence:
    """Its last tokens, some of which are drafts, and from which it samples."""
    end = len(sequence.token_ids) + num_drafts
    drafts = (0,) * num_drafts
    return ScheduledSequence(sequence, end - num_tokens, end, samples=True, drafts=drafts)


def _sequence(arrival: int, prompt: PromptInputs, table: BlockTable, vocab_size: int) -> Sequence:
    # All have their logprobs told, a penalty copies the logits, and every other sequence's are
    # sorted, since its limit keeps nearly all.
    top_k = vocab_size - 1 if arrival % 2 else None
    sampling = SamplingParams(top_k=top_k, top_p=0.5, repetition_penalty=2.0, logprobs=20)
    return Sequence(
        request_key=arrival,
        index=0,
        prompt=prompt,
        sampling_state=SamplingState(sampling, seed=0, prompt_token_ids=()),
        detokenizer=Detokenizer((), ()),
        stop_token_ids=frozenset(),
        max_total_tokens=len(prompt.token_ids),
        block_table=table,
        arrival=arrival,
        token_ids=list(prompt.token_ids),
    )
