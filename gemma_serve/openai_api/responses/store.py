"""Responses that clients may come back to, in the memory of this process."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain

from gemma_serve.openai_api.chat_messages import Message
from gemma_serve.openai_api.responses.response_schemas import Response
from gemma_serve.openai_api.responses.stored_items import StoredItem


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response, and the chat up to and with its answer."""

    response: Response
    messages: tuple[Message, ...]
    input: tuple[StoredItem, ...] = ()
    """What it answered; earlier turns are not among them."""
    output: Mapping[str, Message] = field(default_factory=dict)
    """The items of the answer by id."""

    @property
    def num_bytes(self) -> int:
        """About what it takes, most of it images. Items share them with the messages."""
        models = chain([self.response], self.messages)
        return sum(len(model.model_dump_json()) for model in models)

    def item_messages(self) -> Iterator[tuple[str, Message]]:
        """The items of input and output by id."""
        yield from ((item.id, item.message) for item in self.input)
        yield from self.output.items()


class ResponseStore:
    """Keeps the responses that were used last. Belongs to one event loop.

    An id is 128 random bits and opens its response to whoever knows it.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._stored: OrderedDict[str, tuple[StoredResponse, int]] = OrderedDict()
        self._messages: dict[str, Message] = {}
        """Of all items, by id."""

    def get(self, response_id: str) -> StoredResponse | None:
        """The response, if it is still there."""
        if response_id not in self._stored:
            return None
        self._stored.move_to_end(response_id)
        return self._stored[response_id][0]

    def message(self, item_id: str) -> Message | None:
        """An item of a response that is still there."""
        return self._messages.get(item_id)

    def put(self, stored: StoredResponse) -> None:
        """Keep it, and let go of the oldest ones if the memory does not suffice."""
        num_bytes = stored.num_bytes
        if num_bytes > self._max_bytes:
            return
        self._stored[stored.response.id] = (stored, num_bytes)
        self._messages.update(stored.item_messages())
        self._num_bytes += num_bytes
        while self._num_bytes > self._max_bytes:
            self.delete(next(iter(self._stored)))

    def delete(self, response_id: str) -> bool:
        """Whether there was one."""
        if response_id not in self._stored:
            return False
        stored, num_bytes = self._stored.pop(response_id)
        self._num_bytes -= num_bytes
        for item_id, _ in stored.item_messages():
            del self._messages[item_id]
        return True
