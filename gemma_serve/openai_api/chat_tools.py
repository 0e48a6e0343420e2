"""What a chat completion request lets the model call, or makes it call."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gemma_serve.errors import InvalidRequestError, OutputConstraintError
from gemma_serve.generation import ModelDescription, OutputConstraint
from gemma_serve.messages import ToolDefinition, ToolOffer
from gemma_serve.openai_api.chat_schemas import ChatCompletionRequest
from gemma_serve.openai_api.config import ApiConfig
from gemma_serve.openai_api.json_bodies import is_deeper
from gemma_serve.openai_api.limits import MAX_JSON_DEPTH
from gemma_serve.openai_api.structured_outputs import ConstrainingField, constraining_field
from gemma_serve.openai_api.tool_schemas import AllowedToolsChoice, NamedChoice, Tool
from gemma_serve.tool_calling.call_schema import TEXT, text_or_call_schema, tool_call_schema
from gemma_serve.tool_calling.choice import ToolChoice
from gemma_serve.tool_calling.function_gemma import function_gemma_parser
from gemma_serve.tool_calling.parameter_check import schema_mistake
from gemma_serve.tool_calling.parser import ToolCallParser, gemma_parser
from gemma_serve.tool_calling.whole_answers import whole_answer_parser

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The functions of one request: what the prompt says, and how its answers are read."""

    offer: ToolOffer
    choice: ToolChoice
    parallel: bool
    text_format: ConstrainingField | None = None
    """Under ``auto``: what the answer must look like unless it is calls."""

    @property
    def constraint(self) -> OutputConstraint | None:
        """What makes a call certain, or either a call or a format; ``None`` where the model may
        answer in any text."""
        functions, choice, parallel = self.offer.definitions, self.choice, self.parallel
        if choice.mode != "auto":
            return _json_schema(tool_call_schema(functions, choice, parallel=parallel))
        if self.text_format is None:
            return None
        text = _schema_of(self.text_format)
        if text is None:
            return self.text_format.constraint
        return _json_schema(text_or_call_schema(text, functions, choice, parallel=parallel))

    def error_of_constraint(self, error: OutputConstraintError) -> InvalidRequestError:
        """The same error, about what it is in: a function's parameters, or the text's format."""
        _, _, path = (error.param or "").partition("$defs.")
        name, dot, place = path.partition(".")
        if self.text_format is not None and name in {TEXT, ""}:
            own = OutputConstraintError(str(error), param=place or None, code=error.code)
            return own.under(self.text_format.path)
        names = [tool.name for tool in self.offer.definitions]
        param = f"tools[{names.index(name)}].function.parameters" if name in names else "tools"
        return InvalidRequestError(str(error), param=param + dot + place, code=error.code)

    def parser(self) -> ToolCallParser:
        """A parser for one choice's text.

        Calls that are held to a schema come in JSON, whatever a model is used to.
        """
        max_calls = None if self.parallel else 1
        if self.text_format is not None:
            return whole_answer_parser(self.choice.names, max_calls=max_calls)
        is_certain = self.choice.mode != "auto"
        if self.offer.form == "function_gemma" and not is_certain:
            return function_gemma_parser(self.choice.names, max_calls=max_calls)
        return gemma_parser(self.choice.names, max_calls=max_calls, calls_only=is_certain)


class ToolRules:
    """Decides what becomes of a request's ``tools``. One event loop's, as it warns but once."""

    def __init__(self, config: ApiConfig) -> None:
        self._config = config
        self._has_warned = False

    def apply(self, body: ChatCompletionRequest, description: ModelDescription) -> ToolUse | None:
        """What the model is told; ``None``: of no tools. Raises ``InvalidRequestError``."""
        tools = body.tools or []
        definitions = _definitions(tools)
        choice = _choice(body, [tool.name for tool in definitions])
        if choice is None:
            return None
        policy = self._config.tools or ("prompt" if description.calls_tools else "ignore")
        if policy == "reject":
            raise InvalidRequestError(
                "This server does not take tools; leave them out",
                param="tools",
                code="unsupported_value",
            )
        if policy == "ignore" and choice.mode == "auto":
            self._warn_of_ignored_tools()
            return None
        text_format = _text_format(body, choice)
        answer_schema = None if text_format is None else _schema_of(text_format)
        narrowed = choice.mode == "auto" and len(choice.names) < len(definitions)
        offer = ToolOffer(
            definitions=definitions,
            form=description.tool_form or self._config.tool_form,
            allowed=choice.names if narrowed else None,
            answer_schema=None if answer_schema is None else _dumps(answer_schema),
        )
        parallel = body.parallel_tool_calls is not False and choice.mode != "named"
        return ToolUse(offer, choice, parallel, text_format)

    def _warn_of_ignored_tools(self) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        logger.warning(
            "%s answers in text to requests with tools, unless they force a call; models from 4B "
            "on can call them, and the setting tools: prompt lets this one try. Said once.",
            self._config.model_name,
        )


