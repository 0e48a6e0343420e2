"""A tokenizer with Gemma's ids for everything special, and bytes for all other text.

Dummy models and tests use it where no real vocabulary is at hand. One byte of text is one token,
but for spaces, runs of newlines and the special tokens.
"""

from tokenizers import AddedToken
from transformers import GemmaTokenizer, PreTrainedTokenizerBase

from gemma_serve.gemma.chat_templates import GEMMA_CHAT_TEMPLATE

_LEADING_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "[multimodal]")
_START_OF_TURN_ID = 105
_END_OF_TURN_ID = 106
_FIRST_NEWLINES_ID = 107
_MAX_NEWLINES = 31
_FIRST_BYTE_ID = 238
_SPACE_ID = 494
MIN_VOCAB_SIZE = _SPACE_ID + 1


def synthetic_tokenizer(
    *,
    vocab_size: int = 262_144,
    boi_token_id: int = 255_999,
    eoi_token_id: int = 256_000,
    image_token_id: int | None = None,
) -> PreTrainedTokenizerBase:
    """Build one for a model with ``vocab_size`` text tokens.

    ``image_token_id``: where ``<image_soft_token>`` stands; ``None`` for a text-only model, whose
    vocabulary has the other image tokens but not this one.
    """
    vocab = _vocabulary(vocab_size, boi_token_id, eoi_token_id)
    control_tokens = [*_LEADING_TOKENS, "<start_of_turn>", "<end_of_turn>"]
    control_tokens += ["<start_of_image>", "<end_of_image>"]
    image_tokens = {}
    if image_token_id is not None:
        vocab["<image_soft_token>"] = image_token_id
        control_tokens.append("<image_soft_token>")
        image_tokens = {
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        }
    tokenizer = GemmaTokenizer(
        vocab=vocab,
        merges=[],
        add_bos_token=True,
        clean_up_tokenization_spaces=False,
        extra_special_tokens=image_tokens,
    )
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in control_tokens],
        special_tokens=True,
    )
    tokenizer.add_tokens(
        [AddedToken("\n" * n, normalized=False) for n in range(1, _MAX_NEWLINES + 1)]
    )
    tokenizer.chat_template = GEMMA_CHAT_TEMPLATE
    return tokenizer


def _vocabulary(vocab_size: int, boi_token_id: int, eoi_token_id: int) -> dict[str, int]:
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"vocab_size must be at least {MIN_VOCAB_SIZE}, got {vocab_size}")
    tokens = [f"▁w{token_id}" for token_id in range(vocab_size)]
    tokens[: len(_LEADING_TOKENS)] = _LEADING_TOKENS
    tokens[_START_OF_TURN_ID] = "<start_of_turn>"
    tokens[_END_OF_TURN_ID] = "<end_of_turn>"
    for length in range(1, _MAX_NEWLINES + 1):
        tokens[_FIRST_NEWLINES_ID + length - 1] = "\n" * length
    for byte in range(256):
        tokens[_FIRST_BYTE_ID + byte] = f"<0x{byte:02X}>"
    tokens[_SPACE_ID] = "▁"
    tokens[boi_token_id] = "<start_of_image>"
    tokens[eoi_token_id] = "<end_of_image>"
    return {token: token_id for token_id, token in enumerate(tokens)}
