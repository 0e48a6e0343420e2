"""Responses that clients may come back to, in the memory of this process."""

from collections import OrderedDict
from dataclasses import dataclass
from itertools import chain

from gemma_serve.openai_api.chat_messages import Message
from gemma_serve.openai_api.responses.response_schemas import Response


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response, and the chat up to and with its answer."""

    response: Response
    messages: tuple[Message, ...]

    @property
    def num_bytes(self) -> int:
        """About what it takes, most of it images."""
        models = chain([self.response], self.messages)
        return sum(len(model.model_dump_json()) for model in models)


class ResponseStore:
    """Keeps the responses that were used last. Belongs to one event loop.

    An id is 128 random bits and opens its response to whoever knows it.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._stored: OrderedDict[str, tuple[StoredResponse, int]] = OrderedDict()

    def get(self, response_id: str) -> StoredResponse | None:
        """The response, if it is still there."""
        if response_id not in self._stored:
            return None
        self._stored.move_to_end(response_id)
        return self._stored[response_id][0]

    def put(self, stored: StoredResponse) -> None:
        """Keep it, and let go of the oldest ones if the memory does not suffice."""
        num_bytes = stored.num_bytes
        if num_bytes > self._max_bytes:
            return
        self._stored[stored.response.id] = (stored, num_bytes)
        self._num_bytes += num_bytes
        while self._num_bytes > self._max_bytes:
            _, (_, freed) = self._stored.popitem(last=False)
            self._num_bytes -= freed

    def delete(self, response_id: str) -> bool:
        """Whether there was one."""
        if response_id not in self._stored:
            return False
        self._num_bytes -= self._stored.pop(response_id)[1]
        return True
