"""From a text-only Gemma 3 in GGUF to a checkpoint folder that transformers loads.

The tensors are dequantised once, so the server need not do it at every start, and the configuration
is written from the published shapes: GGUF spells some of its values (``rms_norm_eps``) inexactly
and lacks others (``query_pre_attn_scalar``, rotary scaling), which is why the larger sizes, where
those matter, are refused. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import logging
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken
from torch import Tensor
from transformers import (
    Gemma3TextConfig,
    GemmaTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from gemma_serve.errors import CheckpointError
from gemma_serve.gemma.chat_templates import GEMMA_CHAT_TEMPLATE
from gemma_serve.gemma.checkpoint_cache import build_once, sha256_of
from gemma_serve.gemma.dummy import dummy_config, dummy_generation_config
from gemma_serve.gemma.progress import Progress

logger = logging.getLogger(__name__)

_FORMAT_VERSION: Final = 1
"""Counts up whenever what is written changes, so that old conversions are not used."""
_SIZE_BY_BLOCK_COUNT: Final = {18: "270m", 26: "1b"}
_SHAPE_FIELDS: Final = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
}
_TENSOR_NAMES: Final = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL, _USER_DEFINED = 3, 4  # gguf's TokenType
_IMAGE_TOKENS: Final = ("<start_of_image>", "<end_of_image>")
_SPACE: Final = "▁"  # SentencePiece's


def gguf_checkpoint(path: Path) -> Path:
    """The folder of the model in ``path``, converted now if a file of that content never was."""
    try:
        digest = sha256_of(path)
    except OSError as error:
        raise CheckpointError(f"model: {path} cannot be read: {error.strerror}") from error
    name = f"{path.stem}-{digest[:16]}-v{_FORMAT_VERSION}"
    return build_once(name, lambda folder: convert_gguf(path, folder))


def convert_gguf(
    path: Path,
    folder: Path,
    *,
    chat_template: str | None = None,
    generation_config: GenerationConfig | None = None,
) -> None:
    """Write the model in ``path`` to ``folder``: bfloat16 safetensors, configuration, tokenizer.

    ``chat_template``, ``generation_config``: in place of the file's own, or Gemma's. Raises
    ``CheckpointError`` for anything but a Gemma 3 270M or 1B.
    """
    reader = _open(path)
    config = _config(reader, path)
    tokenizer = _tokenizer(reader)
    tokenizer.chat_template = (
        chat_template or _field(reader, "tokenizer.chat_template") or GEMMA_CHAT_TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)
    (generation_config or dummy_generation_config()).save_pretrained(folder)
    weights = _weights(reader, path)
    logger.info("writing the weights")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _open(path: Path) -> Any:
    """A ``gguf.GGUFReader``, an untyped class."""
    try:
        from gguf import GGUFReader  # an optional dependency
    except ImportError as error:
        raise CheckpointError(
            f"{path.name} needs the package gguf: pip install 'gemma-serve[demo]'"
        ) from error
    logger.info("reading %s (half a minute: it lists 262144 tokens one by one)", path.name)
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise CheckpointError(f"{path.name} is not a readable GGUF file: {error}") from error


def _field(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _config(reader: Any, path: Path) -> Gemma3TextConfig:
    """The published configuration of the file's size, if the file agrees with it."""
    architecture = _field(reader, "general.architecture")
    if architecture != "gemma3":
        raise CheckpointError(f"{path.name} is not a Gemma 3: its architecture is {architecture!r}")
    num_layers = _field(reader, "gemma3.block_count")
    size = _SIZE_BY_BLOCK_COUNT.get(num_layers)
    if size is None:
        raise CheckpointError(
            f"{path.name} has {num_layers} layers. Only GGUF files of Gemma 3 270M (18) and 1B "
            "(26) can be served: GGUF does not carry the attention scale, rotary scaling and "
            "vision tower of the larger ones. Use the Hub checkpoint instead, such as "
            "google/gemma-3-4b-it"
        )
    config = dummy_config(size)
    for key, name in _SHAPE_FIELDS.items():
        found, expected = _field(reader, f"gemma3.{key}"), getattr(config, name)
        if found != expected:
            raise CheckpointError(
                f"{path.name} is not a Gemma 3 {size}: gemma3.{key} is {found}, not {expected}"
            )
    config.max_position_embeddings = _field(reader, "gemma3.context_length")
    config.architectures = ["Gemma3ForCausalLM"]
    config.dtype = torch.bfloat16
    return config


def _weights(reader: Any, path: Path) -> dict[str, Tensor]:
    from gguf.quants import dequantize

    progress = Progress("dequantising", sum(int(tensor.n_elements) for tensor in reader.tensors))
    weights = {}
    for tensor in reader.tensors:
        name = _weight_name(tensor.name, path)
        values = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        if name.endswith("norm.weight"):
            values = values - 1  # GGUF stores 1 + w, what the norm multiplies by.
        weights[name] = values.to(torch.bfloat16)
        progress.advance(int(tensor.n_elements))
    return weights


def _weight_name(name: str, path: Path) -> str:
    """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``."""
    parts = name.removesuffix(".weight").split(".")
    prefix = f"model.layers.{parts[1]}." if parts[0] == "blk" else ""
    try:
        return f"{prefix}{_TENSOR_NAMES[parts[-1]]}.weight"
    except KeyError:
        raise CheckpointError(f"{path.name} has the tensor {name}, which Gemma 3 has not") from None


def _tokenizer(reader: Any) -> PreTrainedTokenizerBase:
    spelled: list[str] = _field(reader, "tokenizer.ggml.tokens")
    kinds: list[int] = _field(reader, "tokenizer.ggml.token_type")
    # Tokens that are runs of spaces are spelled with real ones, unlike all others.
    tokens = [token.replace(" ", _SPACE) for token in spelled]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = GemmaTokenizer(
        vocab=vocab,
        merges=_merges(vocab),
        add_bos_token=True,
        clean_up_tokenization_spaces=False,
    )
    whole = [
        AddedToken(token, normalized=False, special=kind == _CONTROL or token in _IMAGE_TOKENS)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens([token for token in whole if not token.special])
    tokenizer.add_tokens([token for token in whole if token.special], special_tokens=True)
    return tokenizer


def _merges(vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, in the order in which Gemma learned the tokens.

    That order is that of the ids; the file's scores do not follow it.
    """
    return [
        (token[:cut], token[cut:])
        for token in vocab
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
