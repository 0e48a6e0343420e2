"""A response request as the chat completion request that asks for the same."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from pydantic import ValidationError

from gemma_serve.errors import InvalidRequestError, RequestError
from gemma_serve.openai_api.chat_messages import Message, SystemMessage, TextContentPart
from gemma_serve.openai_api.chat_schemas import ChatCompletionRequest
from gemma_serve.openai_api.requesters import RequesterFields
from gemma_serve.openai_api.responses.input_items import messages_of
from gemma_serve.openai_api.responses.request_schemas import (
    AllowedFunctions,
    JsonObjectFormat,
    JsonSchemaFormat,
    NamedFunction,
    ResponseRequest,
)
from gemma_serve.openai_api.sampling_fields import TokenFields
from gemma_serve.openai_api.structured_outputs import StructuredOutputFields
from gemma_serve.openai_api.tool_schemas import ChoiceMode
from gemma_serve.openai_api.unsupported_fields import UnsupportedFields

_NAMES: Final[Mapping[str, str]] = {
    "messages": "input",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "max_completion_tokens": "max_output_tokens",
}
"""The chat's fields that responses call otherwise."""

_PROMPT_FIELDS: Final = (
    "chat_template_kwargs",
    "continue_final_message",
    "add_generation_prompt",
    "truncate_prompt_tokens",
)


@dataclass(frozen=True, slots=True)
class ResponseChat:
    """The chat that a response continues."""

    messages: tuple[Message, ...]
    """Earlier turns and the input; the instructions are not among them."""
    request: ChatCompletionRequest
    param_of_message: tuple[str, ...]
    """By index of the chat request's messages: what the client calls each."""

    @contextmanager
    def own_names(self) -> Iterator[None]:
        """Raise mistakes in the chat as mistakes in the fields that the client has sent."""
        try:
            yield
        except RequestError as error:
            error.param = self._own_name(error.param)
            raise

    def _own_name(self, param: str | None) -> str | None:
        if param is None:
            return None
        if param.startswith("messages["):
            index, _, path = param.removeprefix("messages[").partition("]")
            return self.param_of_message[int(index)] + path.removesuffix(".url")
        if param.startswith(("tools[", "tool_choice.")):
            # Responses have the members of a chat's tool one level up.
            return param.replace(".allowed_tools.", ".", 1).replace(".function.", ".", 1)
        for name, own_name in _NAMES.items():
            if param == name or param.startswith((f"{name}.", f"{name}[")):
                return own_name + param.removeprefix(name)
        return param


def translate(
    body: ResponseRequest,
    history: Sequence[Message],
    referred: Callable[[str], Message | None],
) -> ResponseChat:
    """``history``: the chat of the previous response. ``referred``: a stored item by its id.

    Raises ``InvalidRequestError``.
    """
    instructions = _instructions(body)
    said = list(messages_of(body.input, referred))
    params = [
        *("instructions" for _ in instructions),
        *("previous_response_id" for _ in history),
        *(f"input[{index}]" for index, _ in said),
    ]
    messages = (*history, *(message for _, message in said))
    try:
        request = _chat_request(body, [*instructions, *messages])
    except ValidationError as error:
        raise _refusal(error) from None
    return ResponseChat(messages, request, tuple(params))


def _instructions(body: ResponseRequest) -> list[Message]:
    if not body.instructions:
        return []
    text = TextContentPart(type="text", text=body.instructions)
    return [SystemMessage(role="system", content=[text])]


def _chat_request(body: ResponseRequest, messages: list[Message]) -> ChatCompletionRequest:
    names = (*TokenFields.model_fields, *RequesterFields.model_fields)
    fields: dict[str, object] = {name: getattr(body, name) for name in names}
    return ChatCompletionRequest.model_validate(
        {
            **fields,
            **_fields_of_chats(body),
            "model": body.model,
            "messages": messages,
            "max_completion_tokens": body.max_output_tokens,
            "logprobs": body.wants_logprobs,
            "top_logprobs": body.top_logprobs,
            **_response_format(body),
            "tools": _tools(body),
            "tool_choice": _tool_choice(body),
            "parallel_tool_calls": body.parallel_tool_calls,
        }
    )


def _fields_of_chats(body: ResponseRequest) -> dict[str, object]:
    """What clients may add that changes the answer, for the chat to honour or to refuse."""
    known = {*UnsupportedFields.model_fields, *StructuredOutputFields.model_fields, *_PROMPT_FIELDS}
    extra = body.model_extra or {}
    return {name: value for name, value in extra.items() if name in known}


def _response_format(body: ResponseRequest) -> dict[str, object]:
    match body.text and body.text.format:
        case JsonObjectFormat():
            _check_only_format(body)
            return {"response_format": {"type": "json_object"}}
        case JsonSchemaFormat() as wanted:
            _check_only_format(body)
            schema = wanted.model_dump(exclude={"type"})
            return {"response_format": {"type": "json_schema", "json_schema": schema}}
        case _:
            return {}


def _check_only_format(body: ResponseRequest) -> None:
    """``response_format`` is a chat's, and would have to give way."""
    if (body.model_extra or {}).get("response_format"):
        raise InvalidRequestError(
            "text.format and response_format both say what the answer must look like; "
            "leave one out",
            param="response_format",
            code="invalid_value",
        )


def _tools(body: ResponseRequest) -> list[dict[str, object]] | None:
    if body.tools is None:
        return None
    return [
        {"type": "function", "function": tool.model_dump(exclude={"type"})} for tool in body.tools
    ]


def _tool_choice(body: ResponseRequest) -> object:
    match body.tool_choice:
        case NamedFunction() as named:
            return _named_choice(named)
        case AllowedFunctions(mode=mode, tools=tools):
            allowed = {"mode": mode, "tools": [_named_choice(tool) for tool in tools]}
            return {"type": "allowed_tools", "allowed_tools": allowed}
        case ChoiceMode(type="auto") if body.tools is None:
            return None  # clients say it without tools as well
        case choice:
            return choice


def _named_choice(function: NamedFunction) -> dict[str, object]:
    return {"type": "function", "function": {"name": function.name}}


def _refusal(error: ValidationError) -> InvalidRequestError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field = str(first["loc"][0]) if first["loc"] else ""
    param = _NAMES.get(field, field)
    return InvalidRequestError(
        f"Invalid {param}: {first['msg']}", param=param, code="unsupported_value"
    )
