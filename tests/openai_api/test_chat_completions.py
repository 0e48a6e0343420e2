"""The answer to a chat completion request, whole and streamed."""

import json
import logging
import re
from dataclasses import replace

import pytest
from httpx import Response

from gemma_serve.errors import (
    ContextLengthError,
    GenerationError,
    OverloadedError,
    UnavailableError,
)
from gemma_serve.generation import FinishReason, GenerationDelta
from gemma_serve.openai_api.response_schemas import ChatCompletionChunk
from tests.fakes import FakeGenerationClient, answer, delta
from tests.openai_api.harness import MODEL, error_of, make_app, post_chat


def events_of(response: Response) -> list[dict[str, object]]:
    """The JSON events, after checking that ``[DONE]`` and nothing else follows them."""
    assert response.text.endswith("\n\n")
    *events, done = response.text.removesuffix("\n\n").split("\n\n")
    assert done == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


def choices_of(response: Response) -> list[object]:
    """The one choice of every chunk."""
    return [event["choices"][0] for event in events_of(response)]  # type: ignore[index]  # JSON


def content_chunk(text: str, index: int = 0) -> dict[str, object]:
    return {"index": index, "delta": {"content": text}, "logprobs": None, "finish_reason": None}


def finish_chunk(reason: str, index: int = 0) -> dict[str, object]:
    return {"index": index, "delta": {}, "logprobs": None, "finish_reason": reason}


def role_chunk(index: int = 0) -> dict[str, object]:
    return {
        "index": index,
        "delta": {"role": "assistant", "content": "", "refusal": None},
        "logprobs": None,
        "finish_reason": None,
    }


async def test_whole_answer_has_every_field_of_the_contract() -> None:
    client = FakeGenerationClient(*answer("Hel", "lo"))
    response = await post_chat(make_app(client))
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{32}", body.pop("id"))
    assert isinstance(body.pop("created"), int)
    assert body == {
        "object": "chat.completion",
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "Hello",
                    "refusal": None,
                    "annotations": [],
                },
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 7,
            "completion_tokens": 3,
            "total_tokens": 10,
            "prompt_tokens_details": {"cached_tokens": 2, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": 0,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        },
    }
    assert len(client.closed) == 1


async def test_stream_is_role_then_content_then_finish_then_done() -> None:
    client = FakeGenerationClient(*answer("Hel", "lo", finish_reason=FinishReason.LENGTH))
    response = await post_chat(make_app(client), stream=True)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert choices_of(response) == [
        role_chunk(),
        content_chunk("Hel"),
        content_chunk("lo"),
        finish_chunk("length"),
    ]
    assert len(client.closed) == 1


async def test_every_chunk_carries_the_same_id_and_fits_its_documented_model() -> None:
    app = make_app(FakeGenerationClient(*answer("Hi")))
    response = await post_chat(app, stream=True, stream_options={"include_usage": True})
    chunks = [ChatCompletionChunk.model_validate(event) for event in events_of(response)]
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1
    assert chunks[0].model == MODEL


async def test_usage_chunk_comes_last_and_only_when_asked_for() -> None:
    app = make_app(FakeGenerationClient(*answer("Hi")))
    *chunks, last = events_of(
        await post_chat(app, stream=True, stream_options={"include_usage": True})
    )
    assert [chunk["usage"] for chunk in chunks] == [None, None, None]
    assert last["choices"] == []
    assert last["usage"] == (await post_chat(app)).json()["usage"]
    for options in (None, {}, {"include_usage": False}, {"include_usage": None}):
        silent = events_of(await post_chat(app, stream=True, stream_options=options))
        assert [("usage" in chunk, len(silent)) for chunk in silent] == [(False, 3)] * 3


async def test_every_chunk_counts_the_tokens_so_far_when_asked_to() -> None:
    app = make_app(FakeGenerationClient(*answer("a", "b")))
    for include_usage, expected in ((True, [0, 1, 2, 3, 3]), (False, [None] * 4)):
        options = {"include_usage": include_usage, "continuous_usage_stats": True}
        chunks = events_of(await post_chat(app, stream=True, stream_options=options))
        usages = [ChatCompletionChunk.model_validate(chunk).usage for chunk in chunks]
        assert [usage and usage.completion_tokens for usage in usages] == expected


