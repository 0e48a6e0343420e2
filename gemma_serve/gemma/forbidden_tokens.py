"""Token ids that a Gemma 3 has rows for but must never say."""

from typing import Final

from transformers import PreTrainedTokenizerBase

_FORBIDDEN_TOKENS: Final = (
    "<pad>",
    "<bos>",
    "<unk>",
    "<mask>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
)


def forbidden_token_ids(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[int]:
    """Markers that only a prompt holds, and the rows of the output head that are no token at all.

    A healthy model gives them next to no probability; sampled even once, they ruin the text.
    """
    vocabulary = tokenizer.get_vocab()
    markers = {vocabulary[token] for token in _FORBIDDEN_TOKENS if token in vocabulary}
    unused_rows = set(range(vocab_size)).difference(vocabulary.values())
    return sorted(markers | unused_rows)
