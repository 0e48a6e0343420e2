"""What a prompt says of functions, and how it shows earlier calls.

The wording is Google's (ai.google.dev/gemma/docs/capabilities/function-calling), with a line on how
to make several calls. The same functions in the same order are the same text, whatever else a
request says, so that a prefix cache finds it again.
"""

import json
from collections.abc import Sequence
from typing import Final

from gemma_serve.messages import PromptedToolForm, ToolCall, ToolDefinition, ToolOffer

_INSTRUCTIONS: Final[dict[PromptedToolForm, str]] = {
    "json": """\
You have access to functions. If you decide to invoke any of the function(s), \
you MUST put it in the format of
{"name": function name, "parameters": dictionary of argument name and its value}
To invoke several functions, put them in a list: [{"name": ...}, {"name": ...}]

You SHOULD NOT include any other text in the response if you call a function
""",
    "pythonic": """\
You have access to functions. If you decide to invoke any of the function(s), \
you MUST put it in the format of
[func_name1(params_name1=params_value1, params_name2=params_value2...), func_name2(params)]

You SHOULD NOT include any other text in the response if you call a function
""",
}


def tool_prompt(offer: ToolOffer) -> str:
    """The instructions and the functions, to open a chat with, in a form that prompts ask for."""
    assert offer.form != "function_gemma"  # which is no text alone
    definitions = ",\n".join(map(_definition, offer.definitions))
    text = f"{_INSTRUCTIONS[offer.form]}[\n{definitions}\n]"
    if offer.allowed is not None:
        text += f"\n\nOf these, you may now call only: {', '.join(offer.allowed)}"
    if offer.answer_schema is not None:
        text += (
            "\n\nIf you do not call a function, respond only with JSON that fits this JSON Schema:"
            f"\n{offer.answer_schema}"
        )
    return text


def calls_text(calls: Sequence[ToolCall], form: PromptedToolForm) -> str:
    """Earlier calls as the model was asked to write them."""
    if form == "pythonic":
        pythonic = [_pythonic(call) for call in calls]
        if None not in pythonic:
            return f"[{', '.join(filter(None, pythonic))}]"
    objects = ", ".join(map(_json_call, calls))
    return objects if len(calls) == 1 else f"[{objects}]"


def _definition(tool: ToolDefinition) -> str:
    members = [f'"name": {_dumps(tool.name)}']
    if tool.description is not None:
        members.append(f'"description": {_dumps(tool.description)}')
    if tool.parameters is not None:
        members.append(f'"parameters": {tool.parameters}')
    return f"{{{', '.join(members)}}}"


def _json_call(call: ToolCall) -> str:
    """The arguments are JSON already, or as close as their author came to it."""
    return f'{{"name": {_dumps(call.name)}, "parameters": {call.arguments.strip() or "{}"}}}'


def _pythonic(call: ToolCall) -> str | None:
    """``None`` where the arguments are nothing that Python could write."""
    try:
        arguments = json.loads(call.arguments.strip() or "{}")
    except (ValueError, RecursionError):
        return None
    if not isinstance(arguments, dict) or not all(map(str.isidentifier, arguments)):
        return None
    written = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    return f"{call.name}({written})"


def _dumps(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
