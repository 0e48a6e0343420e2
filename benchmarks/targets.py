"""What a workload talks to: a server over HTTP, or transformers' ``generate`` in this process."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import httpx

from benchmarks.chat_client import JSONObject, stream_request
from benchmarks.serving_metrics import RequestRecord


@dataclass(frozen=True, slots=True)
class Chat:
    """One request: messages in OpenAI's form, and the exact length of the answer in tokens."""

    messages: tuple[JSONObject, ...]
    max_tokens: int


class Target(Protocol):
    """Something that answers chats."""

    async def send(self, chats: Sequence[Chat]) -> list[RequestRecord]:
        """Send all ``chats`` at once and time them. Failures are recorded, not raised."""
        ...


@dataclass(frozen=True, slots=True)
class HttpTarget:
    """A server that speaks OpenAI's protocol."""

    client: httpx.AsyncClient
    model: str
    extra_body: JSONObject = field(default_factory=dict)
    """Fields that only some servers know."""

    async def send(self, chats: Sequence[Chat]) -> list[RequestRecord]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._ask(chat)) for chat in chats]
        return [task.result() for task in tasks]

    async def _ask(self, chat: Chat) -> RequestRecord:
        body = {
            "model": self.model,
            "messages": list(chat.messages),
            "max_tokens": chat.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.extra_body,
        }
        return check_length(await stream_request(self.client, body), chat.max_tokens)


def check_length(record: RequestRecord, max_tokens: int) -> RequestRecord:
    """Turn an answer of another length into an error: its times cannot be compared."""
    if record.error is not None or record.completion_tokens == max_tokens:
        return record
    return replace(record, error=f"asked for {max_tokens} tokens, got {record.completion_tokens}")