@pytest.mark.parametrize("reason", ["END", 5])
async def test_what_stopped_a_choice_is_told_with_its_end(reason: str | int) -> None:
    last = replace(delta("", FinishReason.STOP), stop_reason=reason)
    app = make_app(FakeGenerationClient([delta("Hi")], [last]))
    (choice,) = (await post_chat(app)).json()["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", reason)
    chunks = choices_of(await post_chat(app, stream=True))
    assert chunks[1:] == [content_chunk("Hi"), finish_chunk("stop") | {"stop_reason": reason}]


async def test_empty_answer_has_a_role_and_a_finish_chunk() -> None:
    response = await post_chat(make_app(FakeGenerationClient(*answer())), stream=True)
    assert choices_of(response) == [role_chunk(), finish_chunk("stop")]


async def test_deltas_without_text_make_no_chunk() -> None:
    client = FakeGenerationClient([delta("")], [], *answer("Hi"))
    response = await post_chat(make_app(client), stream=True)
    assert choices_of(response) == [role_chunk(), content_chunk("Hi"), finish_chunk("stop")]


async def test_deltas_of_one_step_become_one_chunk_per_choice() -> None:
    step = [delta("a"), delta("x", index=1), delta("b"), delta("c", FinishReason.STOP)]
    client = FakeGenerationClient(step, [delta("y", FinishReason.LENGTH, index=1)])
    response = await post_chat(make_app(client), stream=True, n=2)
    assert choices_of(response) == [
        role_chunk(0),
        role_chunk(1),
        content_chunk("abc"),
        finish_chunk("stop"),
        content_chunk("x", index=1),
        content_chunk("y", index=1),
        finish_chunk("length", index=1),
    ]


async def test_whole_answer_keeps_the_choices_apart() -> None:
    step = [delta("a"), delta("x", FinishReason.LENGTH, index=1), delta("b", FinishReason.STOP)]
    body = (await post_chat(make_app(FakeGenerationClient(step)), n=2)).json()
    assert [
        (choice["index"], choice["message"]["content"], choice["finish_reason"])
        for choice in body["choices"]
    ] == [(0, "ab", "stop"), (1, "x", "length")]
    assert body["usage"]["completion_tokens"] == 3


async def test_all_tokens_of_a_delta_are_counted() -> None:
    client = FakeGenerationClient([GenerationDelta(0, "🙂", (1, 2, 3), FinishReason.STOP)])
    assert (await post_chat(make_app(client))).json()["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (
            ContextLengthError.of(prompt_tokens=9, max_model_len=8),
            400,
            "context_length_exceeded",
        ),
        (OverloadedError("The queue is full."), 429, "rate_limit_exceeded"),
        (UnavailableError("The model is loading."), 503, "model_unavailable"),
        (RuntimeError("CUDA error at 0xdead"), 500, None),
    ],
)
async def test_error_at_admission_is_a_real_status(
    error: Exception, status: int, code: str | None, stream: bool
) -> None:
    client = FakeGenerationClient(generate_error=error)
    response = await post_chat(make_app(client), stream=stream)
    assert response.status_code == status
    assert error_of(response)["code"] == code
    assert "CUDA" not in response.text


async def test_error_in_the_middle_of_a_stream_is_an_event_without_choices() -> None:
    client = FakeGenerationClient([delta("Hel")], GenerationError("The engine failed."))
    response = await post_chat(make_app(client), stream=True)
    assert response.status_code == 200
    *chunks, last = events_of(response)
    assert len(chunks) == 2
    assert last == {
        "error": {
            "message": "The engine failed.",
            "type": "server_error",
            "param": None,
            "code": None,
        }
    }
    assert len(client.closed) == 1


async def test_unexpected_error_in_a_stream_is_logged_and_not_shown(
    caplog: pytest.LogCaptureFixture,
) -> None:
    client = FakeGenerationClient(RuntimeError("CUDA error at 0xdead"))
    response = await post_chat(make_app(client), stream=True)
    assert events_of(response)[-1]["error"] == {
        "message": "The server failed to answer.",
        "type": "server_error",
        "param": None,
        "code": None,
    }
    assert [str(record.exc_info[1]) for record in caplog.records if record.exc_info] == [
        "CUDA error at 0xdead"
    ]


