import pytest
import torch

from gemma_serve.engine.config import EngineConfig
from gemma_serve.errors import ConfigurationError
from gemma_serve.gemma.cache_sizing import activation_bytes, num_cache_blocks
from gemma_serve.gemma.dummy import dummy_config, empty_model
from gemma_serve.gemma.kv_cache import CacheLayout
from tests.tiny import tiny_text_model

GIB = 1024**3


def tiny_layout() -> CacheLayout:
    return CacheLayout.of(tiny_text_model().config, [torch.device("cpu")] * 6, torch.float32)


def test_the_operators_memory_is_filled_with_whole_blocks() -> None:
    layout = tiny_layout()
    per_block = layout.bytes_per_block(16)
    config = EngineConfig(kv_cache_memory_bytes=1000 * per_block + per_block // 2)
    assert num_cache_blocks(layout, tiny_text_model(), config, max_model_len=1024) == 1000


def test_too_little_memory_for_one_sequence_is_refused_with_the_numbers() -> None:
    config = EngineConfig(kv_cache_memory_bytes=1024)
    with pytest.raises(ConfigurationError, match=r"0\.0 MiB.*max_model_len=1024.*0\.9 MiB"):
        num_cache_blocks(tiny_layout(), tiny_text_model(), config, max_model_len=1024)


def test_a_cpu_always_holds_one_sequence_of_full_length() -> None:
    layout, model = tiny_layout(), tiny_text_model()
    blocks = num_cache_blocks(layout, model, EngineConfig(), max_model_len=1_000_000)
    assert blocks * layout.bytes_per_block(16) >= 1_000_000 * 2 * 2 * 16 * 4


def test_a_long_27b_chat_reserves_gigabytes_and_a_short_one_does_not() -> None:
    model = empty_model(dummy_config("27b"), dtype=torch.bfloat16, device=torch.device("meta"))
    short = activation_bytes(model, EngineConfig(), max_model_len=8192)
    long = activation_bytes(model, EngineConfig(), max_model_len=131_072)
    assert short < 1.5 * GIB < 2.5 * GIB < long < 5 * GIB