def _text_format(body: ChatCompletionRequest, choice: ToolChoice) -> ConstrainingField | None:
    field = constraining_field(body)
    return field if choice.mode == "auto" and field is not None and field.leaves_calls else None


def _schema_of(text_format: ConstrainingField) -> dict[str, object] | None:
    """``None`` if it is no schema: whoever compiles it says what is wrong."""
    constraint = text_format.constraint
    if constraint.kind == "json_object":
        return {"type": "object"}
    try:
        schema = json.loads(constraint.value)
        json.dumps(schema, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return None
    return schema if isinstance(schema, dict) and not is_deeper(schema, MAX_JSON_DEPTH) else None


def _json_schema(schema: Mapping[str, object]) -> OutputConstraint:
    return OutputConstraint(kind="json_schema", value=_dumps(schema))


def _dumps(schema: Mapping[str, object]) -> str:
    return json.dumps(schema, ensure_ascii=False)


def _definitions(tools: Sequence[Tool]) -> tuple[ToolDefinition, ...]:
    names: set[str] = set()
    for index, tool in enumerate(tools):
        if tool.function.name in names:
            raise InvalidRequestError(
                f"Two tools have the name {tool.function.name}",
                param=f"tools[{index}].function.name",
                code="invalid_value",
            )
        names.add(tool.function.name)
    return tuple(_definition(tool, f"tools[{index}]") for index, tool in enumerate(tools))


def _definition(tool: Tool, path: str) -> ToolDefinition:
    function = tool.function
    param = f"{path}.function.parameters"
    if not function.parameters:
        return ToolDefinition(function.name, function.description)
    if mistake := schema_mistake(function.parameters):
        where, what = mistake
        raise InvalidRequestError(
            f"Invalid schema for function {function.name!r}: {what}",
            param=param + where,
            code="invalid_value",
        )
    try:
        parameters = json.dumps(function.parameters, ensure_ascii=False, allow_nan=False)
        parameters.encode()
    except (ValueError, RecursionError):
        raise InvalidRequestError(
            f"The parameters of function {function.name!r} hold what is no JSON: NaN, Infinity, "
            "half of a surrogate pair, or too many levels",
            param=param,
            code="invalid_value",
        ) from None
    return ToolDefinition(function.name, function.description, parameters)


def _choice(body: ChatCompletionRequest, offered: Sequence[str]) -> ToolChoice | None:
    """``None``: no function may be called."""
    asked = body.tool_choice
    if asked is not None and body.tools is None and asked.type != "none":
        raise _needs_tools()
    match asked:
        case None:
            return ToolChoice("auto", tuple(offered)) if offered else None
        case NamedChoice(function=function):
            _check_offered(function.name, offered, "tool_choice.function.name")
            return ToolChoice("named", (function.name,))
        case AllowedToolsChoice(allowed_tools=allowed):
            for index, tool in enumerate(allowed.tools):
                path = f"tool_choice.allowed_tools.tools[{index}].function.name"
                _check_offered(tool.function.name, offered, path)
            names = {tool.function.name for tool in allowed.tools}
            return ToolChoice(allowed.mode, tuple(name for name in offered if name in names))
        case _ if asked.type == "required":
            if not offered:
                raise _needs_tools()
            return ToolChoice("required", tuple(offered))
        case _:
            return ToolChoice("auto", tuple(offered)) if offered and asked.type == "auto" else None


def _needs_tools() -> InvalidRequestError:
    return InvalidRequestError(
        "tool_choice is only allowed when tools are given",
        param="tool_choice",
        code="invalid_value",
    )


def _check_offered(name: str, offered: Sequence[str], param: str) -> None:
    if name not in offered:
        raise InvalidRequestError(
            f"tools has no function {name[:64]!r}", param=param, code="invalid_value"
        )
