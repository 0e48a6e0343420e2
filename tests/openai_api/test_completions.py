"""The answer to a plain completion request, whole and streamed."""

import json
import re
from dataclasses import replace

import httpx
import pytest

from gemma_serve.errors import GenerationError, OutputConstraintError, OverloadedError
from gemma_serve.generation import (
    FinishReason,
    GenerationDelta,
    GenerationRequest,
    GenerationStream,
    OutputConstraint,
    SampledLogprobs,
    TextPrompt,
    TokenLogprob,
    TokenPrompt,
)
from gemma_serve.openai_api.completion_requests import build_generation_requests
from gemma_serve.openai_api.completion_schemas import CompletionRequest
from gemma_serve.openai_api.requesters import Requester
from gemma_serve.openai_api.response_schemas import Completion
from tests.fakes import TEXT_MODEL, FakeGenerationClient, answer, delta
from tests.openai_api.harness import (
    MODEL,
    complete,
    counted_tokens,
    error_of,
    make_app,
)


async def requested(prompt: object = "ab", **fields: object) -> list[GenerationRequest]:
    """What reaches the engine."""
    client = FakeGenerationClient(*answer())
    response = await complete(make_app(client), prompt, **fields)
    assert response.status_code == 200, response.text
    return client.requests


def position(token_id: int, logprob: float, *top: tuple[int, float]) -> SampledLogprobs:
    """Token ids are bytes, but for 2, a control token."""

    def token(token_id: int, logprob: float) -> TokenLogprob:
        return TokenLogprob(token_id, logprob, b"" if token_id == 2 else bytes([token_id]))

    return SampledLogprobs(token(token_id, logprob), tuple(token(*pair) for pair in top))


def events_of(response: httpx.Response) -> list[dict[str, object]]:
    *events, done = response.text.removesuffix("\n\n").split("\n\n")
    assert done == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


def choices_of(response: httpx.Response) -> list[dict[str, object]]:
    return [event["choices"][0] for event in events_of(response)]  # type: ignore[index]  # JSON


async def test_whole_answer_has_every_field_of_the_contract() -> None:
    client = FakeGenerationClient(*answer("Hel", "lo"))
    body = (await complete(make_app(client))).json()
    assert re.fullmatch(r"cmpl-[0-9a-f]{32}", body.pop("id"))
    assert isinstance(body.pop("created"), int)
    usage = body.pop("usage")
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (7, 3)
    assert body == {
        "object": "text_completion",
        "model": MODEL,
        "choices": [{"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "stop"}],
    }
    assert len(client.closed) == 1


async def test_stream_is_text_then_finish_then_usage_then_done() -> None:
    app = make_app(FakeGenerationClient(*answer("Hel", "", "lo")))
    response = await complete(app, stream=True, stream_options={"include_usage": True})
    *chunks, last = events_of(response)
    assert [Completion.model_validate(chunk).choices[0].text for chunk in chunks] == [
        "Hel",
        "lo",
        "",
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [  # type: ignore[index]
        None,
        None,
        "stop",
    ]
    assert [chunk["usage"] for chunk in chunks] == [None, None, None]
    assert last["choices"] == []
    assert last["usage"] == (await complete(app)).json()["usage"]
    assert len({chunk["id"] for chunk in (*chunks, last)}) == 1


async def test_every_chunk_counts_the_tokens_so_far_when_asked_to() -> None:
    app = make_app(FakeGenerationClient(*answer("Hel", "lo")))
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events_of(await complete(app, stream=True, stream_options=options))
    assert [counted_tokens(chunk) for chunk in chunks] == [
        (7, 1, 8),
        (7, 2, 9),
        (7, 3, 10),
        (7, 3, 10),
    ]


async def test_stream_is_these_bytes() -> None:
    response = await complete(make_app(FakeGenerationClient(*answer("é"))), stream=True)
    text = re.sub(
        r'"id":"cmpl-[0-9a-f]+","object":"text_completion","created":\d+,', "", response.text
    )
    assert text == (
        f'data: {{"model":"{MODEL}","choices":[{{"index":0,"text":"é","logprobs":null,'
        '"finish_reason":null}]}\n\n'
        f'data: {{"model":"{MODEL}","choices":[{{"index":0,"text":"","logprobs":null,'
        '"finish_reason":"stop"}]}\n\n'
        "data: [DONE]\n\n"
    )


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [TextPrompt("ab")]),
        ("", [TextPrompt("")]),
        (["a", "b"], [TextPrompt("a"), TextPrompt("b")]),
        ([5, 6], [TokenPrompt((5, 6))]),
        ([[5], [6, 7]], [TokenPrompt((5,)), TokenPrompt((6, 7))]),
    ],
)
async def test_each_form_of_prompt(prompt: object, expected: list[object]) -> None:
    assert [request.prompt for request in await requested(prompt)] == expected


