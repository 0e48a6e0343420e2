"""The input of a stored response, item by item, as it is told again and referred to."""

import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from gemma_serve.openai_api.chat_messages import Message
from gemma_serve.openai_api.response_schemas import ResponseModel
from gemma_serve.openai_api.responses.input_items import (
    AssistantInput,
    FunctionCallInput,
    FunctionCallOutput,
    InputItem,
    ItemReference,
    ReasoningInput,
    message_of,
)

_PREFIXES: Mapping[type, str] = {FunctionCallInput: "fc", FunctionCallOutput: "fco"}


@dataclass(frozen=True, slots=True)
class StoredItem:
    """One item with the id that it was given."""

    id: str
    told: Mapping[str, object]
    """As it is told again."""
    message: Message


ListedItem = dict[str, object]
"""An item and its ``id``."""


class InputItemList(ResponseModel):
    """A page of a response's input."""

    object: Literal["list"] = "list"
    data: list[ListedItem]
    first_id: str | None
    last_id: str | None
    has_more: bool


def stored_items(items: Sequence[InputItem]) -> Iterator[StoredItem]:
    """``items`` with ids of their own. Those that are only referred to are stored already."""
    for item in items:
        if isinstance(item, ItemReference | ReasoningInput):
            continue
        item_id = f"{_PREFIXES.get(type(item), 'msg')}_{uuid.uuid4().hex}"
        told = {"id": item_id, **item.model_dump(exclude_none=True), "status": "completed"}
        if isinstance(item, AssistantInput):
            told["content"] = [_said(part) for part in item.model_dump()["content"]]
        yield StoredItem(item_id, told, message_of(item))


def page_of(
    items: Sequence[StoredItem], *, limit: int, order: Literal["asc", "desc"], after: str | None
) -> InputItemList | None:
    """Up to ``limit`` items behind ``after``; ``None``: there is no such item."""
    ordered = list(items if order == "asc" else reversed(items))
    start = 0
    if after is not None:
        positions = {item.id: position for position, item in enumerate(ordered)}
        if after not in positions:
            return None
        start = positions[after] + 1
    page = ordered[start : start + limit]
    return InputItemList(
        data=[dict(item.told) for item in page],
        first_id=page[0].id if page else None,
        last_id=page[-1].id if page else None,
        has_more=start + limit < len(ordered),
    )


def _said(part: Mapping[str, object]) -> dict[str, object]:
    """What an assistant says is output, whatever the client called it."""
    if part["type"] == "refusal":
        return dict(part)
    return {"type": "output_text", "text": part["text"], "annotations": [], "logprobs": []}
