"""Keeps the end of prompts that are longer than a client wants to pay for."""

from dataclasses import replace

from gemma_serve.engine.sequence import PromptInputs
from gemma_serve.errors import InvalidRequestError


def truncate(inputs: PromptInputs, num_tokens: int) -> PromptInputs:
    """The last ``num_tokens`` tokens of a prompt, and the images among them.

    Raises ``InvalidRequestError`` if that would cut an image.
    """
    num_dropped = max(0, len(inputs.token_ids) - num_tokens)
    kept = [image for image in inputs.images if image.end > num_dropped]
    if any(image.start < num_dropped for image in kept):
        raise InvalidRequestError(
            f"truncate_prompt_tokens is {num_tokens}, which would cut an image",
            param="truncate_prompt_tokens",
        )
    images = tuple(replace(image, start=image.start - num_dropped) for image in kept)
    return PromptInputs(inputs.token_ids[num_dropped:], images)
