"""Responses, whole and streamed, stored and continued."""

import json
import re

import pytest

from gemma_serve.errors import (
    ContextLengthError,
    GenerationError,
    InvalidRequestError,
    OutputConstraintError,
)
from gemma_serve.generation import ChatPrompt, FinishReason, OutputConstraint
from gemma_serve.messages import ChatMessage, Role, TextPart, ToolCall
from tests.fakes import VISION_MODEL, FakeGenerationClient, FakeImageLoader, answer, delta, image_of
from tests.openai_api.harness import MODEL, connect, error_of, make_app, messages_of
from tests.openai_api.responses.harness import RESPONSES, events_of, post, requested, said


async def test_whole_answer_has_every_field_of_the_contract() -> None:
    client = FakeGenerationClient(*answer("Hel", "lo"))
    body = (await post(make_app(client), metadata={"a": "b"}, instructions="Be kind.")).json()
    assert re.fullmatch(r"resp_[0-9a-f]{32}", body.pop("id"))
    assert body.pop("completed_at") >= body.pop("created_at") > 0
    (message,) = body.pop("output")
    assert re.fullmatch(r"msg_[0-9a-f]{32}", message.pop("id"))
    assert message == {
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}],
    }
    assert body == {
        "object": "response",
        "status": "completed",
        "error": None,
        "incomplete_details": None,
        "instructions": "Be kind.",
        "model": MODEL,
        "previous_response_id": None,
        "parallel_tool_calls": True,
        "tools": [],
        "tool_choice": "auto",
        "temperature": 0.8,
        "top_p": 0.95,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "top_logprobs": 0,
        "max_output_tokens": None,
        "max_tool_calls": None,
        "reasoning": {"effort": None, "summary": None},
        "text": {"format": {"type": "text"}},
        "truncation": "disabled",
        "store": True,
        "background": False,
        "service_tier": "default",
        "metadata": {"a": "b"},
        "safety_identifier": None,
        "prompt_cache_key": None,
        "usage": {
            "input_tokens": 7,
            "input_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 0},
            "output_tokens": 3,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 10,
        },
    }
    assert len(client.closed) == 1


async def test_answer_that_reached_the_limit_is_incomplete() -> None:
    script = answer("Hel", finish_reason=FinishReason.LENGTH)
    body = (await post(make_app(FakeGenerationClient(*script)), max_output_tokens=1)).json()
    assert (body["status"], body["incomplete_details"], body["completed_at"]) == (
        "incomplete",
        {"reason": "max_output_tokens"},
        None,
    )
    assert body["output"][0]["status"] == "incomplete"


async def test_stream_is_these_events_in_this_order() -> None:
    client = FakeGenerationClient(*answer("Hel", "", "lo"))
    response = await post(make_app(client), stream=True)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = events_of(response)
    assert [event["type"] for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert events[0]["response"]["status"] == "in_progress"
    assert events[2]["item"]["content"] == []
    assert [events[4]["delta"], events[5]["delta"], events[6]["text"]] == ["Hel", "lo", "Hello"]
    whole = events[-1]["response"]
    assert events[-2]["item"] == whole["output"][0]
    assert events[-3]["part"] == whole["output"][0]["content"][0]
    assert len({event["item_id"] for event in events if "item_id" in event}) == 1
    assert len(client.closed) == 1


async def test_streamed_answer_that_reached_the_limit_ends_as_incomplete() -> None:
    script = answer("Hel", finish_reason=FinishReason.LENGTH)
    events = events_of(await post(make_app(FakeGenerationClient(*script)), stream=True))
    assert events[-1]["type"] == "response.incomplete"


async def test_error_in_the_middle_of_a_stream_is_told_and_fails_the_response() -> None:
    client = FakeGenerationClient([delta("Hel")], GenerationError("The engine failed."))
    error, failed = events_of(await post(make_app(client), stream=True))[-2:]
    assert error == {
        "type": "error",
        "sequence_number": 5,
        "code": "server_error",
        "message": "The engine failed.",
        "param": None,
    }
    assert failed["type"] == "response.failed"
    assert failed["response"]["error"] == {
        "code": "server_error",
        "message": "The engine failed.",
    }
    assert len(client.closed) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_error_at_admission_is_a_real_status_with_the_clients_own_names(stream: bool) -> None:
    error = ContextLengthError.of(prompt_tokens=9, max_model_len=8)
    response = await post(make_app(FakeGenerationClient(generate_error=error)), stream=stream)
    assert response.status_code == 400
    assert (error_of(response)["param"], error_of(response)["code"]) == (
        "input",
        "context_length_exceeded",
    )


async def test_every_kind_of_item_becomes_a_message() -> None:
    request = await requested(
        [
            {"role": "developer", "content": "Be kind."},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
            {"type": "reasoning", "id": "rs_1", "summary": []},
            {
                "id": "msg_1",
                "type": "message",
                "role": "assistant",
                "status": "completed",
                "content": [
                    {"type": "output_text", "text": "Let me see.", "annotations": []},
                    {"type": "refusal", "refusal": "No."},
                ],
            },
            {"type": "function_call", "call_id": "c1", "name": "get_time", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "12:00"},
        ],
        instructions="Be brief.",
    )
    assert messages_of(request) == (
        said(Role.SYSTEM, "Be brief."),
        said(Role.SYSTEM, "Be kind."),
        said(Role.USER, "Hi"),
        ChatMessage(
            Role.ASSISTANT,
            (TextPart("Let me see."), TextPart("No.")),
            tool_calls=(ToolCall("c1", "get_time", "{}"),),
        ),
        ChatMessage(Role.TOOL, (TextPart("12:00"),), tool_call_id="c1"),
    )


async def test_sampling_fields_reach_the_engine() -> None:
    sampling = (
        await requested(temperature=0, top_p=0.5, max_output_tokens=5, top_k=3, stop="x", seed=1)
    ).sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (0, 0.5, 5)
    assert (sampling.top_k, sampling.stop, sampling.seed) == (3, ("x",), 1)


async def test_fields_of_chats_that_change_the_prompt_reach_the_engine() -> None:
    request = await requested(
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hel"}],
        chat_template_kwargs={"a": 1},
        continue_final_message=False,
        truncate_prompt_tokens=5,
    )
    assert isinstance(request.prompt, ChatPrompt)
    assert request.prompt.template_kwargs == (("a", 1),)
    assert request.prompt.continue_final_message is False
    assert request.truncate_prompt_tokens == 5


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("fields", "constraint"),
    [
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}},
            OutputConstraint(kind="json_schema", value=json.dumps(SCHEMA)),
        ),
        (
            {"text": {"format": {"type": "json_object"}}},
            OutputConstraint(kind="json_object", value=""),
        ),
        ({"text": {"format": {"type": "text"}}}, None),
        ({"guided_regex": "a+"}, OutputConstraint(kind="regex", value="a+")),
        (
            {"response_format": {"type": "json_object"}},
            OutputConstraint(kind="json_object", value=""),
        ),
    ],
)
async def test_format_of_the_answer_reaches_the_engine(
    fields: dict[str, object], constraint: OutputConstraint | None
) -> None:
    assert (await requested(**fields)).output_constraint == constraint


