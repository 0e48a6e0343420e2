"""Which checkpoints can call functions, and the tokens that some of them have for it."""

from typing import Final

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from gemma_serve.messages import ToolForm
from gemma_serve.tool_calling.function_gemma import END, ESCAPE, START
from gemma_serve.tool_calling.function_gemma_prompt import (
    END_DECLARATION,
    END_RESPONSE,
    START_DECLARATION,
    START_RESPONSE,
)

_MIN_HIDDEN_SIZE: Final = 2560
"""That of 4B. 270M and 1B do not follow the instructions for calling functions."""

WRITTEN_TOKENS: Final = frozenset({START, END, ESCAPE})
"""What calls are made of: text to whoever reads the answer, special or not to the tokenizer."""
UNWRITTEN_TOKENS: Final = frozenset(
    {START_DECLARATION, END_DECLARATION, START_RESPONSE, END_RESPONSE}
)
"""The prompt's own."""
END_OF_CALLS: Final = START_RESPONSE
"""With it the model asks for the results of its calls: the answer is over."""


def calls_tools(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the model can call functions that a prompt explains to it."""
    hidden_size: int = config.get_text_config().hidden_size
    return hidden_size >= _MIN_HIDDEN_SIZE or tool_form(tokenizer) is not None


def tool_form(tokenizer: PreTrainedTokenizerBase) -> ToolForm | None:
    """As ``ModelDescription.tool_form``: FunctionGemma is told by its vocabulary."""
    return "function_gemma" if tool_tokens(tokenizer) else None


def tool_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """The tokens for calls that a vocabulary has: all of them, or none."""
    tokens = WRITTEN_TOKENS | UNWRITTEN_TOKENS
    return tokens if tokens <= tokenizer.get_vocab().keys() else frozenset()
