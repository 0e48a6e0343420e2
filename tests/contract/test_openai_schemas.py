"""What the server answers is what OpenAI's published description says of it."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import jsonschema
import pytest

from gemma_serve.errors import GenerationError, OverloadedError
from gemma_serve.generation import FinishReason, GenerationDelta, SampledLogprobs, TokenLogprob
from tests.fakes import FakeGenerationClient, Step, answer, delta
from tests.openai_api.harness import CHAT, MODEL, connect, make_app

SCHEMAS = json.loads((Path(__file__).parent / "openai_schemas.json").read_text(encoding="utf-8"))
EVENTS: Mapping[str, str] = {
    schema["properties"]["type"]["enum"][0]: name
    for name, schema in SCHEMAS["$defs"].items()
    if name.endswith("Event")
}

TOP = (TokenLogprob(5, -0.5, b"Hi"), TokenLogprob(106, -1.5, b""))
TOLD: list[Step] = [
    [GenerationDelta(0, "Hi", (5,), logprobs=(SampledLogprobs(TOP[0], TOP),))],
    [GenerationDelta(0, "", (106,), FinishReason.STOP, logprobs=(SampledLogprobs(TOP[1], TOP),))],
]
CALL = 'Yes.\n[{"name": "f", "parameters": {"a": 1}}, {"name": "g"}]'
FUNCTIONS: list[dict[str, object]] = [
    {"name": "f", "parameters": {"type": "object"}, "strict": True},
    {"name": "g"},
]
TOOLS = [{"type": "function", "function": function} for function in FUNCTIONS]
FLAT_TOOLS = [{"type": "function", **function} for function in FUNCTIONS]

Case = tuple[list[Step], dict[str, object]]

CHATS: Mapping[str, Case] = {
    "text": (answer("Hel", "lo"), {}),
    "nothing": (answer(), {}),
    "cut": (answer("Hel", finish_reason=FinishReason.LENGTH), {"max_tokens": 1}),
    "choices": (
        [[delta("a", FinishReason.STOP), delta("b", FinishReason.STOP, index=1)]],
        {"n": 2},
    ),
    "logprobs": (TOLD, {"logprobs": True, "top_logprobs": 2}),
    "calls": (answer(CALL), {"tools": TOOLS}),
}
COMPLETIONS: Mapping[str, Case] = {
    "text": (answer("Hel", "lo"), {}),
    "logprobs": (TOLD, {"logprobs": 2}),
    "prompts": (answer("Hi"), {"prompt": ["a", "b"]}),
}
RESPONSES: Mapping[str, Case] = {
    "text": (answer("Hel", "lo"), {"metadata": {"a": "b"}, "instructions": "Be kind."}),
    "nothing": (answer(), {}),
    "cut": (answer("Hel", finish_reason=FinishReason.LENGTH), {"max_output_tokens": 16}),
    "logprobs": (TOLD, {"include": ["message.output_text.logprobs"], "top_logprobs": 2}),
    "calls": (answer(CALL), {"tools": FLAT_TOOLS, "tool_choice": "auto"}),
    "named call": (
        answer('{"name": "g", "parameters": {}}'),
        {"tools": FLAT_TOOLS, "tool_choice": {"type": "function", "name": "g"}},
    ),
    "allowed call": (
        answer(CALL),
        {
            "tools": FLAT_TOOLS,
            "tool_choice": {
                "type": "allowed_tools",
                "mode": "auto",
                "tools": [{"type": "function", "name": "f"}],
            },
        },
    ),
    "format": (
        answer("{}"),
        {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}}},
    ),
}


def check(value: object, name: str) -> None:
    """Raise ``ValidationError`` unless ``value`` is what OpenAI calls ``name``."""
    schema = {"$ref": f"#/$defs/{name}", "$defs": SCHEMAS["$defs"]}
    jsonschema.Draft202012Validator(schema).validate(value)


async def post(script: list[Step], path: str, **fields: object) -> httpx.Response:
    async with connect(make_app(FakeGenerationClient(*script))) as http:
        response = await http.post(path, json={"model": MODEL, **fields})
    assert response.status_code == 200, response.text
    return response


def data_of(response: httpx.Response) -> Iterator[dict[str, object]]:
    for line in response.text.splitlines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def hello(fields: Mapping[str, object]) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": "Hi"}], **fields}


@pytest.mark.parametrize("case", CHATS)
async def test_chat_completion(case: str) -> None:
    script, fields = CHATS[case]
    check((await post(script, CHAT, **hello(fields))).json(), "CreateChatCompletionResponse")


@pytest.mark.parametrize("include_usage", [False, True])
@pytest.mark.parametrize("case", CHATS)
async def test_chunks_of_a_chat_completion(case: str, include_usage: bool) -> None:
    script, fields = CHATS[case]
    options = {"include_usage": include_usage}
    response = await post(script, CHAT, **hello(fields), stream=True, stream_options=options)
    chunks = list(data_of(response))
    assert len(chunks) >= 2
    for chunk in chunks:
        check(chunk, "CreateChatCompletionStreamResponse")


@pytest.mark.parametrize("case", COMPLETIONS)
async def test_completion(case: str) -> None:
    script, fields = COMPLETIONS[case]
    body = {"prompt": "Hello", **fields}
    check((await post(script, "/v1/completions", **body)).json(), "CreateCompletionResponse")


@pytest.mark.parametrize("case", RESPONSES)
async def test_response(case: str) -> None:
    script, fields = RESPONSES[case]
    check((await post(script, "/v1/responses", input="Hi", **fields)).json(), "Response")


@pytest.mark.parametrize("case", RESPONSES)
async def test_events_of_a_response(case: str) -> None:
    script, fields = RESPONSES[case]
    response = await post(script, "/v1/responses", input="Hi", stream=True, **fields)
    events = list(data_of(response))
    assert len(events) >= 6
    for event in events:
        check(event, EVENTS[str(event["type"])])


async def test_events_of_a_response_that_fails() -> None:
    script: list[Step] = [[delta("Hel")], GenerationError("The engine failed.")]
    response = await post(script, "/v1/responses", input="Hi", stream=True)
    events = list(data_of(response))
    assert [event["type"] for event in events[-2:]] == ["error", "response.failed"]
    for event in events:
        check(event, EVENTS[str(event["type"])])


async def test_models() -> None:
    async with connect(make_app(FakeGenerationClient())) as http:
        check((await http.get("/v1/models")).json(), "ListModelsResponse")
        check((await http.get(f"/v1/models/{MODEL}")).json(), "Model")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("POST", CHAT, 400), ("GET", CHAT, 405), ("GET", "/v1/models/x", 404), ("GET", "/x", 404)],
)
async def test_errors(method: str, path: str, status: int) -> None:
    async with connect(make_app(FakeGenerationClient())) as http:
        response = await http.request(method, path, json={"model": 5})
    assert response.status_code == status
    check(response.json(), "ErrorResponse")


async def test_error_of_a_full_queue() -> None:
    client = FakeGenerationClient(generate_error=OverloadedError("The queue is full."))
    async with connect(make_app(client)) as http:
        response = await http.post(CHAT, json={"model": MODEL, **hello({})})
    assert response.status_code == 429
    check(response.json(), "ErrorResponse")
