"""The input items of a response request, and the chat messages that they are.

Clients replay whole output items of any server, so unknown keys are skipped here.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, Discriminator, Field, Tag

from gemma_serve.errors import InvalidRequestError
from gemma_serve.openai_api.chat_messages import (
    AssistantMessage,
    FunctionCall,
    ImageContentPart,
    ImageUrl,
    Message,
    RefusalContentPart,
    SystemMessage,
    TextContentPart,
    ToolCallItem,
    ToolMessage,
    UserMessage,
)
from gemma_serve.openai_api.field_types import Text, check_text_or_list


class TextInput(BaseModel):
    """Text; ``output_text`` is what a model said earlier."""

    type: Literal["input_text", "output_text", "text"]
    text: Text


class RefusalInput(BaseModel):
    """Text with which an assistant declined."""

    type: Literal["refusal"]
    refusal: Text


class ImageInput(BaseModel):
    """An image."""

    type: Literal["input_image"]
    image_url: Annotated[Text, Field(min_length=1, description="An https: or a data: URL.")]
    detail: Literal["auto", "low", "high", "original"] | None = Field(
        default=None, description="original: as closely as there is, which is high."
    )


def _text_as_part(value: object) -> object:
    value = check_text_or_list(value)
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


UserPart = Annotated[TextInput | ImageInput, Field(discriminator="type")]
AssistantPart = Annotated[TextInput | RefusalInput, Field(discriminator="type")]
TextContent = Annotated[
    list[TextInput], BeforeValidator(_text_as_part, json_schema_input_type=str | list[TextInput])
]
UserContent = Annotated[
    list[UserPart], BeforeValidator(_text_as_part, json_schema_input_type=str | list[UserPart])
]
AssistantContent = Annotated[
    list[AssistantPart],
    BeforeValidator(_text_as_part, json_schema_input_type=str | list[AssistantPart]),
]


class SystemInput(BaseModel):
    """Instructions in the midst of the input."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer"]
    content: TextContent


class UserInput(BaseModel):
    """What the user says and shows."""

    type: Literal["message"] = "message"
    role: Literal["user"]
    content: UserContent


class AssistantInput(BaseModel):
    """What the model said."""

    type: Literal["message"] = "message"
    role: Literal["assistant"]
    content: AssistantContent


class FunctionCallInput(BaseModel):
    """A call that the model made earlier."""

    type: Literal["function_call"]
    call_id: Text
    name: Text
    arguments: Text = Field(description="A JSON object as a string.")


class FunctionCallOutput(BaseModel):
    """The result of one call."""

    type: Literal["function_call_output"]
    call_id: Text
    output: TextContent


class ReasoningInput(BaseModel):
    """Another model's thoughts, which are left out of the prompt."""

    type: Literal["reasoning"]


class ItemReference(BaseModel):
    """An item of a stored response, in its place."""

    type: Literal["item_reference"] | None = None
    id: Text


def _kind_of_item(value: object) -> str | None:
    if not isinstance(value, dict):
        return None
    kind = value.get("type") or ("message" if "role" in value else "item_reference")
    if kind == "message":
        role = value.get("role")
        return role if isinstance(role, str) and role in _MESSAGE_ROLES else None
    return kind if isinstance(kind, str) and kind in _OTHER_KINDS else None


_MESSAGE_ROLES = frozenset(["user", "assistant", "system", "developer"])
_OTHER_KINDS = frozenset(["function_call", "function_call_output", "reasoning", "item_reference"])

InputItem = Annotated[
    Annotated[UserInput, Tag("user")]
    | Annotated[AssistantInput, Tag("assistant")]
    | Annotated[SystemInput, Tag("system")]
    | Annotated[SystemInput, Tag("developer")]
    | Annotated[FunctionCallInput, Tag("function_call")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")]
    | Annotated[ReasoningInput, Tag("reasoning")]
    | Annotated[ItemReference, Tag("item_reference")],
    Discriminator(
        _kind_of_item,
        custom_error_type="unsupported",
        custom_error_message="An item must be a message of a user, assistant, system or developer, "
        "a function_call, a function_call_output, a reasoning or an item_reference",
    ),
]


def messages_of(
    items: Sequence[InputItem], referred: Callable[[str], Message | None]
) -> Iterator[tuple[int, Message]]:
    """The chat messages that the items are, each with the index of its first item.

    ``referred``: the message of an item's id. Raises ``InvalidRequestError`` if there is none.
    """
    return with_calls_joined(_each_message(items, referred))


def _each_message(
    items: Sequence[InputItem], referred: Callable[[str], Message | None]
) -> Iterator[tuple[int, Message]]:
    for index, item in enumerate(items):
        if isinstance(item, ReasoningInput):
            continue
        if not isinstance(item, ItemReference):
            yield index, message_of(item)
        elif (message := referred(item.id)) is not None:
            yield index, message
        else:
            raise InvalidRequestError(
                f"There is no stored item {item.id[:64]!r}",
                param=f"input[{index}].id",
                code="invalid_value",
            )


def with_calls_joined(messages: Iterable[tuple[int, Message]]) -> Iterator[tuple[int, Message]]:
    """What an assistant says and what it then calls is one message of a chat."""
    last: tuple[int, Message] | None = None
    for index, message in messages:
        if last is not None and (joined := _join_calls(last[1], message)) is not None:
            last = last[0], joined
            continue
        if last is not None:
            yield last
        last = index, message
    if last is not None:
        yield last


def _join_calls(earlier: Message, later: Message) -> AssistantMessage | None:
    """Both as one, if ``later`` is calls that the assistant made right after ``earlier``."""
    if not isinstance(earlier, AssistantMessage) or not isinstance(later, AssistantMessage):
        return None
    if later.content or not later.tool_calls:
        return None
    calls = [*(earlier.tool_calls or ()), *later.tool_calls]
    return earlier.model_copy(update={"tool_calls": calls})


SpokenItem = UserInput | AssistantInput | SystemInput | FunctionCallInput | FunctionCallOutput


def message_of(item: SpokenItem) -> Message:
    """The chat message that an item is."""
    match item:
        case UserInput(content=parts):
            return UserMessage(role="user", content=[_user_part(part) for part in parts])
        case AssistantInput(content=parts):
            said = [_assistant_part(part) for part in parts]
            return AssistantMessage(role="assistant", content=said)
        case SystemInput(role=role, content=parts):
            return SystemMessage(role=role, content=[_text_part(part) for part in parts])
        case FunctionCallInput(call_id=call_id, name=name, arguments=arguments):
            function = FunctionCall(name=name, arguments=arguments)
            call = ToolCallItem(id=call_id, function=function)
            return AssistantMessage(role="assistant", tool_calls=[call])
        case FunctionCallOutput(call_id=call_id, output=parts):
            texts = [_text_part(part) for part in parts]
            return ToolMessage(role="tool", content=texts, tool_call_id=call_id)


def _text_part(part: TextInput) -> TextContentPart:
    return TextContentPart(type="text", text=part.text)


def _user_part(part: TextInput | ImageInput) -> TextContentPart | ImageContentPart:
    if isinstance(part, TextInput):
        return _text_part(part)
    detail = "high" if part.detail == "original" else part.detail
    image_url = ImageUrl(url=part.image_url, detail=detail)
    return ImageContentPart(type="image_url", image_url=image_url)


def _assistant_part(part: TextInput | RefusalInput) -> TextContentPart | RefusalContentPart:
    if isinstance(part, TextInput):
        return _text_part(part)
    return RefusalContentPart(type="refusal", refusal=part.refusal)
