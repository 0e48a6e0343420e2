"""Calls in answers."""

import json
import re

import pytest
from httpx import Response

from gemma_serve.generation import (
    FinishReason,
    GenerationDelta,
    SampledLogprobs,
    TokenLogprob,
)
from gemma_serve.openai_api.response_schemas import ChatCompletionChunk
from tests.fakes import FakeGenerationClient, answer, delta
from tests.openai_api.harness import make_app, post_chat
from tests.openai_api.tools import ANSWER_FORMAT, CALL, TIME, TOOLS, allowed


async def called(*texts: str, **fields: object) -> Response:
    """The answer to a request with ``TOOLS`` when the model writes ``texts``."""
    response = await post_chat(
        make_app(FakeGenerationClient(*answer(*texts))), **{"tools": TOOLS, **fields}
    )
    assert response.status_code == 200, response.text
    return response


def choices_of(response: Response) -> list[dict[str, object]]:
    """The one choice of every chunk, each checked against its documented model."""
    *events, done = response.text.removesuffix("\n\n").split("\n\n")
    assert done == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk)
    return [chunk["choices"][0] for chunk in chunks]


async def test_whole_answer_with_a_call_has_every_field_of_the_contract() -> None:
    (choice,) = (await called(CALL[:20], CALL[20:])).json()["choices"]
    call_id = choice["message"]["tool_calls"][0].pop("id")
    assert re.fullmatch(r"call_[0-9a-f]{24}", call_id)
    assert choice == {
        "index": 0,
        "message": {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "annotations": [],
            "tool_calls": [
                {
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
                }
            ],
        },
        "logprobs": None,
        "finish_reason": "tool_calls",
    }


async def test_text_beside_a_call_is_the_content() -> None:
    (choice,) = (await called("One moment. ", CALL)).json()["choices"]
    assert choice["message"]["content"] == "One moment. "
    assert len(choice["message"]["tool_calls"]) == 1


async def test_answer_without_a_call_has_no_key_for_calls() -> None:
    (choice,) = (await called("[1, ", "2]")).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("[1, 2]", "stop")
    assert "tool_calls" not in choice["message"]


