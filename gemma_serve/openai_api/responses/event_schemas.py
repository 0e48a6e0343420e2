"""The events of a streamed response, as the OpenAPI document states them."""

from typing import Annotated, Literal

from pydantic import Field, RootModel

from gemma_serve.openai_api.response_schemas import ResponseModel
from gemma_serve.openai_api.responses.response_schemas import (
    OutputItem,
    OutputLogprob,
    OutputText,
    Response,
)


class _Event(ResponseModel):
    sequence_number: int


class ResponseStarted(_Event):
    """The request is admitted; there is no output yet."""

    type: Literal["response.created", "response.in_progress"]
    response: Response


class ResponseEnded(_Event):
    """The whole response, as far as it came; the last event."""

    type: Literal["response.completed", "response.incomplete", "response.failed"]
    response: Response


class ItemChanged(_Event):
    """An item begins, still empty, or is complete."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: OutputItem


class _ContentEvent(_Event):
    item_id: str
    output_index: int
    content_index: int


class ContentPartChanged(_ContentEvent):
    """The text of a message begins, still empty, or is complete."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    part: OutputText


class TextDelta(_ContentEvent):
    """More of a message's text."""

    type: Literal["response.output_text.delta"]
    delta: str
    logprobs: list[OutputLogprob]


class TextDone(_ContentEvent):
    """The whole text of a message."""

    type: Literal["response.output_text.done"]
    text: str
    logprobs: list[OutputLogprob]


class ArgumentsDelta(_Event):
    """More of a call's arguments."""

    type: Literal["response.function_call_arguments.delta"]
    item_id: str
    output_index: int
    delta: str


class ArgumentsDone(_Event):
    """The whole arguments of a call."""

    type: Literal["response.function_call_arguments.done"]
    item_id: str
    output_index: int
    name: str
    arguments: str


class StreamError(_Event):
    """What went wrong; ``response.failed`` follows."""

    type: Literal["error"]
    code: Literal["server_error"]
    message: str
    param: None


class ResponseEvent(
    RootModel[
        Annotated[
            ResponseStarted
            | ResponseEnded
            | ItemChanged
            | ContentPartChanged
            | TextDelta
            | TextDone
            | ArgumentsDelta
            | ArgumentsDone
            | StreamError,
            Field(discriminator="type"),
        ]
    ]
):
    """One event of a stream; what it has depends on its type."""
