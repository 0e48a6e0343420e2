"""A mistake in a request for a response is a 400 that names the field."""

import math

import pytest

from tests.fakes import FakeGenerationClient, answer
from tests.openai_api.harness import error_of, make_app
from tests.openai_api.responses.harness import post, requested

UNTELLABLE_SCHEMAS: tuple[dict[str, object], ...] = (
    {"const": "\ud800"},
    {"properties": {"\ud800": {}}},
    {"const": math.nan},
)
"""JSON that a response could not say again."""
USER = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"input": []}, "input", "invalid_value"),
        ({"input": 5}, "input", "invalid_value"),
        ({"input": "\ud800"}, "input", "invalid_value"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0]", "unsupported_value"),
        ({"input": [USER, {"type": "item_reference", "id": "x"}]}, "input[1].id", "invalid_value"),
        ({"input": [{"id": "x"}]}, "input[0].id", "invalid_value"),
        (
            {"input": [{"type": "item_reference"}]},
            "input[0].id",
            "missing_required_parameter",
        ),
        ({"input": [{"type": "computer_call"}]}, "input[0]", "unsupported_value"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file"}]}]},
            "input[0].content[0]",
            "unsupported_value",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_text"}]}]},
            "input[0].content[0].text",
            "missing_required_parameter",
        ),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "unsupported_value"),
        ({"echo": True}, "echo", "unsupported_value"),
        ({"max_output_tokens": 0}, "max_output_tokens", "invalid_value"),
        ({"metadata": {"a": 1}}, "metadata.a", "invalid_value"),
        *(
            (
                {"text": {"format": {"type": "json_schema", "name": "x", "schema": schema}}},
                "text.format.schema",
                "invalid_value",
            )
            for schema in UNTELLABLE_SCHEMAS
        ),
        (
            {"text": {"format": {"type": "json_schema", "name": "a b", "schema": {}}}},
            "text.format.name",
            "invalid_value",
        ),
        (
            {
                "text": {"format": {"type": "json_object"}},
                "response_format": {"type": "json_object"},
            },
            "response_format",
            "invalid_value",
        ),
        ({"n": 2}, "n", "unsupported_value"),
        ({"background": True}, "background", "unsupported_value"),
        ({"conversation": "conv_1"}, "conversation", "unsupported_value"),
        ({"logprobs": True}, "logprobs", "unsupported_value"),
        ({"top_logprobs": 21}, "top_logprobs", "invalid_value"),
        (
            {"input": [{"type": "function_call_output", "output": [{}] * 50_001}]},
            "input",
            "invalid_value",
        ),
        ({"include": ["message.input_image.image_url"]}, "include[0]", "unsupported_value"),
        ({"max_tool_calls": 0}, "max_tool_calls", "invalid_value"),
        ({"stop_token_ids": [1000]}, "stop_token_ids[0]", "invalid_value"),
    ],
)
async def test_mistake_is_a_400_that_names_the_field(
    fields: dict[str, object], param: str, code: str
) -> None:
    client = FakeGenerationClient(*answer())
    response = await post(make_app(client), **fields)
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert (error["param"], error["code"]) == (param, code)
    assert client.requests == []


async def test_nulls_and_unknown_fields_mean_nothing() -> None:
    names = ["instructions", "tools", "tool_choice", "text", "metadata", "include", "store"]
    names += ["temperature", "stream", "truncation", "previous_response_id", "reasoning", "user"]
    request = await requested(**dict.fromkeys(names), num_ctx=5, stream_options={"x": 1})
    assert request.n == 1
