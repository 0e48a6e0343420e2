"""One streamed chat request, timed: what every benchmark over HTTP is made of."""

import base64
import json
import mimetypes
import random
from collections.abc import AsyncIterator
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import httpx

from benchmarks.serving_metrics import RequestRecord

WORDS: Final = (
    "apple bridge cloud dance earth flame green house island jungle kitchen light market night "
    "ocean paper quiet river stone table under valley water yellow zebra bread chair dream engine "
    "forest garden horse image juice king lemon mountain north orange piano queen rain silver train"
)

JSONObject = dict[str, Any]


class StreamError(Exception):
    """The endpoint refused the request, or its stream broke; the message says how."""


def make_prompt(name: str, num_words: int) -> str:
    """Return ``num_words`` words that ``name`` determines and opens."""
    words = random.Random(name).choices(WORDS.split(), k=max(0, num_words - 1))
    return " ".join([name, *words])


async def stream_request(client: httpx.AsyncClient, body: JSONObject) -> RequestRecord:
    """Send one request and time its chunks. Failures are recorded, not raised."""
    started_s = perf_counter()
    chunk_times_s: list[float] = []
    texts: list[str] = []
    usage: JSONObject = {}
    error: str | None = None
    try:
        async for chunk in read_chunks(client, body):
            usage = chunk.get("usage") or usage
            choices = chunk.get("choices", ())
            if any(_has_text(choice) for choice in choices):
                chunk_times_s.append(perf_counter())
            texts += [(choice.get("delta") or {}).get("content") or "" for choice in choices]
    except (httpx.HTTPError, StreamError, json.JSONDecodeError) as failure:
        error = f"{type(failure).__name__}: {failure}"[:200]
    return RequestRecord(
        started_s=started_s,
        ended_s=perf_counter(),
        chunk_times_s=tuple(chunk_times_s),
        prompt_tokens=usage.get("prompt_tokens", 0),
        # Servers without stream_options send about one token per chunk.
        completion_tokens=usage.get("completion_tokens", len(chunk_times_s)),
        text="".join(texts),
        error=error,
    )


async def read_chunks(client: httpx.AsyncClient, body: JSONObject) -> AsyncIterator[JSONObject]:
    """Yield the chunks of one streamed completion.

    It ends with ``[DONE]``, or, as ``transformers serve`` has it, after a finish reason.
    """
    finished = False
    async with client.stream("POST", "chat/completions", json=body) as response:
        if response.status_code != 200:
            answer = (await response.aread()).decode(errors="replace")
            raise StreamError(f"status {response.status_code}: {answer}")
        async for line in response.aiter_lines():
            field, _, value = line.partition(":")
            if field != "data":
                continue
            if value.strip() == "[DONE]":
                return
            chunk: JSONObject = json.loads(value)
            if "error" in chunk:
                raise StreamError(f"error event: {chunk['error']}")
            finished |= any(choice.get("finish_reason") for choice in chunk.get("choices", ()))
            yield chunk
    if not finished:
        raise StreamError("the stream ended before [DONE]")


def _has_text(choice: JSONObject) -> bool:
    delta = choice.get("delta") or {}
    return any(delta.get(key) for key in ("content", "reasoning_content", "tool_calls"))


async def find_model(client: httpx.AsyncClient) -> str:
    """Return the first model that the endpoint lists."""
    response = await client.get("models")
    response.raise_for_status()
    return str(response.json()["data"][0]["id"])


def read_image_url(path: Path) -> str:
    media_type = mimetypes.guess_type(path)[0] or "image/png"
    return f"data:{media_type};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
