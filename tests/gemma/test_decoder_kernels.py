"""Layers computed by our kernels give what torch's operations give."""

import pytest
import torch
from torch import Tensor

from gemma_serve.gemma.attention.base import StepAttention
from gemma_serve.gemma.decoder import Decoder
from gemma_serve.gemma.launching import Kernels
from tests.tiny import tiny_text_model

pytest.importorskip("triton", reason="needs the package triton, which comes with torch for CUDA")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class EachItself(StepAttention):
    """As if every token saw itself alone: attention has tests of its own."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        repeated = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        return query * key.mean() * scale + repeated * (layer + 1)


@torch.inference_mode()
def hidden_states(kernels: Kernels) -> Tensor:
    model = tiny_text_model().to(DEVICE)
    positions = torch.tensor([0, 5, 300], device=DEVICE)
    embeddings = model.get_input_embeddings()(positions)
    return Decoder(model, kernels).forward(embeddings, positions, EachItself())


def test_kernels_of_ours_stand_in_for_torchs_operations() -> None:
    torch.testing.assert_close(hidden_states("triton"), hidden_states("torch"))
