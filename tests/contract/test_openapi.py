"""Requests made up from our own OpenAPI document get the answers that it promises."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

from gemma_serve.generation import (
    FinishReason,
    GenerationDelta,
    GenerationRequest,
    GenerationStream,
    SampledLogprobs,
    TokenLogprob,
)
from tests.fakes import STARTED, VISION_MODEL, FakeGenerationClient, tokens_of
from tests.openai_api.harness import MODEL, make_app

schemathesis = pytest.importorskip("schemathesis", reason="a part of the extra `dev`")

TOLD = SampledLogprobs(TokenLogprob(104, -0.5, b"h"), (TokenLogprob(104, -0.5, b"h"),))


class ObligingClient(FakeGenerationClient):
    """Answers every sequence of a request with one token, and tells what is asked for."""

    async def generate(self, request: GenerationRequest) -> GenerationStream:
        stream = await super().generate(request)
        return GenerationStream(stream.started, _answer(request), stream.aclose)


async def _answer(request: GenerationRequest) -> AsyncIterator[Sequence[GenerationDelta]]:
    prompt, sampling = tokens_of(request.prompt), request.sampling
    for index in range(request.n):
        yield [
            GenerationDelta(
                index,
                "h",
                (104,),
                FinishReason.STOP,
                logprobs=() if sampling.logprobs is None else (TOLD,),
                prompt_logprobs=()
                if index or sampling.prompt_logprobs is None
                else (TOLD,) * (len(prompt) - 1),
            )
        ]


STREAMED: dict[str, dict[str, object]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "n": 2},
    "/v1/completions": {"prompt": ["Hi", "Ho"], "echo": True, "logprobs": 1},
    "/v1/responses": {"input": "Hi"},
}
APP = make_app(ObligingClient(description=VISION_MODEL, started=STARTED))
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", APP)
CHECKS = schemathesis.checks.CHECKS.get_by_names(
    [
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_schema_conformance",
    ]
)


@SCHEMA.parametrize()  # type: ignore[untyped-decorator]  # schemathesis may be absent
@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_answers_keep_to_the_document(case: Any) -> None:  # Any: as above
    if isinstance(case.body, dict) and "model" in case.body:
        case.body["model"] = MODEL  # made-up names would all be a 404
    case.call_and_validate(checks=CHECKS)


@pytest.mark.parametrize("path", STREAMED)
def test_every_event_keeps_to_the_document(path: str) -> None:
    """Made-up requests seldom ask for a stream and for nothing wrong."""
    body = {"model": MODEL, "stream": True, **STREAMED[path]}
    case = SCHEMA[path]["POST"].Case(body=body, media_type="application/json")
    response = case.call()
    assert response.headers["content-type"] == ["text/event-stream; charset=utf-8"]
    case.validate_response(response, checks=CHECKS)