async def test_error_in_the_middle_of_a_whole_answer_is_a_500() -> None:
    client = FakeGenerationClient([delta("Hel")], GenerationError("The engine failed."))
    response = await post_chat(make_app(client))
    assert response.status_code == 500
    assert error_of(response)["message"] == "The engine failed."
    assert len(client.closed) == 1


@pytest.mark.parametrize("script", [[], [[delta("Hel")]], [[delta("x", FinishReason.STOP)]]])
async def test_stream_that_ends_without_every_finish_reason_is_an_error(
    script: list[list[GenerationDelta]],
) -> None:
    app = make_app(FakeGenerationClient(*script))
    expected = "The model stopped before its answer was complete."
    assert error_of(await post_chat(app, n=2))["message"] == expected
    last = events_of(await post_chat(app, n=2, stream=True))[-1]
    assert last["error"]["message"] == expected  # type: ignore[index]  # JSON


async def test_engine_logs_the_request_by_the_same_id_as_the_answers_header() -> None:
    client = FakeGenerationClient(*answer())
    response = await post_chat(make_app(client), request_id="mine")
    assert [r.request_id for r in client.requests] == [response.headers["x-request-id"]]
    assert "mine" not in response.text


async def test_finished_request_is_one_log_line_without_any_text(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "gemma_serve")
    response = await post_chat(make_app(FakeGenerationClient(*answer("secret"))))
    (line,) = caplog.messages
    assert f"request_id={response.headers['x-request-id']} completion_id=" in line
    assert f"completion_id={response.json()['id']} reasons=stop prompt_tokens=7" in line
    assert "secret" not in line


async def test_unknown_fields_are_logged_once_and_ignored(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, "gemma_serve")
    response = await post_chat(
        make_app(FakeGenerationClient(*answer())), num_ctx=4096, mirostat=1, store=True
    )
    assert response.status_code == 200
    ignored = [line for line in caplog.messages if line.startswith("ignored")]
    assert [line.partition("fields=")[2] for line in ignored] == [
        "['mirostat', 'num_ctx', 'store']"
    ]


async def test_token_ids_are_told_if_asked_for() -> None:
    app = make_app(FakeGenerationClient(*answer("Hi")))
    whole = (await post_chat(app, return_token_ids=True)).json()
    assert whole["prompt_token_ids"] == [2]
    assert whole["choices"][0]["token_ids"] == [5, 5]
    role, *chunks = events_of(await post_chat(app, return_token_ids=True, stream=True))
    assert role["prompt_token_ids"] == [2]
    token_ids = [chunk["choices"][0].get("token_ids") for chunk in chunks]  # type: ignore[index]
    assert token_ids == [[5], [5]]


async def test_stream_is_these_bytes() -> None:
    app = make_app(FakeGenerationClient(*answer("é")))
    response = await post_chat(app, stream=True, stream_options={"include_usage": True})
    text = re.sub(
        r'"id":"[^"]+","object":"chat.completion.chunk","created":\d+,', "", response.text
    )
    head = f'data: {{"model":"{MODEL}","choices":'
    tail = '"logprobs":null,"finish_reason":null}],"usage":null}\n\n'
    assert text == (
        head
        + '[{"index":0,"delta":{"role":"assistant","content":"","refusal":null},'
        + tail
        + head
        + '[{"index":0,"delta":{"content":"é"},'
        + tail
        + head
        + '[{"index":0,"delta":{},'
        + tail.replace("null}]", '"stop"}]')
        + head
        + '[],"usage":{"prompt_tokens":7,"completion_tokens":2,"total_tokens":9,'
        '"prompt_tokens_details":{"cached_tokens":2,"audio_tokens":0},'
        '"completion_tokens_details":{"reasoning_tokens":0,"audio_tokens":0,'
        '"accepted_prediction_tokens":0,"rejected_prediction_tokens":0}}}\n\n'
        "data: [DONE]\n\n"
    )
