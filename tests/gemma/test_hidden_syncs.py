"""A step waits for the device once: for its tokens.

The model is on torch's ``meta`` device, which has no values. Whatever asks for one, such as
``item`` or a boolean index, fails, and copies between it and the host are seen as on a GPU.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gemma_serve.engine.block_manager import BlockManager
from gemma_serve.engine.model_runner import run_step
from gemma_serve.engine.sampling.masks import MaskApplier
from gemma_serve.engine.sampling.sampler import Sampler
from gemma_serve.engine.sampling_state import SamplingState
from gemma_serve.engine.scheduler import ScheduledBatch, ScheduledSequence
from gemma_serve.gemma.attention.block_tables import BlockTables
from gemma_serve.gemma.attention.device import (
    DeviceAttention,
    DeviceBackend,
    StepTokens,
    TileSizes,
)
from gemma_serve.gemma.decode_steps import DecodeSteps
from gemma_serve.gemma.decoder import Decoder
from gemma_serve.gemma.kv_cache import CacheLayout, KVCache
from gemma_serve.gemma.model_runner import GemmaModelRunner
from gemma_serve.gemma.token_feed import TokenFeed
from gemma_serve.generation import SamplingParams
from tests.engine.builders import make_sequence
from tests.gemma.harness import loaded
from tests.tiny import tiny_text_model

DEVICE = torch.device("meta")
MAX_LEN = 64


class Crossings(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Counts copies from the device, and forbids all that waits."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.num_to_host = 0
        self.num_to_device = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [arg for arg in torch.utils._pytree.tree_leaves((args, kwargs)) if is_tensor(arg)]
        arguments = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        if func.overloadpacket in (torch.ops.aten.to, torch.ops.aten._to_copy):
            return self._copy(func, args, kwargs, arguments)
        devices = {tensor.device for tensor in tensors if tensor.ndim > 0}
        assert len(devices) < 2, f"{func} copies one of its arguments to the device"
        return func(*args, **kwargs)

    def _copy(self, func: Any, args: Sequence[Any], kwargs: Any, arguments: dict[str, Any]) -> Any:
        source = arguments["self"]
        target = torch.device(arguments.get("device") or source.device)
        if target == source.device:
            return func(*args, **kwargs)
        if target.type == "cpu":
            self.num_to_host += 1
            return torch.ones(source.shape, dtype=source.dtype)
        assert arguments.get("non_blocking"), f"{func} waits for a copy to the device"
        self.num_to_device += 1
        return func(*args, **kwargs)


def is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


class Launches(DeviceAttention):
    """Looks at what kernels would be launched with, which lies on the device."""

    def _write(self, layer: int, tokens: StepTokens, key: Tensor, value: Tensor) -> None:
        keys, values = self._cache.plane(layer)
        table = self._table(layer, key.device)
        for tensor in (keys, values, table, key, value, tokens.key_ends, tokens.seats):
            assert tensor.device == DEVICE

    def _attend(self, layer: int, tokens: StepTokens, query: Tensor, scale: float) -> Tensor:
        assert len(tokens.positions) == len(query)
        return query * scale * (self._window(layer) or 1)


class LaunchingBackend(DeviceBackend):
    def over(self, tokens: StepTokens) -> Launches:
        return Launches(self.cache, self.tables, tokens)


Chunks = Sequence[tuple[int, int]]
"""``(start, end)`` of each sequence."""


class Steps:
    """Runs steps of given chunks, and tells what crossed to and fro."""

    def __init__(self, runner: GemmaModelRunner, blocks: BlockManager) -> None:
        self._runner = runner
        self._blocks = blocks

    def run(self, chunks: Chunks, samplings: Sequence[SamplingParams]) -> Crossings:
        """One step."""
        batch = self._batch(chunks, samplings)
        crossings = Crossings()
        with crossings:
            sampled = run_step(self._runner, batch)
        assert len(sampled) == len(chunks)
        return crossings

    def run_ahead(self, chunks: Chunks, samplings: Sequence[SamplingParams]) -> Crossings:
        """A step, and before its tokens are looked at the one that computes them, in which other
        prompts begin."""
        batch = self._batch(chunks, samplings)
        following = [ScheduledSequence(s.sequence, s.end, s.end + 1, True) for s in batch.scheduled]
        assert all(scheduled.is_awaited for scheduled in following)
        others = self._batch([(0, 7), (0, 9)], [GREEDY, GREEDY], first_arrival=len(chunks))
        crossings = Crossings()
        with crossings:
            step = self._runner.begin(batch)
            step.sample()
            self._runner.begin(ScheduledBatch((*following, *others.scheduled)))
        return crossings

    def _batch(
        self, chunks: Chunks, samplings: Sequence[SamplingParams], *, first_arrival: int = 0
    ) -> ScheduledBatch:
        scheduled = []
        for arrival, ((start, end), sampling) in enumerate(
            zip(chunks, samplings, strict=True), first_arrival
        ):
            sequence = make_sequence(self._blocks, num_prompt_tokens=end, arrival=arrival)
            assert self._blocks.allocate(sequence.block_table, end + 1)
            sequence.sampling_state = SamplingState(sampling, seed=0, prompt_token_ids=())
            scheduled.append(ScheduledSequence(sequence, start, end, samples=True))
        return ScheduledBatch(tuple(scheduled))


@pytest.fixture
def steps() -> Steps:
    model = tiny_text_model().to(DEVICE)
    decoder = Decoder(model)
    layout = CacheLayout.of(model.config, [DEVICE] * 6, torch.float32)
    blocks = BlockManager(num_blocks=900, block_size=4, windows=layout.windows)
    cache = KVCache(layout, num_blocks=1, block_size=4)
    backend = LaunchingBackend(
        cache, BlockTables(cache, num_seats=8, max_model_len=MAX_LEN), TileSizes(short=1, long=8)
    )
    feed = TokenFeed(max_rows=8, device=DEVICE)
    decode_steps = DecodeSteps(
        decoder,
        lambda names: model.model.embed_tokens(feed.token_ids(names)),
        backend,
        max_num_tokens=8,
        record=lambda compute: compute,
    )
    sampler = Sampler(vocab_size=512, forbidden_token_ids=(3,), device=DEVICE)
    runner = GemmaModelRunner(
        loaded(model), decoder, cache, sampler, backend.begin, feed, decode_steps=decode_steps
    )
    runner.record_decode_steps()
    return Steps(runner, blocks)


GREEDY = SamplingParams(temperature=0)
USUAL = SamplingParams(temperature=1, top_k=64, top_p=0.95)
NUCLEUS = SamplingParams(temperature=1, top_p=0.9)


def test_a_replayed_decode_step_sends_its_inputs_and_the_sampling_and_fetches_the_tokens(
    steps: Steps,
) -> None:
    crossings = steps.run([(9, 10), (20, 21), (15, 16)], [USUAL] * 3)
    assert crossings.num_to_host == 1
    assert crossings.num_to_device == 2


@pytest.mark.parametrize(
    "samplings",
    [
        [GREEDY, USUAL, NUCLEUS],
        [SamplingParams(temperature=1)] * 3,
        [SamplingParams(repetition_penalty=1.2), USUAL, SamplingParams(logit_bias=((5, 2.0),))],
        [SamplingParams(allowed_token_ids=(5, 6)), GREEDY, USUAL],
    ],
    ids=["methods", "all tokens", "penalties", "restrictions"],
)
@pytest.mark.parametrize(
    "chunks", [((9, 10), (20, 21), (15, 16)), ((9, 10), (0, 21), (3, 16))], ids=["decode", "mixed"]
)
def test_no_way_to_sample_waits_before_its_tokens(
    steps: Steps,
    chunks: tuple[tuple[int, int], ...],
    samplings: list[SamplingParams],
) -> None:
    assert steps.run(chunks, samplings).num_to_host == 1
    assert steps.run_ahead(chunks, samplings).num_to_host == 1


def test_logprobs_are_fetched_in_one_more_copy(steps: Steps) -> None:
    crossings = steps.run([(9, 10), (20, 21), (3, 16)], [GREEDY, SamplingParams(logprobs=3), USUAL])
    assert crossings.num_to_host == 2


def test_masks_of_some_rows_are_sent_without_waiting() -> None:
    applier = MaskApplier(512, DEVICE)
    crossings = Crossings()
    with crossings:
        applier.apply(torch.empty(4, 512, device=DEVICE), {0: b"\1", 3: b"\2"})
    assert (crossings.num_to_host, crossings.num_to_device) == (0, 2)