async def test_stream_of_a_call_is_its_name_and_then_pieces_of_its_arguments() -> None:
    pieces = ["Wait.", ' {"name": "get_', 'weather", "parameters": {', '"city": "Paris"}', "}"]
    _, *choices, last = choices_of(await called(*pieces, stream=True))
    call_id = choices[2]["delta"]["tool_calls"][0].pop("id")  # type: ignore[index]  # JSON
    assert re.fullmatch(r"call_[0-9a-f]{24}", call_id)
    assert [choice["delta"] for choice in choices] == [
        {"content": "Wait."},
        {"content": " "},
        {
            "tool_calls": [
                {
                    "index": 0,
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": ""},
                }
            ]
        },
        {"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '"city": "Paris"}'}}]},
    ]
    assert (last["delta"], last["finish_reason"]) == ({}, "tool_calls")


async def test_stream_that_begins_with_a_call_has_no_content_and_one_of_text_does() -> None:
    """Clients take an empty content for the start of a text."""
    for fields in ({}, {"tool_choice": "required"}, {"response_format": ANSWER_FORMAT}):
        role, call, *_ = choices_of(await called(CALL[:30], CALL[30:], stream=True, **fields))
        assert role["delta"] == {"role": "assistant", "content": None, "refusal": None}
        assert "tool_calls" in call["delta"]  # type: ignore[operator]  # JSON
    role, text, *_ = choices_of(await called("Sunny.", stream=True))
    assert role["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert text["delta"] == {"content": "Sunny."}


@pytest.mark.parametrize("stream", [False, True])
async def test_answer_in_its_format_is_text_whatever_it_holds(stream: bool) -> None:
    text = f'{{"calls": [{CALL}]}}'
    fields = {"tools": TOOLS, "response_format": {"type": "json_object"}, "stream": stream}
    response = await post_chat(make_app(FakeGenerationClient(*answer(*text))), **fields)
    if stream:
        deltas = [choice["delta"] for choice in choices_of(response)]
        assert "".join(delta.get("content", "") for delta in deltas) == text  # type: ignore[attr-defined]  # JSON
    else:
        assert response.json()["choices"][0]["message"]["content"] == text


async def test_text_that_was_held_back_comes_before_the_finish_reason() -> None:
    _, *choices, last = choices_of(await called('{"name": "get_time"', stream=True))
    assert [choice["delta"] for choice in choices] == [{"content": '{"name": "get_time"'}]
    assert (last["delta"], last["finish_reason"]) == ({}, "stop")


@pytest.mark.parametrize("stream", [False, True])
async def test_call_that_a_limit_cuts_off_ends_with_length(stream: bool) -> None:
    client = FakeGenerationClient(*answer(CALL[:-5], finish_reason=FinishReason.LENGTH))
    response = await post_chat(make_app(client), tools=TOOLS, stream=stream)
    choice = choices_of(response)[-1] if stream else response.json()["choices"][0]
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize("text", ["", "{", '{"name": "get_wea', '[{"name": "get_weather", '])
@pytest.mark.parametrize("stream", [False, True])
async def test_certain_call_that_a_limit_cuts_off_before_it_begins_is_no_text(
    text: str, stream: bool
) -> None:
    client = FakeGenerationClient(*answer(text, finish_reason=FinishReason.LENGTH))
    fields = {"tools": TOOLS, "tool_choice": "required", "stream": stream}
    response = await post_chat(make_app(client), **fields)
    if stream:
        _, *choices = choices_of(response)
        assert [(c["delta"], c["finish_reason"]) for c in choices] == [({}, "length")]
    else:
        (choice,) = response.json()["choices"]
        assert (choice["finish_reason"], choice["message"]["content"]) == ("length", "")
        assert "tool_calls" not in choice["message"]


async def test_only_one_call_without_parallel_calls() -> None:
    response = await called(f"[{CALL}, {CALL}]", parallel_tool_calls=False)
    (choice,) = response.json()["choices"]
    assert len(choice["message"]["tool_calls"]) == 1
    assert choice["finish_reason"] == "tool_calls"


async def test_call_of_a_function_that_is_not_allowed_is_text() -> None:
    (choice,) = (await called(CALL, tool_choice=allowed("auto", TIME))).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (CALL, "stop")


async def test_without_a_choice_of_tools_what_looks_like_a_call_is_text() -> None:
    (choice,) = (await called(CALL, tool_choice="none")).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (CALL, "stop")


async def test_choices_call_apart() -> None:
    step = [
        delta(CALL, FinishReason.STOP),
        delta("Sunny.", FinishReason.STOP, index=1),
        delta(CALL[:9], index=2),
    ]
    client = FakeGenerationClient(step, [delta(CALL[9:], FinishReason.STOP, index=2)])
    response = await post_chat(make_app(client), tools=TOOLS, n=3)
    choices = response.json()["choices"]
    assert [choice["finish_reason"] for choice in choices] == ["tool_calls", "stop", "tool_calls"]
    ids = [choices[index]["message"]["tool_calls"][0]["id"] for index in (0, 2)]
    assert ids[0] != ids[1]


def spelled(*texts: str) -> list[list[GenerationDelta]]:
    """A step for each text, a token of which is a character, and one for the end of the turn."""
    steps = [
        [
            GenerationDelta(
                0,
                text,
                tuple(text.encode()),
                logprobs=tuple(
                    SampledLogprobs(TokenLogprob(i, -1.0, bytes([i])), ()) for i in text.encode()
                ),
            )
        ]
        for text in texts
    ]
    end = SampledLogprobs(TokenLogprob(1, -1.0, b""), ())
    return [*steps, [GenerationDelta(0, "", (1,), FinishReason.STOP, logprobs=(end,))]]


@pytest.mark.parametrize("size", [1, 3, 1000])
async def test_no_logprob_and_no_token_id_is_lost_while_text_is_held_back(size: int) -> None:
    text = f"Wait. {CALL} {{1}} [{CALL}]"
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    app = make_app(FakeGenerationClient(*spelled(*pieces)))
    fields = {"tools": TOOLS, "logprobs": True, "return_token_ids": True}
    (whole,) = (await post_chat(app, **fields)).json()["choices"]
    assert "".join(entry["token"] for entry in whole["logprobs"]["content"]) == text
    assert whole["token_ids"] == [*text.encode(), 1]
    streamed = choices_of(await post_chat(app, **fields, stream=True))
    entries = [e for c in streamed if c["logprobs"] for e in c["logprobs"]["content"]]  # type: ignore[index]  # JSON
    assert entries == whole["logprobs"]["content"]
    assert [i for c in streamed for i in c.get("token_ids") or ()] == whole["token_ids"]  # type: ignore[attr-defined]  # JSON
