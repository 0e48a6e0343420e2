"""How probable the tokens of a response were."""

import pytest

from gemma_serve.generation import FinishReason, GenerationDelta, SampledLogprobs, TokenLogprob
from tests.fakes import FakeGenerationClient, Step
from tests.openai_api.harness import make_app
from tests.openai_api.responses.harness import events_of, post, requested

INCLUDED = {"include": ["message.output_text.logprobs"]}


def token(text: bytes, *top: TokenLogprob, logprob: float = -0.5) -> SampledLogprobs:
    return SampledLogprobs(TokenLogprob(5, logprob, text), top)


def told(text: str, finish_reason: FinishReason | None = None, *tokens: SampledLogprobs) -> Step:
    return [GenerationDelta(0, text, (5,), finish_reason, logprobs=tokens)]


END = token(b"", logprob=-0.1)
SCRIPT = (
    told("Hi", None, token(b"Hi", TokenLogprob(5, -0.5, b"Hi"), TokenLogprob(106, -2, b""))),
    told("", None, token(b"\xc3")),
    told("é", None, token(b"\xa9")),
    told("", FinishReason.STOP, END),
)
HI = {
    "token": "Hi",
    "logprob": -0.5,
    "bytes": [72, 105],
    "top_logprobs": [
        {"token": "Hi", "logprob": -0.5, "bytes": [72, 105]},
        {"token": "", "logprob": -2.0, "bytes": []},
    ],
}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"top_logprobs": 0}, None),
        (INCLUDED, 0),
        ({"top_logprobs": 3}, 3),
        ({**INCLUDED, "top_logprobs": 2}, 2),
        ({"include": ["reasoning.encrypted_content"]}, None),
    ],
)
async def test_engine_is_asked_for_them(fields: dict[str, object], expected: int | None) -> None:
    assert (await requested(**fields)).sampling.logprobs == expected


async def test_whole_answer_has_an_entry_for_each_token_of_the_text() -> None:
    body = (await post(make_app(FakeGenerationClient(*SCRIPT)), **INCLUDED, top_logprobs=2)).json()
    (content,) = body["output"][0]["content"]
    assert body["top_logprobs"] == 2
    assert content["logprobs"][0] == HI
    assert [entry["bytes"] for entry in content["logprobs"]] == [[72, 105], [0xC3], [0xA9]]


async def test_stream_tells_them_with_the_text_and_again_with_the_whole() -> None:
    response = await post(make_app(FakeGenerationClient(*SCRIPT)), **INCLUDED, stream=True)
    events = events_of(response)
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [(event["delta"], len(event["logprobs"])) for event in deltas] == [("Hi", 1), ("é", 2)]
    assert deltas[0]["logprobs"] == [HI]
    (done,) = [event for event in events if event["type"] == "response.output_text.done"]
    assert done["logprobs"] == [entry for event in deltas for entry in event["logprobs"]]
    assert events[-1]["response"]["output"][0]["content"][0]["logprobs"] == done["logprobs"]


async def test_tokens_of_a_call_have_none() -> None:
    call = '{"name": "f", "parameters": {}}'
    script = (
        told("Hi ", None, token(b"Hi ")),
        told(call, None, token(call.encode())),
        told(" Ho", None, token(b" Ho")),
        told("", FinishReason.STOP, END),
    )
    tools = [{"type": "function", "name": "f"}]
    app = make_app(FakeGenerationClient(*script))
    body = (await post(app, tools=tools, **INCLUDED)).json()
    first, called, last = body["output"]
    assert [entry["token"] for entry in first["content"][0]["logprobs"]] == ["Hi "]
    assert called["arguments"] == "{}"
    assert [entry["token"] for entry in last["content"][0]["logprobs"]] == [" Ho"]


async def test_text_and_a_call_that_come_at_once_are_told_apart() -> None:
    """Whoever reads slowly gets what several tokens brought as one delta."""
    call = '[{"name": "f", "parameters": {}}]'
    tokens = (token(b"Hi"), token(b" "), token(call.encode()), END)
    app = make_app(FakeGenerationClient(told(f"Hi {call}", FinishReason.STOP, *tokens)))
    body = (await post(app, tools=[{"type": "function", "name": "f"}], **INCLUDED)).json()
    message, called = body["output"]
    assert [entry["token"] for entry in message["content"][0]["logprobs"]] == ["Hi", " "]
    assert called["arguments"] == "{}"
