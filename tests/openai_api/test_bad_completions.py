"""A mistake in a plain completion request is a 400 that names the field."""

import pytest

from tests.fakes import FakeGenerationClient, answer
from tests.openai_api.harness import (
    COMPLETIONS,
    MODEL,
    complete,
    connect,
    error_of,
    make_app,
)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"prompt": []}, "prompt", "invalid_value"),
        ({"prompt": None}, "prompt", "invalid_value"),
        ({"prompt": {"a": 1}}, "prompt", "invalid_value"),
        ({"prompt": ["a", 5]}, "prompt[1]", "invalid_value"),
        ({"prompt": [5, "a"]}, "prompt[1]", "invalid_value"),
        ({"prompt": [5, -1]}, "prompt[1]", "invalid_value"),
        ({"prompt": [5, 1000]}, "prompt[1]", "invalid_value"),
        ({"prompt": [[5], []]}, "prompt[1]", "invalid_value"),
        ({"prompt": [[5], [6, 1000]]}, "prompt[1][1]", "invalid_value"),
        ({"prompt": ["a"] * 129}, "prompt", "invalid_value"),
        ({"prompt": "\ud800"}, "prompt", "invalid_value"),
        ({"max_tokens": -1}, "max_tokens", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"logprobs": 21}, "logprobs", "invalid_value"),
        ({"logprobs": True}, "logprobs", "invalid_value"),
        ({"n": 129}, "n", "invalid_value"),
        ({"stream_options": {}}, "stream_options", "invalid_value"),
        ({"best_of": 2}, "best_of", "unsupported_value"),
        ({"suffix": "x"}, "suffix", "unsupported_value"),
        ({"prompt_embeds": "x"}, "prompt_embeds", "unsupported_value"),
        ({"logits_processors": ["x"]}, "logits_processors", "unsupported_value"),
        ({"regex": "a", "guided_regex": "a"}, "regex", "invalid_value"),
        ({"response_format": {"type": "xml"}}, "response_format", "unsupported_value"),
    ],
)
async def test_mistake_is_a_400_that_names_the_field(
    fields: dict[str, object], param: str, code: str
) -> None:
    client = FakeGenerationClient(*answer())
    response = await complete(make_app(client), **fields)
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert (error["param"], error["code"]) == (param, code)
    assert client.requests == []


async def test_missing_prompt_is_told_as_missing() -> None:
    async with connect(make_app(FakeGenerationClient())) as http:
        response = await http.post(COMPLETIONS, json={"model": MODEL})
    assert error_of(response)["code"] == "missing_required_parameter"


async def test_fields_that_ask_for_nothing_are_accepted() -> None:
    fields = {"suffix": "", "best_of": 1, "user": "me", "logprobs": None, "echo": None}
    client = FakeGenerationClient(*answer())
    response = await complete(make_app(client), **fields, stream=None, stop=None, n=None)
    assert response.status_code == 200, response.text
    assert len(client.requests) == 1


async def test_unknown_model_is_a_404() -> None:
    response = await complete(make_app(FakeGenerationClient()), model="gpt-4o")
    assert (response.status_code, error_of(response)["param"]) == (404, "model")
