from gemma_serve.gemma.forbidden_tokens import forbidden_token_ids
from tests.tiny import (
    BOI_TOKEN_ID,
    EOI_TOKEN_ID,
    IMAGE_TOKEN_ID,
    NUM_EMBEDDING_ROWS,
    tiny_tokenizer,
)


def test_prompt_markers_and_rows_without_a_token_are_forbidden_and_ends_of_turn_are_not() -> None:
    forbidden = forbidden_token_ids(tiny_tokenizer(vision=True), NUM_EMBEDDING_ROWS)
    padding = range(IMAGE_TOKEN_ID + 1, NUM_EMBEDDING_ROWS)
    assert forbidden == [0, 2, 3, 4, BOI_TOKEN_ID, EOI_TOKEN_ID, IMAGE_TOKEN_ID, *padding]
