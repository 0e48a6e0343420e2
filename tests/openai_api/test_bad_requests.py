"""A caller's mistake is a 400 that names the field, whatever the mistake."""

import json
import math

import pytest

from gemma_serve.errors import InvalidRequestError
from gemma_serve.openai_api.validation_errors import field_path
from tests.fakes import FakeGenerationClient, answer
from tests.openai_api.harness import CHAT, HELLO, connect, error_of, make_app, post_chat

TOOL = {"type": "function", "function": {"name": "get_time"}}
ALL_MODE = {"mode": "all", "tools": [TOOL]}
USER = {"role": "user", "content": "x"}
ASSISTANT = {"role": "assistant", "content": "x"}


def tool(**function: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": "f", **function}}


def deep_schema(depth: int) -> dict[str, object]:
    schema: dict[str, object] = {"type": "object"}
    for _ in range(depth // 2):
        schema = {"properties": {"a": schema}}
    return schema


def user(*parts: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": list(parts)}]}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": -1}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repeat_penalty": 0}, "repeat_penalty"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2**63}, "max_tokens"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": True}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"seed": "1"}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": 5}, "stop"),
        ({"stop": "x" * 1025}, "stop"),
        ({"stop": ["a", "x" * 1025]}, "stop[1]"),
        ({"stop_token_ids": [1, -1]}, "stop_token_ids[1]"),
        ({"stop_token_ids": [1, 1000]}, "stop_token_ids[1]"),
        ({"stop_token_ids": [1] * 1025}, "stop_token_ids"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {"-1": 1}}, "logit_bias.-1"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias." + "9" * 5000),
        ({"logit_bias": {"7": 101}}, "logit_bias.7"),
        ({"logit_bias": {"7": math.nan}}, "logit_bias.7"),
        ({"logit_bias": {"7": None}}, "logit_bias.7"),
        ({"logit_bias": {"1000": 1}}, "logit_bias.1000"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"allowed_token_ids": [1, 1000]}, "allowed_token_ids[1]"),
        ({"bad_words": ["a", ""]}, "bad_words[1]"),
        ({"bad_words": ["a"] * 129}, "bad_words"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 3, "max_tokens": 2}, "min_tokens"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"chat_template_kwargs": {"a": [1]}}, "chat_template_kwargs.a"),
        ({"stream": "true"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": 0, "stream": True}, "prompt_logprobs"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"messages": []}, "messages"),
        ({"messages": [USER] * 50_001}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [5]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": 5}]}, None),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": {}}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
        (user({"type": "text", "text": "\ud800"}), "messages[0].content[0].text"),
        (user({"type": "text", "text": 5}), "messages[0].content[0].text"),
        (
            user({"type": "image_url", "image_url": {"url": 5}}),
            "messages[0].content[0].image_url.url",
        ),
        (user({"type": "image_url", "image_url": ""}), "messages[0].content[0].image_url"),
        ({"stop": "\udfff"}, "stop"),
        (
            {"tools": [TOOL, {"type": "function", "function": {"name": "a b"}}]},
            "tools[1].function.name",
        ),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": 5}}]}, None),
        (
            {"tools": [TOOL, {"type": "function", "function": {"name": "get_time"}}]},
            "tools[1].function.name",
        ),
        ({"tools": [TOOL] * 1025}, "tools"),
        ({"tools": [tool(description="\ud800")]}, "tools[0].function.description"),
        ({"tools": [tool(parameters={"x": math.nan})]}, "tools[0].function.parameters"),
        ({"tools": [tool(parameters={"x": "\ud800"})]}, "tools[0].function.parameters"),
        ({"tools": [tool(parameters={"type": "array"})]}, "tools[0].function.parameters.type"),
        (
            {"tools": [tool(parameters={"properties": {"a": {"type": "strin"}}})]},
            "tools[0].function.parameters.properties.a.type",
        ),
        (
            {"tools": [tool(parameters=deep_schema(150))]},
            "tools[0].function.parameters" + ".properties.a" * 64,
        ),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": 5}, "tool_choice"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}},
            "tool_choice.function.name",
        ),
        (
            {"tool_choice": {"type": "function", "function": {"name": "get_time"}}},
            "tool_choice",
        ),
        (
            {
                "tools": [TOOL],
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {
                        "mode": "auto",
                        "tools": [TOOL, {"type": "function", "function": {"name": "other"}}],
                    },
                },
            },
            "tool_choice.allowed_tools.tools[1].function.name",
        ),
        (
            {
                "tools": [TOOL],
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {"mode": "auto", "tools": []},
                },
            },
            "tool_choice.allowed_tools.tools",
        ),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"continue_final_message": 1}, "continue_final_message"),
        ({"\ud800": 1}, None),
    ],
)
async def test_invalid_value_is_a_400_that_names_the_field(
    fields: dict[str, object], param: str | None
) -> None:
    client = FakeGenerationClient(*answer())
    response = await post_chat(make_app(client), **fields)
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_value")
    assert param is None or error["param"] == param
    assert client.requests == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "custom"}}, "tool_choice"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "allowed_tools": ALL_MODE}},
            "tool_choice.allowed_tools.mode",
        ),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"functions": [{"name": "x"}]}, "functions"),
        ({"function_call": {"name": "x"}}, "function_call"),
        ({"response_format": {"type": "structural_tag"}}, "response_format"),
        ({"modalities": ["text", "audio"]}, "modalities[1]"),
        ({"audio": {"voice": "ash", "format": "wav"}}, "audio"),
        ({"web_search_options": {}}, "web_search_options"),
        (
            {"structured_outputs": {"structural_tag": "{}"}},
            "structured_outputs.structural_tag",
        ),
        ({"structured_outputs": {"lark": "start: x"}}, "structured_outputs"),
        ({"echo": True}, "echo"),
        ({"best_of": 2}, "best_of"),
        ({"logits_processors": ["x"]}, "logits_processors"),
        ({"truncation_side": "right", "truncate_prompt_tokens": 5}, "truncation_side"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        (user({"type": "text", "text": "x"}, {"type": "input_audio"}), "messages[0].content[1]"),
        (user({"type": "file", "file": {}}), "messages[0].content[0]"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0]"),
        (
            user({"type": "image_url", "image_url": {"url": "x", "detail": "max"}}),
            "messages[0].content[0].image_url.detail",
        ),
    ],
)
async def test_unsupported_field_is_a_400_that_names_it(
    fields: dict[str, object], param: str
) -> None:
    response = await post_chat(make_app(FakeGenerationClient(*answer())), **fields)
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert (error["code"], error["param"]) == ("unsupported_value", param)


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": []},
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": False},
        {"tool_choice": "none"},
        {"functions": []},
        {"function_call": "none"},
        {"response_format": {"type": "text"}},
        {"format": ""},
        {"logprobs": False, "top_logprobs": 0},
        {"modalities": ["text"], "audio": None},
        {"structured_outputs": {}, "guided_regex": "", "guided_choice": []},
        {"structured_outputs": {"regex": None, "disable_any_whitespace": False}},
        {"structured_outputs": {"regex": "a", "disable_any_whitespace": True}},
        {"best_of": 1, "logits_processors": []},
        {"min_tokens": 0, "bad_words": [], "echo": False},
        {"continue_final_message": False, "add_generation_prompt": True},
        {
            "messages": [USER, ASSISTANT],
            "continue_final_message": True,
            "add_generation_prompt": False,
        },
        {"messages": [USER, ASSISTANT], "add_generation_prompt": True},
        {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"},
        {"reasoning_effort": "high", "verbosity": "low", "prediction": None},
        {"num_ctx": 4096, "tfs_z": 1, "mirostat": 2, "keep_alive": "5m", "think": False},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"truncate_prompt_tokens": 9, "truncation_side": "left"},
    ],
)
async def test_field_that_asks_for_nothing_is_accepted(fields: dict[str, object]) -> None:
    response = await post_chat(make_app(FakeGenerationClient(*answer())), **fields)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": HELLO["messages"]}, "model"),
        ({"model": HELLO["model"]}, "messages"),
        ({**HELLO, "messages": [{"content": "x"}]}, "messages[0].role"),
        ({**HELLO, "messages": [{"role": "user"}]}, "messages[0].content"),
        ({**HELLO, "messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({**HELLO, **user({"text": "x"})}, "messages[0].content[0].type"),
        ({**HELLO, **user({"type": "text"})}, "messages[0].content[0].text"),
        ({**HELLO, **user({"type": "image_url"})}, "messages[0].content[0].image_url"),
        (
            {**HELLO, **user({"type": "image_url", "image_url": {}})},
            "messages[0].content[0].image_url.url",
        ),
        ({**HELLO, "tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({**HELLO, "tools": [TOOL], "tool_choice": {}}, "tool_choice.type"),
        (
            {**HELLO, "tools": [TOOL], "tool_choice": {"type": "function"}},
            "tool_choice.function",
        ),
    ],
)
async def test_missing_field_is_a_400_that_names_it(body: dict[str, object], param: str) -> None:
    async with connect(make_app(FakeGenerationClient())) as http:
        response = await http.post(CHAT, json=body)
    assert response.status_code == 400
    assert error_of(response) == {
        "message": f"Missing required parameter: {param}",
        "type": "invalid_request_error",
        "param": param,
        "code": "missing_required_parameter",
    }


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'"text"',
        b"5",
        b"{",
        b"\xff\xfe",
        b'{"n": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
)
async def test_body_that_is_no_json_object_is_a_400(body: bytes) -> None:
    async with connect(make_app(FakeGenerationClient())) as http:
        response = await http.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


async def test_malformed_json_is_told_with_its_place() -> None:
    async with connect(make_app(FakeGenerationClient())) as http:
        response = await http.post(
            CHAT, content=b'{"a": x}', headers={"content-type": "application/json"}
        )
    assert error_of(response)["message"] == (
        "The body is not valid JSON: Expecting value at character 6"
    )


async def test_body_without_json_content_type_is_a_400_that_says_so() -> None:
    async with connect(make_app(FakeGenerationClient())) as http:
        response = await http.post(
            CHAT, content=json.dumps(HELLO), headers={"content-type": "text/plain"}
        )
    assert response.status_code == 400
    assert "content-type: application/json" in str(error_of(response)["message"])


async def test_unknown_model_is_a_404_before_the_model_is_asked() -> None:
    client = FakeGenerationClient(describe_error=RuntimeError("asked"))
    response = await post_chat(make_app(client), model="gpt-4o")
    assert response.status_code == 404
    error = error_of(response)
    assert (error["code"], error["param"]) == ("model_not_found", "model")


async def test_message_says_what_was_wanted_and_what_was_got() -> None:
    response = await post_chat(make_app(FakeGenerationClient()), temperature=3)
    assert error_of(response)["message"] == (
        "Invalid temperature: Input should be less than or equal to 2, got 3"
    )


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"stop": 5}, "stop"), ({"messages": [{**USER, "content": 5}]}, "messages[0].content")],
)
async def test_message_knows_that_a_string_may_stand_for_a_list(
    fields: dict[str, object], param: str
) -> None:
    response = await post_chat(make_app(FakeGenerationClient()), **fields)
    assert error_of(response)["message"] == (
        f"Invalid {param}: Input should be a string or a list, got 5"
    )


async def test_mistake_in_a_field_always_has_a_code() -> None:
    refused = InvalidRequestError("The picture is torn.", param="messages[0].content[0]")
    response = await post_chat(make_app(FakeGenerationClient(generate_error=refused)))
    assert error_of(response)["code"] == "invalid_value"


async def test_long_values_are_not_quoted_in_full() -> None:
    response = await post_chat(make_app(FakeGenerationClient()), temperature="9" * 10_000)
    assert len(str(error_of(response)["message"])) < 200


@pytest.mark.parametrize(
    ("location", "path"),
    [
        (("messages", 0, "user", "content", 1, "text", "text"), "messages[0].content[1].text"),
        (("messages", 0, "user", "name"), "messages[0].name"),
        (("stop", 0), "stop"),
        ((), None),
    ],
)
def test_field_path_skips_what_is_not_in_the_body(
    location: tuple[str | int, ...], path: str | None
) -> None:
    message = {"role": "user", "content": [{}, {"type": "text", "text": 5}]}
    assert field_path(location, {"messages": [message], "stop": ""}) == path
