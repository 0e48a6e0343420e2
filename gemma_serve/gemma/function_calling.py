"""Which checkpoints can call functions."""

from typing import Final

from transformers import PreTrainedConfig

_MIN_HIDDEN_SIZE: Final = 2560
"""That of 4B. 270M and 1B do not follow the instructions for calling functions."""


def calls_tools(config: PreTrainedConfig) -> bool:
    """Whether the model can call functions that a prompt explains to it."""
    hidden_size: int = config.get_text_config().hidden_size
    return hidden_size >= _MIN_HIDDEN_SIZE