async def test_schema_is_told_again_as_strict_which_it_always_is() -> None:
    text = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}, "verbosity": "low"}
    response = await post(make_app(FakeGenerationClient(*answer("{}"))), text=text)
    assert response.json()["text"] == {
        "format": {
            "type": "json_schema",
            "name": "x",
            "schema": SCHEMA,
            "description": None,
            "strict": True,
        },
        "verbosity": "low",
    }


async def test_format_that_cannot_be_enforced_is_told_by_its_place_in_the_text_field() -> None:
    client = FakeGenerationClient(generate_error=OutputConstraintError("No.", param="properties.a"))
    text = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}
    response = await post(make_app(client), text=text)
    assert response.status_code == 400
    assert error_of(response)["param"] == "text.format.schema.properties.a"


@pytest.mark.parametrize(
    ("asked", "detail"), [("low", "low"), ("original", "high"), (None, "auto")]
)
async def test_image_is_loaded(asked: str | None, detail: str) -> None:
    client = FakeGenerationClient(*answer(), description=VISION_MODEL)
    loader = FakeImageLoader()
    image = {"type": "input_image", "image_url": "https://a/1.png", "detail": asked}
    await post(make_app(client, loader), [{"role": "user", "content": [image]}])
    assert messages_of(client.requests[0])[0].parts == (image_of("https://a/1.png"),)
    assert [call[1] for call in loader.calls] == [detail]


async def test_image_that_cannot_be_loaded_is_told_by_its_place_in_the_input() -> None:
    param = "messages[1].content[0].image_url.url"
    error = InvalidRequestError("The image could not be fetched.", param=param)
    client = FakeGenerationClient(*answer(), description=VISION_MODEL)
    loader = FakeImageLoader({"https://a/1.png": error})
    image = {"type": "input_image", "image_url": "https://a/1.png"}
    response = await post(
        make_app(client, loader), [{"role": "user", "content": [image]}], instructions="Look."
    )
    assert error_of(response)["param"] == "input[0].content[0].image_url"


@pytest.mark.parametrize("stream", [False, True])
async def test_stored_response_is_continued_without_its_instructions(stream: bool) -> None:
    client = FakeGenerationClient(*answer("Hi", "!"))
    app = make_app(client)
    first = await post(app, "Hello", instructions="Be kind.", stream=stream)
    first_id = events_of(first)[0]["response"]["id"] if stream else first.json()["id"]
    second = await post(app, "And?", previous_response_id=first_id, instructions="Be brief.")
    assert second.json()["previous_response_id"] == first_id
    third = await post(app, "So?", previous_response_id=second.json()["id"])
    assert third.status_code == 200
    hello, hi = said(Role.USER, "Hello"), said(Role.ASSISTANT, "Hi!")
    brief, and_, so = (
        said(Role.SYSTEM, "Be brief."),
        said(Role.USER, "And?"),
        said(Role.USER, "So?"),
    )
    assert messages_of(client.requests[1]) == (brief, hello, hi, and_)
    assert messages_of(client.requests[2]) == (hello, hi, and_, hi, so)


async def test_stored_response_can_be_read_and_deleted() -> None:
    app = make_app(FakeGenerationClient(*answer("Hi")))
    made = (await post(app)).json()
    path = f"{RESPONSES}/{made['id']}"
    async with connect(app) as http:
        assert (await http.get(path)).json() == made
        assert (await http.delete(path)).json() == {
            "id": made["id"],
            "object": "response",
            "deleted": True,
        }
        for method in ("GET", "DELETE"):
            gone = await http.request(method, path)
            assert (gone.status_code, error_of(gone)["param"]) == (404, "response_id")


async def test_response_that_is_not_to_be_stored_is_not() -> None:
    app = make_app(FakeGenerationClient(*answer("Hi")))
    made = (await post(app, store=False)).json()
    assert made["store"] is False
    response = await post(app, "And?", previous_response_id=made["id"])
    assert response.status_code == 400
    error = error_of(response)
    assert (error["param"], error["code"]) == (
        "previous_response_id",
        "previous_response_not_found",
    )
