"""The arithmetic of memory, on the published shapes and on tiny ones."""

import logging

import pytest
import torch

from gemma_serve.engine.config import EngineConfig
from gemma_serve.errors import ConfigurationError
from gemma_serve.gemma.cache_sizing import (
    DeviceMemory,
    cpu_cache_bytes,
    gpu_cache_bytes,
    log_capacity,
    max_tokens_held,
    num_cache_blocks,
    num_chats_held,
    vision_cache_bytes,
)
from gemma_serve.gemma.dummy import dummy_config
from gemma_serve.gemma.kv_cache import CacheLayout
from tests.tiny import tiny_text_model

MIB, GIB = 1024**2, 1024**3


def tiny_layout() -> CacheLayout:
    return CacheLayout.of(tiny_text_model().config, [torch.device("cpu")] * 6, torch.float32)


def layout_of(size: str) -> CacheLayout:
    config = dummy_config(size).get_text_config()
    return CacheLayout.of(config, [torch.device("meta")] * config.num_hidden_layers, torch.bfloat16)


def test_the_budget_is_filled_with_whole_blocks() -> None:
    layout = tiny_layout()
    per_block = layout.bytes_per_block(16)
    budget = 1000 * per_block + per_block // 2
    assert num_cache_blocks(layout, EngineConfig(), budget_bytes=budget, max_model_len=1024) == 1000


def test_too_little_memory_for_one_sequence_is_refused_with_the_numbers() -> None:
    numbers = r"has 0\.4 MiB.*max_model_len=1024.* needs 0\.9 MiB: at most 256 tokens fit"
    with pytest.raises(ConfigurationError, match=numbers):
        num_cache_blocks(tiny_layout(), EngineConfig(), budget_bytes=400 * 1024, max_model_len=1024)


def test_the_length_that_a_refusal_names_is_accepted_and_one_more_token_is_not() -> None:
    layout, config = layout_of("4b"), EngineConfig()
    longest = max_tokens_held(layout, config, GIB // layout.bytes_per_block(16))
    num_cache_blocks(layout, config, budget_bytes=GIB, max_model_len=longest)
    with pytest.raises(ConfigurationError, match=f"at most {longest} tokens fit"):
        num_cache_blocks(layout, config, budget_bytes=GIB, max_model_len=longest + 1)


def test_a_cpu_always_holds_one_sequence_of_full_length() -> None:
    layout, config = tiny_layout(), EngineConfig()
    budget = cpu_cache_bytes(layout, config, max_model_len=1_000_000)
    assert num_cache_blocks(layout, config, budget_bytes=budget, max_model_len=1_000_000) > 0
    assert cpu_cache_bytes(layout, config, max_model_len=1000) == GIB


def test_one_gpu_gives_what_weights_steps_and_images_leave() -> None:
    gpu = DeviceMemory(
        free_bytes=28 * GIB, step_bytes=6 * GIB, vision_cache_bytes=2 * GIB, num_planes=10
    )
    assert gpu_cache_bytes([gpu]) == 19 * GIB


def test_the_fullest_of_several_gpus_decides() -> None:
    first = DeviceMemory(free_bytes=14 * GIB, step_bytes=4 * GIB, num_planes=5)  # 2 GiB a plane
    second = DeviceMemory(free_bytes=21 * GIB, step_bytes=1 * GIB, num_planes=5)
    without_layers = DeviceMemory(free_bytes=1 * GIB, step_bytes=0, num_planes=0)
    assert gpu_cache_bytes([first, second, without_layers]) == 19 * GIB


def test_a_gpu_whose_steps_take_more_than_is_free_gives_nothing() -> None:
    gpu = DeviceMemory(free_bytes=1 * GIB, step_bytes=2 * GIB, num_planes=5)
    assert gpu_cache_bytes([gpu]) == 0


@pytest.mark.parametrize(
    ("size", "num_blocks", "chats_of_2k", "chats_of_8k", "longest"),
    [
        ("1b", 303_104, 912, 423, 4_843_424),
        ("4b", 60_620, 115, 66, 960_608),
        ("12b", 18_944, 41, 22, 295_344),
    ],
)
def test_what_18_and_a_half_gibibytes_hold(
    size: str, num_blocks: int, chats_of_2k: int, chats_of_8k: int, longest: int
) -> None:
    layout, config = layout_of(size), EngineConfig()
    budget = 37 * GIB // 2
    assert (
        num_cache_blocks(layout, config, budget_bytes=budget, max_model_len=8192),
        num_chats_held(layout, config, num_blocks, 2048),
        num_chats_held(layout, config, num_blocks, 8192),
        max_tokens_held(layout, config, num_blocks),
    ) == (num_blocks, chats_of_2k, chats_of_8k, longest)


def test_27b_holds_sixteen_usual_chats_or_one_of_full_length_beside_its_weights_in_80_gb() -> None:
    layout, config = layout_of("27b"), EngineConfig()
    budget = 37 * GIB // 2
    num_blocks = num_cache_blocks(layout, config, budget_bytes=budget, max_model_len=131_072)
    assert num_chats_held(layout, config, num_blocks, 8192) >= 16
    assert max_tokens_held(layout, config, num_blocks) >= 131_072 * 1.5


@pytest.mark.parametrize(
    ("size", "on_a_cpu", "on_80_gb"), [("4b", 204, 610), ("12b", 136, 406), ("27b", 97, 290)]
)
def test_hundreds_of_images_are_remembered(size: str, on_a_cpu: int, on_80_gb: int) -> None:
    config = dummy_config(size)
    per_view = config.mm_tokens_per_image * config.text_config.hidden_size * 2  # bfloat16
    on_cpu = vision_cache_bytes(EngineConfig(), gpu_bytes=None)
    on_gpu = vision_cache_bytes(EngineConfig(), gpu_bytes=80 * 10**9)
    assert (on_cpu // per_view, on_gpu // per_view) == (on_a_cpu, on_80_gb)


def test_the_operator_decides_what_is_remembered_of_images() -> None:
    config = EngineConfig(vision_cache_memory_bytes=0)
    assert vision_cache_bytes(config, gpu_bytes=80 * 10**9) == 0


def test_start_up_says_how_many_tokens_and_chats_fit(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        log_capacity(layout_of("12b"), EngineConfig(), 18_944, max_model_len=131_072)
    assert [record.getMessage() for record in caplog.records] == [
        "KV cache: 18.50 GiB, 18944 blocks of 16 tokens: holds 22 chats of 8192 tokens "
        "(180224 tokens), or one of 295344"
    ]
