"""Gemma 3's decoder layers over packed tokens, in as few operations as torch allows.

The weights, their loading and the rotary frequencies are transformers'; what is computed is what
``Gemma3TextModel.forward`` computes (``docs/decisions/decoder.md`` says why it is written again).
Queries, keys and values come from one product, norms and rotations are done in float32 and rounded
once, and the residual stream stays float32, so that bfloat16 results are closer to float32 than
transformers' own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Gemma3TextModel
from transformers.models.gemma3.modeling_gemma3 import (
    Gemma3DecoderLayer,
    Gemma3RMSNorm,
    Gemma3RotaryEmbedding,
)

from gemma_serve.gemma.attention.base import StepAttention
from gemma_serve.gemma.dummy import Gemma3Model
from gemma_serve.gemma.projections import (
    Projection,
    activation_dtype,
    feed_forward,
    output_projection,
    projection,
)


@dataclass(frozen=True, slots=True)
class _Rotation:
    """Rotary embedding of the step's positions: ``[num_tokens, 1, head_dim]`` float32 each.

    ``signed_sin`` is negative in its first half, so that halves only have to be swapped.
    """

    cos: Tensor
    signed_sin: Tensor

    @classmethod
    def of(cls, rotary: Gemma3RotaryEmbedding, positions: Tensor, layer_type: str) -> "_Rotation":
        cos, sin = rotary(positions.float(), positions[None], layer_type)
        half = sin.shape[-1] // 2
        signed_sin = torch.cat((-sin[0, :, :half], sin[0, :, half:]), dim=-1)
        return cls(cos[0].unsqueeze(1), signed_sin.unsqueeze(1))

    def to(self, device: torch.device) -> "_Rotation":
        return _Rotation(self.cos.to(device), self.signed_sin.to(device))

    def apply(self, heads: Tensor) -> Tensor:
        """Rotate ``[num_tokens, num_heads, head_dim]``."""
        swapped = heads.roll(heads.shape[-1] // 2, -1)
        return torch.addcmul(heads * self.cos, swapped, self.signed_sin)


class Decoder:
    """The layers of one model, on their devices, and its head.

    Takes the weights over (``projections``), so there is one of it for each model.
    """

    def __init__(self, model: Gemma3Model) -> None:
        text_model: Gemma3TextModel = model.get_decoder()
        config = text_model.config
        self._rotary = text_model.rotary_emb
        self._layers = [_Layer(layer, index) for index, layer in enumerate(text_model.layers)]
        self._layer_types: Sequence[str] = config.layer_types
        self._norm = _Norm.of(text_model.norm)
        self._head = output_projection(model.lm_head)
        self._dtype = _activation_dtype(text_model.norm)

    def forward(self, embeddings: Tensor, positions: Tensor, attention: StepAttention) -> Tensor:
        """Hidden states before the final norm, ``[num_tokens, hidden_size]`` float32.

        ``embeddings``: ``[num_tokens, hidden_size]``. ``positions``: ``[num_tokens]`` int64.
        """
        hidden = embeddings.float()
        rotations = {
            layer_type: _Rotation.of(self._rotary, positions, layer_type)
            for layer_type in set(self._layer_types)
        }
        device = hidden.device
        for layer, layer_type in zip(self._layers, self._layer_types, strict=True):
            if layer.device != device:
                device = layer.device
                hidden = hidden.to(device)
                rotations = {name: rotation.to(device) for name, rotation in rotations.items()}
            layer.add_to(hidden, rotations[layer_type], attention)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """``[num_rows, vocab_size]`` of some rows of what ``forward`` gave."""
        return self._head(self._norm(hidden).to(self._dtype))


class _Norm:
    """Root mean square norm whose weight counts from one (Zhang and Sennrich 2019; Gemma)."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight
        self._eps = eps

    @classmethod
    def of(cls, norm: Gemma3RMSNorm) -> "_Norm":
        return cls(1.0 + norm.weight.float(), norm.eps)

    def __call__(self, hidden: Tensor) -> Tensor:
        return functional.rms_norm(hidden, self.weight.shape, self.weight, self._eps)


def _activation_dtype(norm: Gemma3RMSNorm) -> torch.dtype:
    return activation_dtype(norm.weight.dtype, norm.weight.device)


class _HeadNorms:
    """The norms of queries and keys, which stand side by side, at once."""

    def __init__(
        self, q_norm: Gemma3RMSNorm, k_norm: Gemma3RMSNorm, *, num_heads: int, num_kv_heads: int
    ) -> None:
        queries = (1.0 + q_norm.weight.float()).expand(num_heads, -1)
        keys = (1.0 + k_norm.weight.float()).expand(num_kv_heads, -1)
        self._weight = torch.cat((queries, keys))  # [num_heads + num_kv_heads, head_dim]
        self._eps = q_norm.eps

    def __call__(self, heads: Tensor) -> Tensor:
        return functional.rms_norm(heads, heads.shape[-1:], None, self._eps).mul_(self._weight)


class _Layer:
    def __init__(self, layer: Gemma3DecoderLayer, index: int) -> None:
        attention = layer.self_attn
        config = layer.config
        self.device = layer.input_layernorm.weight.device
        self._index = index
        self._num_heads = config.num_attention_heads
        self._num_kv_heads = config.num_key_value_heads
        self._head_dim = attention.head_dim
        self._scale = attention.scaling
        self._dtype = _activation_dtype(layer.input_layernorm)
        self._before_attention = _Norm.of(layer.input_layernorm)
        self._after_attention = _Norm.of(layer.post_attention_layernorm)
        self._before_feed_forward = _Norm.of(layer.pre_feedforward_layernorm)
        self._after_feed_forward = _Norm.of(layer.post_feedforward_layernorm)
        self._head_norms = _HeadNorms(
            attention.q_norm,
            attention.k_norm,
            num_heads=self._num_heads,
            num_kv_heads=self._num_kv_heads,
        )
        self._qkv = projection(attention.q_proj, attention.k_proj, attention.v_proj)
        self._output = projection(attention.o_proj)
        self._feed_forward: Projection = feed_forward(layer.mlp)

    def add_to(self, hidden: Tensor, rotation: _Rotation, attention: StepAttention) -> None:
        """Add what the layer finds to ``hidden``, ``[num_tokens, hidden_size]`` float32."""
        attended = self._attend(self._before_attention(hidden), rotation, attention)
        hidden += self._after_attention(self._output(attended).float())
        fed_forward = self._feed_forward(self._before_feed_forward(hidden).to(self._dtype))
        hidden += self._after_feed_forward(fed_forward.float())

    def _attend(self, hidden: Tensor, rotation: _Rotation, attention: StepAttention) -> Tensor:
        """``[num_tokens, num_heads * head_dim]``."""
        qkv = self._qkv(hidden.to(self._dtype))
        heads = qkv.view(len(hidden), -1, self._head_dim)
        num_rotated = self._num_heads + self._num_kv_heads
        rotated = rotation.apply(self._head_norms(heads[:, :num_rotated].float()))
        sizes = [self._num_heads, self._num_kv_heads]
        query, key = torch.split(rotated.to(self._dtype), sizes, dim=1)
        value = heads[:, num_rotated:]
        return attention.attend(self._index, query, key, value, self._scale).flatten(1)
