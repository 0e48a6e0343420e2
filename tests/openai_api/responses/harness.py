"""Ways to ask for responses and to read them."""

import json
from typing import Any

import httpx
from fastapi import FastAPI

from gemma_serve.generation import GenerationRequest
from gemma_serve.messages import ChatMessage, Role, TextPart
from tests.fakes import FakeGenerationClient, answer
from tests.openai_api.harness import MODEL, connect, make_app

RESPONSES = "/v1/responses"
Json = dict[str, Any]  # parsed JSON


async def post(app: FastAPI, content: object = "Hello", **fields: object) -> httpx.Response:
    async with connect(app) as http:
        body = {"model": MODEL, "input": content, **fields}
        return await http.post(
            RESPONSES,
            content=json.dumps(body),
            headers={"content-type": "application/json"},
        )


async def requested(content: object = "Hello", **fields: object) -> GenerationRequest:
    """What the model is asked."""
    client = FakeGenerationClient(*answer())
    response = await post(make_app(client), content, **fields)
    assert response.status_code == 200, response.text
    return client.requests[0]


def events_of(response: httpx.Response) -> list[Json]:
    """The events, after checking that each is called what its type says."""
    events = []
    for event in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        parsed = json.loads(data.removeprefix("data: "))
        assert name == f"event: {parsed['type']}"
        events.append(parsed)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def said(role: Role, text: str) -> ChatMessage:
    return ChatMessage(role, (TextPart(text),))
