"""Kernels and recorded steps where they are meant to run. Nobody has run these yet."""

import pytest
import torch

from gemma_serve.engine.config import AttentionSetting
from gemma_serve.gemma.attention.block_tables import BlockTables
from gemma_serve.gemma.attention.device import DeviceBackend
from gemma_serve.gemma.attention.selection import AttentionNeeds, select_attention
from gemma_serve.gemma.cuda_graphs import GraphRecorder
from gemma_serve.gemma.kv_cache import CacheLayout, KVCache
from tests.gemma.test_attention_selection import layout
from tests.gemma.test_decode_steps import MAX_LEN, MAX_NUM_SEQS, Runners, assert_alike

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = torch.device("cuda", 0)


def gpu_layout(num_kv_heads: int, head_dim: int) -> CacheLayout:
    return layout(num_kv_heads, head_dim, window=1024, dtype=torch.bfloat16, device=GPU)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"),
    [(4, 1, 256), (8, 4, 256), (16, 8, 256), (32, 16, 128)],
    ids=["1b", "4b", "12b", "27b"],
)
@pytest.mark.parametrize("setting", ["triton", "sdpa"])
def test_attention_passes_its_trial_in_the_shapes_of_gemma(
    num_heads: int, num_kv_heads: int, head_dim: int, setting: AttentionSetting
) -> None:
    needs = AttentionNeeds(
        layout=gpu_layout(num_kv_heads, head_dim),
        num_heads=num_heads,
        dtype=torch.bfloat16,
        block_size=16,
        max_num_seqs=8,
        max_model_len=2048,
    )
    select_attention(setting, needs)  # raises with what was wrong


def triton_backend(cache: KVCache) -> DeviceBackend:
    from gemma_serve.gemma.attention.triton_attention import TritonBackend

    tables = BlockTables(cache, num_seats=MAX_NUM_SEQS, max_model_len=MAX_LEN)
    return TritonBackend(cache, tables, num_heads=4, dtype=torch.float32)


@pytest.mark.parametrize("num_seqs", range(1, MAX_NUM_SEQS + 1))
def test_graphs_replay_what_the_reference_computes(num_seqs: int) -> None:
    runners = Runners(GraphRecorder(GPU), triton_backend, GPU)
    sequences = [runners.sequence(20 + index) for index in range(num_seqs)]
    for sequence in sequences:
        assert_alike(runners.logits((sequence, 0, 15)))
    for start in range(15, 19):
        assert_alike(runners.logits(*((sequence, start, start + 1) for sequence in sequences)))
