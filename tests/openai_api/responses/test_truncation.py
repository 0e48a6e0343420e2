"""Inputs that do not fit the context."""

from collections.abc import Sequence

import pytest

from gemma_serve.errors import ContextLengthError
from gemma_serve.generation import (
    ChatPrompt,
    GenerationRequest,
    GenerationStream,
    Prompt,
    PromptToken,
)
from gemma_serve.messages import Role, TextPart
from tests.fakes import FakeGenerationClient, answer
from tests.openai_api.harness import error_of, make_app, messages_of
from tests.openai_api.responses.harness import post

NUM_TOKENS = 4095
"""All that a prompt may have before an answer of one."""


class NarrowClient(FakeGenerationClient):
    """Reads a thousand tokens in each message, and refuses what leaves no room for an answer."""

    def __init__(self) -> None:
        super().__init__(*answer("Hi"))
        self.num_counts = 0

    async def tokenize(self, prompt: Prompt) -> tuple[PromptToken, ...]:
        self.num_counts += 1
        num_tokens = _num_tokens(prompt)
        if num_tokens > 4 * NUM_TOKENS:
            raise ContextLengthError.of(prompt_tokens=num_tokens, max_model_len=4096)
        return (PromptToken(5, b"x"),) * num_tokens

    async def generate(self, request: GenerationRequest) -> GenerationStream:
        num_tokens = _num_tokens(request.prompt)
        if num_tokens > NUM_TOKENS:
            raise ContextLengthError.of(prompt_tokens=num_tokens, max_model_len=4096)
        return await super().generate(request)


def _num_tokens(prompt: Prompt) -> int:
    assert isinstance(prompt, ChatPrompt)
    return 1000 * len(prompt.messages)


def chat(*roles: str) -> list[dict[str, object]]:
    """Messages that are called by their number."""
    items: list[dict[str, object]] = []
    for number, role in enumerate(roles):
        if role == "call":
            items.append({"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"})
        elif role == "result":
            items.append({"type": "function_call_output", "call_id": "c", "output": str(number)})
        else:
            items.append({"role": role, "content": str(number)})
    return items


def numbers(client: FakeGenerationClient) -> list[str]:
    """What the messages are called that the model was asked to answer."""
    parts: Sequence[object] = [m.parts[0] for m in messages_of(client.requests[0]) if m.parts]
    return [part.text for part in parts if isinstance(part, TextPart)]


TURNS = ("user", "assistant") * 20


@pytest.mark.parametrize(
    ("roles", "kept"),
    [
        (("user", "assistant", "user"), ["0", "1", "2"]),
        (("user", "assistant", "user", "assistant", "user"), ["2", "3", "4"]),
        ((*TURNS, "user"), ["38", "39", "40"]),
        (("system", *TURNS, "user"), ["0", "39", "40", "41"]),
        (("user", "call", "result", "assistant", "user"), ["4"]),
        (("user", "user", "call", "result"), ["0", "1", "3"]),
        (("user", "user", "user", "call", "result"), ["1", "2", "4"]),
    ],
)
async def test_as_few_first_turns_as_it_takes_are_left_out(
    roles: Sequence[str], kept: list[str]
) -> None:
    client = NarrowClient()
    response = await post(make_app(client), chat(*roles), truncation="auto")
    assert response.status_code == 200, response.text
    assert response.json()["truncation"] == "auto"
    assert numbers(client) == kept
    assert client.num_counts <= 6


async def test_instructions_stay_and_the_stored_chat_is_whole() -> None:
    client = NarrowClient()
    app = make_app(client)
    first = await post(app, chat(*TURNS, "user"), truncation="auto", instructions="Be kind.")
    assert messages_of(client.requests[0])[0].role is Role.SYSTEM
    assert numbers(client) == ["Be kind.", "38", "39", "40"]
    second = await post(app, "So?", previous_response_id=first.json()["id"])
    assert (second.status_code, error_of(second)["param"]) == (400, "input")


@pytest.mark.parametrize("truncation", ["disabled", None])
async def test_too_long_an_input_is_a_400_without_truncation(truncation: str | None) -> None:
    client = NarrowClient()
    response = await post(make_app(client), chat(*TURNS, "user"), truncation=truncation)
    assert (response.status_code, error_of(response)["code"]) == (400, "context_length_exceeded")
    assert client.num_counts == 0


async def test_last_turn_that_is_too_long_by_itself_is_a_400() -> None:
    client = NarrowClient()
    roles = ("user", "user", *("assistant",) * 5)
    response = await post(make_app(client), chat(*roles), truncation="auto")
    assert (response.status_code, error_of(response)["code"]) == (400, "context_length_exceeded")
