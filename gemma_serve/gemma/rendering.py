"""Turns to prompt text by the checkpoint's own chat template.

Clients' text never goes through the template: it sees numbered placeholders, and the text comes
back in afterwards. So it stays known which text is the template's and which a client's, no client
can forge what the template writes, and a text of megabytes costs nothing here.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from types import MappingProxyType
from typing import Final, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from gemma_serve.errors import CheckpointError
from gemma_serve.gemma.history import Turn
from gemma_serve.generation import TemplateValue
from gemma_serve.messages import ImagePart, Role
from gemma_serve.tool_calling.function_gemma_prompt import ControlPart, PromptPart

START_OF_IMAGE: Final = "<start_of_image>"
"""What templates write in an image's place."""

# Noncharacters are for a program's own use (Unicode 16, 23.7): no template writes them.
_PLACEHOLDER = "\ufdd0{}\ufdd1"
_PLACEHOLDERS = re.compile("\ufdd0([0-9]+)\ufdd1")


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of prompt text."""

    text: str
    author: Literal["template", "client"]
    """Control tokens in the template's text are meant; in a client's they are only text."""


class ChatRenderer:
    """A checkpoint's chat template, probed once for the form of content that it takes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise CheckpointError(
                "The checkpoint has no chat template. Add chat_template.jinja to its folder."
            )
        self._tokenizer = tokenizer
        self._takes_parts = self._understands_parts()

    def render(
        self,
        turns: Sequence[Turn],
        *,
        continue_final_turn: bool = True,
        variables: Mapping[str, TemplateValue] = MappingProxyType({}),
    ) -> list[Segment]:
        """The whole prompt: up to where the model answers, or goes on with its last turn.

        ``continue_final_turn``: go on with it if it is the assistant's. ``variables``: further ones
        for the template to read. The first segment is the template's. An image is
        ``START_OF_IMAGE`` in the template's text.
        """
        goes_on = continue_final_turn and turns[-1].role is Role.ASSISTANT
        texts: list[str] = []
        chat = [self._message(turn, texts) for turn in turns[:-1]]
        chat.append(self._message(turns[-1], texts, keep_edges=goes_on))
        rendered = self._apply(chat, goes_on=goes_on, variables=variables)
        return list(_segments(rendered, texts))

    def _message(
        self, turn: Turn, texts: list[str], *, keep_edges: bool = False
    ) -> dict[str, object]:
        """``turn`` as the template's input; its texts go to the end of ``texts``."""
        parts = [
            None if is_image else _text(group, texts, keep_edges=keep_edges)
            for is_image, group in _groups(turn.parts)
        ] or [""]
        if not self._takes_parts:
            content = "".join(START_OF_IMAGE if part is None else part for part in parts)
            return {"role": turn.role.value, "content": content}
        return {
            "role": turn.role.value,
            "content": [
                {"type": "image"} if part is None else {"type": "text", "text": part}
                for part in parts
            ],
        }

    def _apply(
        self,
        chat: Sequence[dict[str, object]],
        *,
        goes_on: bool,
        variables: Mapping[str, TemplateValue] = MappingProxyType({}),
    ) -> str:
        rendered: str = self._tokenizer.apply_chat_template(
            list(chat),
            tokenize=False,
            add_generation_prompt=not goes_on,
            continue_final_message=goes_on,
            **variables,
        )
        return rendered

    def _understands_parts(self) -> bool:
        """Whether content may be a list of parts; else it must be one string."""
        content = [{"type": "text", "text": "probe"}]
        try:
            rendered = self._apply([{"role": "user", "content": content}], goes_on=False)
        except (TemplateError, TypeError):
            return False
        return "probe" in rendered and "'type'" not in rendered


def _groups(parts: Sequence[PromptPart]) -> Iterator[tuple[bool, Sequence[PromptPart]]]:
    """Each image by itself, and what stands between images; with whether it is an image."""
    for is_image, group in groupby(parts, key=lambda part: isinstance(part, ImagePart)):
        if is_image:
            yield from ((True, [image]) for image in group)
        else:
            yield False, list(group)


def _text(parts: Sequence[PromptPart], texts: list[str], *, keep_edges: bool) -> str:
    """What the template sees of texts and control tokens; it may trim the edges of all of it."""
    return "".join(
        part.token
        if isinstance(part, ControlPart)
        else _with_placeholder(part.text, texts, keep_edges=keep_edges)
        for part in parts
        if not isinstance(part, ImagePart)
    )


def _with_placeholder(text: str, texts: list[str], *, keep_edges: bool) -> str:
    """What the template sees of ``text``: whitespace at the edges is its to trim, or kept."""
    core = text if keep_edges else text.strip()
    if not core:
        return text
    texts.append(core)
    before, _, after = ("", "", "") if keep_edges else text.partition(core)
    return before + _PLACEHOLDER.format(len(texts) - 1) + after


def _segments(rendered: str, texts: Sequence[str]) -> Iterator[Segment]:
    for position, piece in enumerate(_PLACEHOLDERS.split(rendered)):
        if position % 2 == 0:
            yield Segment(piece, "template")
        else:
            yield Segment(texts[int(piece)], "client")
