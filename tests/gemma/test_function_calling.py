import pytest

from gemma_serve.gemma.checkpoints import DummySize
from gemma_serve.gemma.dummy import dummy_config
from gemma_serve.gemma.function_calling import calls_tools
from gemma_serve.gemma.synthetic_tokenizer import synthetic_tokenizer


@pytest.mark.parametrize(
    ("size", "expected"),
    [("270m", False), ("1b", False), ("4b", True), ("12b", True), ("27b", True)],
)
def test_models_from_4b_on_can_call_functions(size: DummySize, expected: bool) -> None:
    tokenizer = synthetic_tokenizer(vocab_size=512, boi_token_id=509, eoi_token_id=510)
    assert calls_tools(dummy_config(size), tokenizer) is expected
