"""Words that a client does not want to read, as token ids."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


def banned_token_sequences(
    tokenizer: PreTrainedTokenizerBase, words: Sequence[str]
) -> tuple[tuple[int, ...], ...]:
    """How the tokenizer writes ``words``, each at a text's start and after a space.

    The model could still spell a word in other tokens; vLLM's ``bad_words`` means the same.
    """
    spellings = [spelling for word in words for spelling in (word, f" {word}")]
    if not spellings:
        return ()
    encodings: list[list[int]] = tokenizer(spellings, add_special_tokens=False)["input_ids"]
    return tuple(dict.fromkeys(tuple(ids) for ids in encodings if ids))
