"""Layers computed by our kernels give what torch's operations give."""

import pytest
import torch
from torch import Tensor

from gemma_serve.gemma.attention.base import StepAttention
from gemma_serve.gemma.decoder import Decoder
from gemma_serve.gemma.launching import Kernels
from tests.gemma.native_kernels import needs_kernels
from tests.tiny import tiny_text_model

ON_GPU = torch.cuda.is_available()


class EachItself(StepAttention):
    """As if every token saw itself alone: attention has tests of its own."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        repeated = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        return query * key.mean() * scale + repeated * (layer + 1)


@torch.inference_mode()
def hidden_states(kernels: Kernels, device: str) -> Tensor:
    model = tiny_text_model().to(device)
    positions = torch.tensor([0, 5, 300], device=device)
    embeddings = model.get_input_embeddings()(positions)
    return Decoder(model, kernels).forward(embeddings, positions, EachItself())


@needs_kernels
def test_native_kernels_stand_in_for_torchs_operations() -> None:
    theirs = hidden_states("torch", "cpu")
    torch.testing.assert_close(hidden_states("native", "cpu"), theirs, atol=1e-4, rtol=1e-5)


def test_triton_kernels_stand_in_for_torchs_operations() -> None:
    pytest.importorskip("triton", reason="needs the package triton")
    device = "cuda" if ON_GPU else "cpu"
    torch.testing.assert_close(hidden_states("triton", device), hidden_states("torch", device))