async def test_sixteen_tokens_by_default() -> None:
    (request,) = await requested()
    assert (request.sampling.max_tokens, request.sampling.logprobs) == (16, None)
    (request,) = await requested(max_tokens=None, add_special_tokens=False, logprobs=3)
    assert request.prompt == TextPrompt("ab", add_bos=False)
    assert (request.sampling.max_tokens, request.sampling.logprobs) == (16, 3)
    assert request.sampling.prompt_logprobs is None


def test_echo_asks_for_the_prompt_and_what_it_is_worth() -> None:
    body = CompletionRequest(model=MODEL, prompt="ab", echo=True, max_tokens=0, logprobs=1)
    (request,) = build_generation_requests(
        body, request_id="r", description=TEXT_MODEL, requester=Requester(None, None)
    )
    assert request.return_prompt
    assert (request.sampling.max_tokens, request.sampling.prompt_logprobs) == (0, 1)


async def test_format_of_the_answer_reaches_the_engine_with_every_prompt() -> None:
    requests = await requested(["a", "b"], guided_regex="a+")
    assert [request.output_constraint for request in requests] == [
        OutputConstraint(kind="regex", value="a+")
    ] * 2
    (request,) = await requested(response_format={"type": "json_object"})
    assert request.output_constraint == OutputConstraint(kind="json_object", value="")


async def test_format_that_cannot_be_enforced_is_an_error_of_its_field() -> None:
    client = FakeGenerationClient(generate_error=OutputConstraintError("No.", param="properties.a"))
    response = await complete(make_app(client), guided_json={"type": "object"})
    assert (response.status_code, error_of(response)["param"]) == (400, "guided_json.properties.a")


async def test_cached_tokens_are_those_of_each_prompts_first_choice() -> None:
    first, second = delta("a", FinishReason.STOP), delta("b", FinishReason.STOP, index=1)
    script = [[replace(first, cached_tokens=3), replace(second, cached_tokens=5)]]
    response = await complete(make_app(FakeGenerationClient(*script)), ["p", "q"], n=2)
    assert response.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 6


async def test_requests_of_several_prompts_have_ids_of_their_own() -> None:
    requests = await requested(["a", "b"])
    assert requests[0].request_id.removesuffix("-0") == requests[1].request_id.removesuffix("-1")


async def test_choices_are_numbered_prompt_by_prompt() -> None:
    script = [[delta("a"), delta("x", FinishReason.STOP, index=1)], [delta("b", FinishReason.STOP)]]
    client = FakeGenerationClient(*script)
    body = (await complete(make_app(client), ["p", "q", "r"], n=2)).json()
    assert [(c["index"], c["text"]) for c in body["choices"]] == [
        (i, "x" if i % 2 else "ab") for i in range(6)
    ]
    assert body["usage"]["prompt_tokens"] == 21
    assert body["usage"]["completion_tokens"] == 9
    assert len(client.closed) == 3


