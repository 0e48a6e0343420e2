"""Gemma 3's decoder layers over packed tokens, in as few operations as torch allows.

The weights, their loading and the rotary frequencies are transformers'; what is computed is what
``Gemma3TextModel.forward`` computes (``docs/decisions/decoder.md`` says why it is written again).
Queries, keys and values come from one product, norms and rotations are done in float32 and rounded
once, and the residual stream stays float32, so that bfloat16 results are closer to float32 than
transformers' own.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Gemma3TextModel
from transformers.models.gemma3.modeling_gemma3 import (
    Gemma3DecoderLayer,
    Gemma3RMSNorm,
)

from gemma_serve.gemma.attention.base import StepAttention
from gemma_serve.gemma.dummy import Gemma3Model
from gemma_serve.gemma.launching import Kernels
from gemma_serve.gemma.norms import Norm, Rotation, norm_classes
from gemma_serve.gemma.projections import (
    Projection,
    activation_dtype,
    feed_forward,
    output_projection,
    projection,
)


class Decoder:
    """The layers of one model, on their devices, and its head.

    Takes the weights over (``projections``), so there is one of it for each model.
    """

    def __init__(self, model: Gemma3Model, kernels: Kernels = "torch") -> None:
        text_model: Gemma3TextModel = model.get_decoder()
        config = text_model.config
        self._rotary = text_model.rotary_emb
        self._layers = [
            _Layer(layer, index, kernels) for index, layer in enumerate(text_model.layers)
        ]
        self._layer_types: Sequence[str] = config.layer_types
        self._norm = Norm(text_model.norm)
        self._head = output_projection(model.lm_head, kernels)
        self._dtype = _activation_dtype(text_model.norm)

    def forward(self, embeddings: Tensor, positions: Tensor, attention: StepAttention) -> Tensor:
        """Hidden states before the final norm, ``[num_tokens, hidden_size]`` float32.

        ``embeddings``: ``[num_tokens, hidden_size]``. ``positions``: ``[num_tokens]`` int64.
        """
        hidden = embeddings.float()
        rotations = {
            layer_type: Rotation.of(self._rotary, positions, layer_type)
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
        return self._head(self._norm(hidden, self._dtype))


def _activation_dtype(norm: Gemma3RMSNorm) -> torch.dtype:
    return activation_dtype(norm.weight.dtype, norm.weight.device)


class _Layer:
    def __init__(self, layer: Gemma3DecoderLayer, index: int, kernels: Kernels) -> None:
        norm, head_norms = norm_classes(kernels)
        attention = layer.self_attn
        config = layer.config
        self.device = layer.input_layernorm.weight.device
        self._index = index
        self._num_heads = config.num_attention_heads
        self._num_kv_heads = config.num_key_value_heads
        self._head_dim = attention.head_dim
        self._scale = attention.scaling
        self._dtype = _activation_dtype(layer.input_layernorm)
        self._before_attention = norm(layer.input_layernorm)
        self._after_attention = norm(layer.post_attention_layernorm)
        self._before_feed_forward = norm(layer.pre_feedforward_layernorm)
        self._after_feed_forward = norm(layer.post_feedforward_layernorm)
        self._head_norms = head_norms(
            attention.q_norm,
            attention.k_norm,
            num_heads=self._num_heads,
            num_kv_heads=self._num_kv_heads,
        )
        self._qkv = projection(
            attention.q_proj, attention.k_proj, attention.v_proj, kernels=kernels
        )
        self._output = projection(attention.o_proj, kernels=kernels)
        self._feed_forward: Projection = feed_forward(layer.mlp, kernels)

    def add_to(self, hidden: Tensor, rotation: Rotation, attention: StepAttention) -> None:
        """Add what the layer finds to ``hidden``, ``[num_tokens, hidden_size]`` float32."""
        attended = self._attend(self._before_attention(hidden, self._dtype), rotation, attention)
        normed = self._after_attention.add_and_norm(
            hidden, self._output(attended), self._before_feed_forward, self._dtype
        )
        self._after_feed_forward.add(hidden, self._feed_forward(normed))

    def _attend(self, normed: Tensor, rotation: Rotation, attention: StepAttention) -> Tensor:
        """``[num_tokens, num_heads * head_dim]``."""
        heads = self._qkv(normed).view(normed.shape[0], -1, self._head_dim)
        rotated = self._head_norms(heads, rotation, self._dtype)
        query, key = rotated[:, : self._num_heads], rotated[:, self._num_heads :]
        value = heads[:, self._num_heads + self._num_kv_heads :]
        return attention.attend(self._index, query, key, value, self._scale).flatten(1)
