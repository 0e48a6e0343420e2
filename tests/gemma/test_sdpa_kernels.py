"""Which of torch's kernels a step may use."""

import torch
from torch import Tensor

from gemma_serve.gemma.attention.sdpa import SdpaAttention
from tests.gemma.harness import loaded, paged_logits, prompt
from tests.tiny import tiny_text_model


def flash_and_cudnn() -> tuple[bool, bool]:
    """Whether torch may use them now."""
    cuda = torch.backends.cuda
    return cuda.flash_sdp_enabled(), cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]


def test_cudnn_which_prepares_for_every_new_length_is_off_during_a_step_alone() -> None:
    """On Hopper torch prefers it, and decoding would wait for a new plan at each token."""
    seen = []

    class Watching(SdpaAttention):
        def _attend(self, layer: int, query: Tensor, scale: float) -> Tensor:
            seen.append(flash_and_cudnn())
            return super()._attend(layer, query, scale)

    before = flash_and_cudnn()
    paged_logits(loaded(tiny_text_model()), [prompt(5)], chunk_size=16, attention=Watching)
    assert seen == [(True, False)] * 6
    assert flash_and_cudnn() == before