async def test_streams_of_several_prompts_are_one_stream() -> None:
    client = FakeGenerationClient(*answer("a", "b"))
    choices = choices_of(await complete(make_app(client), ["p", "q"], stream=True))
    texts = {
        index: "".join(str(c["text"]) for c in choices if c["index"] == index) for index in (0, 1)
    }
    assert texts == {0: "ab", 1: "ab"}
    assert [c["finish_reason"] for c in choices].count("stop") == 2


class SecondFails(FakeGenerationClient):
    """Takes one request and no other."""

    async def generate(self, request: GenerationRequest) -> GenerationStream:
        if self.requests:
            raise OverloadedError("Full.")
        return await super().generate(request)


async def test_prompt_that_is_not_admitted_closes_those_that_were() -> None:
    client = SecondFails(*answer())
    assert (await complete(make_app(client), ["a", "b"])).status_code == 429
    assert client.closed == [request.request_id for request in client.requests]


@pytest.mark.parametrize("prompts", ["p", ["p", "q"]])
async def test_error_in_the_middle_of_a_stream_is_one_event_and_done(prompts: object) -> None:
    client = FakeGenerationClient([delta("Hel")], GenerationError("The engine failed."))
    response = await complete(make_app(client), prompts, stream=True)
    assert events_of(response)[-1] == {
        "error": {
            "message": "The engine failed.",
            "type": "server_error",
            "param": None,
            "code": None,
        }
    }
    assert len(client.closed) == len(client.requests)


async def test_what_stopped_a_choice_is_told_with_its_end() -> None:
    last = replace(delta("!", FinishReason.STOP), stop_reason="END")
    app = make_app(FakeGenerationClient([delta("Hi")], [last]))
    (choice,) = (await complete(app)).json()["choices"]
    assert (choice["text"], choice["stop_reason"]) == ("Hi!", "END")
    first, end = choices_of(await complete(app, stream=True))
    assert ("stop_reason" in first, end["stop_reason"]) == (False, "END")


async def test_echo_begins_each_choice_with_the_prompt() -> None:
    script = [[delta("!", FinishReason.STOP), delta("?", FinishReason.STOP, index=1)]]
    app = make_app(FakeGenerationClient(*script))
    body = (await complete(app, "ab", echo=True, n=2)).json()
    assert [c["text"] for c in body["choices"]] == ["ab!", "ab?"]
    body = (await complete(app, [97, 2, 98], echo=True, n=2)).json()
    assert [c["text"] for c in body["choices"]] == ["a<bos>b!", "a<bos>b?"]
    body = (await complete(app, "<bos>ab", echo=True, add_special_tokens=False, n=2)).json()
    assert body["choices"][0]["text"] == "<bos>ab!"


ONE_TOKEN = GenerationDelta(
    0,
    "!",
    (33,),
    FinishReason.LENGTH,
    logprobs=(position(33, -0.5, (33, -0.5), (63, -1.0)),),
    prompt_logprobs=(position(97, -2.0, (99, -0.1)), position(98, -0.25, (98, -0.25))),
)
SCORED = {
    "tokens": ["token_id:2", "a", "b", "!"],
    "token_logprobs": [None, -2.0, -0.25, -0.5],
    "top_logprobs": [None, {"c": -0.1, "a": -2.0}, {"b": -0.25}, {"!": -0.5, "?": -1.0}],
    "text_offset": [0, 0, 1, 2],
}


async def test_echo_with_logprobs_scores_the_prompt() -> None:
    """lm-eval's request: its own tokens match ours one to one, and the last is the new one."""
    app = make_app(FakeGenerationClient([ONE_TOKEN]))
    (choice,) = (await complete(app, echo=True, logprobs=1, max_tokens=1)).json()["choices"]
    assert (choice["text"], choice["logprobs"]) == ("ab!", SCORED)
    (streamed,) = choices_of(await complete(app, echo=True, logprobs=1, max_tokens=1, stream=True))
    assert streamed == choice


