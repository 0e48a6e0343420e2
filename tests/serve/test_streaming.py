import json

import httpx
import pytest
from openai import AsyncOpenAI

from tests.serve.conftest import Server


def chat(script: str, *, stream: bool) -> dict[str, object]:
    messages = [{"role": "user", "content": script}]
    return {"model": "scripted", "messages": messages, "stream": stream}


async def post(server: Server, script: str, *, stream: bool) -> httpx.Response:
    async with httpx.AsyncClient(timeout=30) as client:
        return await client.post(
            f"{server.url}/v1/chat/completions", json=chat(script, stream=stream)
        )


async def test_openai_sdk_streams_the_answer(server: Server) -> None:
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        stream = await client.chat.completions.create(
            model="scripted", messages=[{"role": "user", "content": "say Pa ris"}], stream=True
        )
        text = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(text) == "Paris"


async def test_openai_sdk_gets_the_whole_answer(server: Server) -> None:
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        completion = await client.chat.completions.create(
            model="scripted", messages=[{"role": "user", "content": "say Pa ris"}]
        )
    assert completion.choices[0].message.content == "Paris"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("script", ["say hello", "too long"])
async def test_clients_request_id_comes_back_once(
    server: Server, script: str, stream: bool
) -> None:
    """Serve's proxy appends its own to ours."""
    async with httpx.AsyncClient(headers={"x-request-id": "abc-123"}, timeout=30) as client:
        response = await client.post(
            f"{server.url}/v1/chat/completions", json=chat(script, stream=stream)
        )
    assert response.headers.get_list("x-request-id") == ["abc-123"]


async def test_request_without_an_id_gets_one(server: Server) -> None:
    response = await post(server, "say hello", stream=False)
    assert len(response.headers.get_list("x-request-id")) == 1


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("script", "status", "message"),
    [
        ("too long", 400, "maximum context length is 100 tokens"),
        ("full", 429, "The queue is full."),
        ("crash", 500, "The model failed while it worked on the request."),
    ],
)
async def test_failure_before_the_first_token_is_a_real_status(
    server: Server, script: str, status: int, message: str, stream: bool
) -> None:
    response = await post(server, script, stream=stream)
    assert response.status_code == status
    assert message in response.json()["error"]["message"]


async def test_fields_of_an_error_survive_the_way_from_the_replica(server: Server) -> None:
    too_long = await post(server, "too long", stream=False)
    assert too_long.json()["error"]["param"] == "messages"
    assert too_long.json()["error"]["code"] == "context_length_exceeded"
    assert (await post(server, "full", stream=False)).headers["retry-after"] == "7"


async def test_failure_after_the_first_token_is_an_error_event(server: Server) -> None:
    response = await post(server, "crash later", stream=True)
    events = [line for line in response.text.split("\n\n") if line]
    error = next(event for event in events if '"error"' in event)
    assert response.status_code == 200
    assert "so far" in response.text
    assert json.loads(error.removeprefix("data: "))["error"]["message"] == (
        "The model failed while it worked on the request."
    )
    assert "secret" not in response.text
