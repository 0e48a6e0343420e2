"""Any legal OpenAI history as the turns that Gemma's template takes.

The template wants at most one system message, first and of text; then user and assistant in turn,
starting with the user; and knows no tools. Nothing is rejected for its order.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from gemma_serve.messages import ChatMessage, ImagePart, Role, TextPart, ToolForm, ToolOffer
from gemma_serve.tool_calling.function_gemma_prompt import (
    PromptPart,
    call_parts,
    developer_parts,
    response_parts,
)
from gemma_serve.tool_calling.prompt import calls_text, tool_prompt

_MESSAGE_BREAK = TextPart("\n\n")
"""Between messages that share a turn: the blank line that the template itself puts between the
system text and the first user text."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says before the other. No two texts are neighbours, and none is empty."""

    role: Role
    """``SYSTEM`` (text only), ``USER`` or ``ASSISTANT``."""
    parts: tuple[PromptPart, ...] = ()


def fit_history(
    messages: Sequence[ChatMessage],
    tools: ToolOffer | None = None,
    *,
    tool_form: ToolForm = "json",
) -> tuple[Turn, ...]:
    """The turns of ``messages``: system text if any, then user and assistant alternating.

    ``tool_form``: of earlier calls, where ``tools`` do not say it.

    - System texts from anywhere open the chat, in their order, with what there is to say of
      ``tools``.
    - Tool calls become text in the form of ``tools``; tool results become text in the user's turn
      or, where the model has tokens for them, in its own.
    - Images stand in a user turn, as in training: one of another role opens a user turn in its
      place.
    - Neighbours of the same role are one turn, with a blank line between two texts.
    - Assistant messages without any text are left out: the template would show an empty answer.
    - An assistant who speaks first answers an empty user turn.
    """
    statements = list(_statements(messages, tool_form if tools is None else tools.form))
    instructions = [turn.parts for turn in statements if turn.role is Role.SYSTEM]
    system = _merge(instructions) if tools is None else _with_tools(instructions, tools)
    spoken = [turn for turn in statements if turn.role is not Role.SYSTEM]
    turns = [
        Turn(role, _merge(turn.parts for turn in group))
        for role, group in groupby(spoken, key=lambda turn: turn.role)
    ]
    if not turns or turns[0].role is not Role.USER:
        turns.insert(0, Turn(Role.USER))
    return (Turn(Role.SYSTEM, system), *turns) if system else tuple(turns)


def _with_tools(
    instructions: Sequence[tuple[PromptPart, ...]], tools: ToolOffer
) -> tuple[PromptPart, ...]:
    """What prompts say of functions comes first, so that chats that differ after it share its
    tokens; FunctionGemma was trained on the opposite."""
    if tools.form == "function_gemma":
        return developer_parts(_merge(instructions), tools)
    return _merge([(TextPart(tool_prompt(tools)),), *instructions])


def _statements(messages: Iterable[ChatMessage], tool_form: ToolForm) -> Iterator[Turn]:
    """Each message as one turn, or as several where it holds images of a role other than user."""
    names: dict[str, str] = {}  # of the functions called so far, by call id
    for message in messages:
        names.update((call.id, call.name) for call in message.tool_calls)
        if message.role is Role.TOOL:
            yield _result(message, names, tool_form)
        elif message.role is Role.ASSISTANT:
            yield from _assistant_statements(message, tool_form)
        else:
            yield from _split_at_images(message.role, message.parts)


def _result(message: ChatMessage, names: dict[str, str], tool_form: ToolForm) -> Turn:
    if tool_form == "function_gemma":
        text = "".join(part.text for part in message.parts if isinstance(part, TextPart))
        name = names.get(message.tool_call_id or "", "unknown")
        return Turn(Role.ASSISTANT, response_parts(name, text))
    heading = TextPart(f"Result of {_called(message.tool_call_id, names)}:\n")
    return Turn(Role.USER, (heading, *message.parts))


def _assistant_statements(message: ChatMessage, tool_form: ToolForm) -> Iterator[Turn]:
    said: tuple[PromptPart, ...] = message.parts
    if tool_form == "function_gemma":
        said = (*said, *(part for call in message.tool_calls for part in call_parts(call)))
    elif message.tool_calls:
        calls = TextPart(calls_text(message.tool_calls, tool_form))
        # Text that ends its line stood right before the calls when the model wrote both.
        said = (*said, calls) if _ends_line(said) else _merge([said, (calls,)])
    for turn in _split_at_images(Role.ASSISTANT, said):
        if any(not isinstance(part, TextPart) or part.text.strip() for part in turn.parts):
            yield turn


def _ends_line(content: tuple[PromptPart, ...]) -> bool:
    last = content[-1] if content else None
    return isinstance(last, TextPart) and last.text.endswith("\n")


def _split_at_images(role: Role, parts: Iterable[PromptPart]) -> Iterator[Turn]:
    """Texts as ``role`` and images as user, in their order."""
    if role is Role.USER:
        yield Turn(role, tuple(parts))
        return
    for is_image, group in groupby(parts, key=_is_image):
        yield Turn(Role.USER if is_image else role, tuple(group))


def _called(call_id: str | None, names: dict[str, str]) -> str:
    if call_id is None:
        return "a tool call"
    return names.get(call_id, f"tool call {call_id}")


def _merge(contents: Iterable[tuple[PromptPart, ...]]) -> tuple[PromptPart, ...]:
    """One content out of several messages' contents."""
    parts: list[PromptPart] = []
    for content in contents:
        said = [part for part in content if part != TextPart("")]
        if parts and said and _is_text(parts[-1]) and _is_text(said[0]):
            parts.append(_MESSAGE_BREAK)
        parts.extend(said)
    return tuple(_join_texts(parts))


def _join_texts(parts: Iterable[PromptPart]) -> Iterator[PromptPart]:
    for is_text, group in groupby(parts, key=_is_text):
        if is_text:
            yield TextPart("".join(part.text for part in group if isinstance(part, TextPart)))
        else:
            yield from group


def _is_text(part: PromptPart) -> bool:
    return isinstance(part, TextPart)


def _is_image(part: PromptPart) -> bool:
    return isinstance(part, ImagePart)