async def test_prompts_tokens_are_scored_by_their_ids() -> None:
    client = FakeGenerationClient([ONE_TOKEN])
    (choice,) = (await complete(make_app(client), prompt_logprobs=1)).json()["choices"]
    assert client.requests[0].sampling.prompt_logprobs == 1
    assert choice["text"] == "!"
    assert choice["prompt_logprobs"] == [
        None,
        {
            "97": {"logprob": -2.0, "rank": None, "decoded_token": "a"},
            "99": {"logprob": -0.1, "rank": 1, "decoded_token": "c"},
        },
        {"98": {"logprob": -0.25, "rank": 1, "decoded_token": "b"}},
    ]
    (choice,) = (await complete(make_app(client), prompt_logprobs=0)).json()["choices"]
    assert [list(entry or ()) for entry in choice["prompt_logprobs"]] == [[], ["97"], ["98"]]


async def test_prompts_tokens_are_scored_for_echo_and_by_their_ids_at_once() -> None:
    client = FakeGenerationClient([ONE_TOKEN])
    fields = {"echo": True, "logprobs": 0, "prompt_logprobs": 1}
    (choice,) = (await complete(make_app(client), **fields)).json()["choices"]
    assert client.requests[0].sampling.prompt_logprobs == 1
    assert choice["logprobs"]["top_logprobs"][:3] == [None, {"a": -2.0}, {"b": -0.25}]
    assert [len(entry or ()) for entry in choice["prompt_logprobs"]] == [0, 2, 1]


async def test_without_echo_only_the_answer_is_scored() -> None:
    app = make_app(FakeGenerationClient([ONE_TOKEN]))
    (choice,) = (await complete(app, logprobs=1)).json()["choices"]
    assert choice["logprobs"] == {
        "tokens": ["!"],
        "token_logprobs": [-0.5],
        "top_logprobs": [{"!": -0.5, "?": -1.0}],
        "text_offset": [0],
    }


async def test_choice_that_is_faster_than_the_first_waits_for_the_prompts_scores() -> None:
    early = GenerationDelta(1, "?", (63,), FinishReason.LENGTH, logprobs=(position(63, -1.0),))
    app = make_app(FakeGenerationClient([early], [ONE_TOKEN]))
    choices = choices_of(await complete(app, echo=True, logprobs=1, n=2, stream=True))
    assert [(c["index"], c["text"]) for c in choices] == [(1, "ab?"), (0, "ab!")]


async def test_half_a_character_and_a_control_token_have_names_of_their_own() -> None:
    tokens = (0xC3, 0xA9, 2, 98)
    said = GenerationDelta(
        0, "éb", tokens, FinishReason.STOP, logprobs=tuple(position(i, -1.0) for i in tokens)
    )
    app = make_app(FakeGenerationClient([said]))
    (choice,) = (await complete(app, logprobs=0)).json()["choices"]
    assert choice["logprobs"]["tokens"] == [r"bytes:\xc3", r"bytes:\xa9", "token_id:2", "b"]
    assert choice["logprobs"]["text_offset"] == [0, 0, 1, 1]
    (choice,) = (await complete(app, logprobs=0, return_tokens_as_token_ids=True)).json()["choices"]
    assert choice["logprobs"]["top_logprobs"][3] == {"token_id:98": -1.0}


async def test_token_ids_are_told_if_asked_for() -> None:
    app = make_app(FakeGenerationClient(*answer("Hi")))
    (choice,) = (await complete(app, "a", return_token_ids=True)).json()["choices"]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([2, 97], [5, 5])
    first, last = choices_of(await complete(app, "a", return_token_ids=True, stream=True))
    assert (first["prompt_token_ids"], first["token_ids"]) == ([2, 97], [5])
    assert "prompt_token_ids" not in last
