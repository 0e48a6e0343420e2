"""Leaving out the beginning of a chat that does not fit the model's context."""

from dataclasses import replace

from gemma_serve.errors import ContextLengthError
from gemma_serve.generation import ChatPrompt, GenerationClient
from gemma_serve.messages import Role


async def shortened(client: GenerationClient, prompt: ChatPrompt) -> ChatPrompt | None:
    """``prompt`` without as few of its first turns as it takes; ``None``: nothing helps.

    What the system says stays. A chat goes on with something that a user says, so that no result
    stands without its call. Each try costs the model's side a tokenization, so there are few.
    """
    max_model_len = (await client.describe()).max_model_len
    starts = [i for i, message in enumerate(prompt.messages) if message.role is Role.USER][1:]
    low, high = 0, len(starts)
    while low < high:
        middle = (low + high) // 2
        if await _fits(client, _from(prompt, starts[middle]), max_model_len):
            high = middle
        else:
            low = middle + 1
    return _from(prompt, starts[low]) if low < len(starts) else None


async def _fits(client: GenerationClient, prompt: ChatPrompt, max_model_len: int) -> bool:
    try:
        return len(await client.tokenize(prompt)) < max_model_len
    except ContextLengthError:  # far too long to be counted
        return False


def _from(prompt: ChatPrompt, start: int) -> ChatPrompt:
    messages = prompt.messages
    instructions = [m for m in messages[:start] if m.role is Role.SYSTEM]
    return replace(prompt, messages=(*instructions, *messages[start:]))
