"""An application around a fake model, and ways to talk to it."""

import asyncio
import json
from collections.abc import Mapping

import httpx
from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Scope

from gemma_serve.generation import ChatPrompt, GenerationRequest
from gemma_serve.messages import ChatMessage, PromptedToolForm, ToolOffer
from gemma_serve.openai_api.app import build_app
from gemma_serve.openai_api.config import ApiConfig, ToolPolicy
from gemma_serve.openai_api.limits import ApiLimits
from tests.fakes import FakeGenerationClient, FakeImageLoader

MODEL = "google/gemma-3-270m"
HELLO: Mapping[str, object] = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


def make_app(
    client: FakeGenerationClient,
    image_loader: FakeImageLoader | None = None,
    *,
    api_keys: tuple[str, ...] = (),
    cors_allow_origins: tuple[str, ...] = (),
    share_prefix_cache: bool = False,
    limits: ApiLimits | None = None,
    body_timeout_s: float = 120,
    tools: ToolPolicy | None = None,
    tool_form: PromptedToolForm = "json",
) -> FastAPI:
    config = ApiConfig(
        model_name=MODEL,
        api_keys=api_keys,
        cors_allow_origins=cors_allow_origins,
        share_prefix_cache=share_prefix_cache,
        limits=limits or ApiLimits(body_timeout_s=body_timeout_s),
        tools=tools,
        tool_form=tool_form,
    )
    return build_app(client, config, image_loader or FakeImageLoader())


def connect(app: ASGIApp) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server")


async def post_chat(app: ASGIApp, **fields: object) -> httpx.Response:
    """Say hello, with ``fields`` besides or instead."""
    async with connect(app) as http:
        # json.dumps writes what httpx refuses: NaN, Infinity and lone surrogates.
        return await http.post(
            CHAT,
            content=json.dumps({**HELLO, **fields}),
            headers={"content-type": "application/json"},
        )


async def complete(app: ASGIApp, prompt: object = "ab", **fields: object) -> httpx.Response:
    """Ask for a plain completion of ``prompt``, with ``fields`` besides."""
    async with connect(app) as http:
        return await http.post(
            COMPLETIONS,
            content=json.dumps({"model": MODEL, "prompt": prompt, **fields}),
            headers={"content-type": "application/json"},
        )


def messages_of(request: GenerationRequest) -> tuple[ChatMessage, ...]:
    """The chat that a request asks to answer."""
    assert isinstance(request.prompt, ChatPrompt)
    return request.prompt.messages


def offer_of(request: GenerationRequest) -> ToolOffer | None:
    """The tools that a request's chat tells the model of."""
    assert isinstance(request.prompt, ChatPrompt)
    return request.prompt.tools


def error_of(response: httpx.Response) -> dict[str, str | None]:
    """The error object, after checking that nothing is beside it."""
    body = response.json()
    assert list(body) == ["error"]
    assert sorted(body["error"]) == ["code", "message", "param", "type"]
    error: dict[str, str | None] = body["error"]
    return error


def counted_tokens(payload: Mapping[str, object]) -> tuple[int, int, int]:
    """Tokens of the prompt, of the answer and of both, as an answer or a chunk counts them."""
    usage = payload["usage"]
    assert isinstance(usage, dict)
    return usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]


class Exchange:
    """One chat request message by message, for what an HTTP client cannot do: leave."""

    def __init__(self, app: ASGIApp, *, send_error: OSError | None = None) -> None:
        """``send_error``: what the server raises when it can send no more text."""
        self.sent: list[Message] = []
        """What the application sent so far."""
        self._send_error = send_error
        self._to_app: asyncio.Queue[Message] = asyncio.Queue()
        self._progress = asyncio.Event()
        scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": CHAT,
            "raw_path": CHAT.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8000),
        }
        self.task = asyncio.create_task(self._run(app, scope))

    def send_body(self, **fields: object) -> None:
        self.send_bytes(json.dumps({**HELLO, **fields}).encode())

    def send_bytes(self, body: bytes, *, more_body: bool = False) -> None:
        self._to_app.put_nowait({"type": "http.request", "body": body, "more_body": more_body})

    def leave(self) -> None:
        self._to_app.put_nowait({"type": "http.disconnect"})

    async def sent_at_least(self, num_messages: int) -> None:
        while len(self.sent) < num_messages:
            self._progress.clear()
            await self._progress.wait()

    async def _run(self, app: ASGIApp, scope: Scope) -> None:
        await app(scope, self._to_app.get, self._receive_from_app)

    async def _receive_from_app(self, message: Message) -> None:
        if self._send_error is not None and message["type"] == "http.response.body":
            raise self._send_error
        self.sent.append(message)
        self._progress.set()
        if message["type"] == "http.response.body" and not message.get("more_body"):
            self.leave()  # as servers say it when all is done
            await asyncio.sleep(0)
