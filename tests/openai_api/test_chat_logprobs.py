import json
from collections.abc import Sequence

import pytest

from gemma_serve.generation import (
    FinishReason,
    GenerationDelta,
    SampledLogprobs,
    TokenLogprob,
)
from gemma_serve.openai_api.chat_logprobs import VisibleLogprobs
from tests.fakes import FakeGenerationClient
from tests.openai_api.harness import error_of, make_app, post_chat

YEN = "¥".encode()


def delta(
    text: str, *tokens: bytes, finish_reason: FinishReason | None = None, top: Sequence[bytes] = ()
) -> GenerationDelta:
    """``text`` became final when ``tokens`` were sampled."""
    alternatives = tuple(TokenLogprob(i, -1.5 - i, token) for i, token in enumerate(top))
    return GenerationDelta(
        0,
        text,
        tuple(range(len(tokens))),
        finish_reason,
        logprobs=tuple(
            SampledLogprobs(TokenLogprob(7, -0.5, token), alternatives) for token in tokens
        ),
    )


def shown(*deltas: GenerationDelta) -> list[list[str]]:
    """The tokens that each delta brings to light."""
    visible = VisibleLogprobs()
    return [[entry["token"] for entry in visible.add(each)] for each in deltas]


def test_each_entry_comes_with_its_text() -> None:
    assert shown(delta("a", b"a"), delta("bc", b"b", b"c")) == [["a"], ["b", "c"]]


def test_entries_of_half_characters_wait_for_the_whole_one() -> None:
    assert shown(delta("", YEN[:1]), delta("¥!", YEN[1:], b"!")) == [[], ["\ufffd", "\ufffd", "!"]]


def test_entries_of_text_that_may_begin_a_stop_string_wait_with_it() -> None:
    held, freed = delta("go ", b"go E"), delta("EN", b"N")
    assert shown(held, delta("", b"x"), freed) == [["go E"], [], ["x"]]


def test_tokens_of_a_stop_string_have_no_entry() -> None:
    last = delta("", b"ND", finish_reason=FinishReason.STOP)
    assert shown(delta("go", b"go"), delta(" ", b" E"), last) == [["go"], [" E"], []]


def test_the_token_that_ends_the_turn_has_no_entry() -> None:
    last = delta("", b"", finish_reason=FinishReason.STOP)
    assert shown(delta("a", b"a"), last) == [["a"], []]


def test_a_text_token_that_ends_the_choice_has_no_entry() -> None:
    last = delta("", b"stop", finish_reason=FinishReason.STOP)
    assert shown(delta("a", b"a"), last) == [["a"], []]


def test_joined_bytes_are_the_text() -> None:
    visible = VisibleLogprobs()
    pieces = [b"A", YEN[:1], YEN[1:], b"\n", "é".encode()]
    deltas = [delta("A", b"A"), delta("", YEN[:1]), delta("¥", YEN[1:]), delta("\né", *pieces[3:])]
    entries = [entry for each in deltas for entry in visible.add(each)]
    assert b"".join(bytes(entry["bytes"] or ()) for entry in entries).decode() == "A¥\né"


ENTRY = {
    "token": "hi",
    "logprob": -0.5,
    "bytes": [104, 105],
    "top_logprobs": [
        {"token": "ho", "logprob": -1.5, "bytes": [104, 111]},
        {"token": "", "logprob": -2.5, "bytes": None},
    ],
}
SCRIPT = (
    [delta("hi", b"hi", top=(b"ho", b""))],
    [delta("", b"", finish_reason=FinishReason.STOP)],
)


async def test_completion_has_the_logprobs_of_its_tokens() -> None:
    client = FakeGenerationClient(*SCRIPT)
    response = await post_chat(make_app(client), logprobs=True, top_logprobs=2)
    assert response.json()["choices"][0]["logprobs"] == {"content": [ENTRY], "refusal": None}
    assert client.requests[0].sampling.logprobs == 2


async def test_stream_has_logprobs_beside_their_text() -> None:
    client = FakeGenerationClient(*SCRIPT)
    response = await post_chat(make_app(client), logprobs=True, top_logprobs=2, stream=True)
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    choices = [json.loads(event)["choices"][0] for event in events[:-1]]
    assert [choice["logprobs"] for choice in choices] == [
        None,
        {"content": [ENTRY], "refusal": None},
        None,
    ]


async def test_logprobs_alone_ask_for_no_alternatives() -> None:
    client = FakeGenerationClient(*SCRIPT)
    await post_chat(make_app(client), logprobs=True)
    assert client.requests[0].sampling.logprobs == 0


@pytest.mark.parametrize("fields", [{}, {"logprobs": False}, {"top_logprobs": 0}])
async def test_logprobs_that_nobody_asked_for_are_null(fields: dict[str, object]) -> None:
    client = FakeGenerationClient(*SCRIPT)
    response = await post_chat(make_app(client), **fields)
    assert response.json()["choices"][0]["logprobs"] is None
    assert client.requests[0].sampling.logprobs is None


@pytest.mark.parametrize(
    "fields",
    [
        {"top_logprobs": 2},
        {"logprobs": False, "top_logprobs": 2},
        {"logprobs": True, "top_logprobs": 21},
        {"logprobs": True, "top_logprobs": -1},
    ],
)
async def test_top_logprobs_out_of_place_or_range_are_refused(fields: dict[str, object]) -> None:
    response = await post_chat(make_app(FakeGenerationClient()), **fields)
    assert response.status_code == 400
    assert error_of(response)["param"] == "top_logprobs"


async def test_tokens_of_the_prompt_are_told_by_their_ids() -> None:
    positions = (
        SampledLogprobs(TokenLogprob(97, -2.0, b"a"), (TokenLogprob(99, -0.1, b"c"),)),
        SampledLogprobs(TokenLogprob(106, -0.2, b""), (TokenLogprob(106, -0.2, b""),)),
    )
    last = GenerationDelta(0, "Hi", (5,), FinishReason.STOP, prompt_logprobs=positions)
    client = FakeGenerationClient([last])
    body = (await post_chat(make_app(client), prompt_logprobs=1)).json()
    assert client.requests[0].sampling.prompt_logprobs == 1
    assert body["prompt_logprobs"] == [
        None,
        {
            "97": {"logprob": -2.0, "rank": None, "decoded_token": "a"},
            "99": {"logprob": -0.1, "rank": 1, "decoded_token": "c"},
        },
        {"106": {"logprob": -0.2, "rank": 1, "decoded_token": ""}},
    ]
    assert "prompt_logprobs" not in (await post_chat(make_app(client))).json()


async def test_tokens_are_written_as_their_ids_if_asked_for() -> None:
    client = FakeGenerationClient([delta("a", b"a", finish_reason=FinishReason.STOP, top=(b"a",))])
    fields = {"logprobs": True, "top_logprobs": 1, "return_tokens_as_token_ids": True}
    (choice,) = (await post_chat(make_app(client), **fields)).json()["choices"]
    (entry,) = choice["logprobs"]["content"]
    assert (entry["token"], entry["bytes"]) == ("token_id:7", [97])
    assert [top["token"] for top in entry["top_logprobs"]] == ["token_id:0"]
