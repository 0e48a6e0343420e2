"""Prompts of every kind to the token ids and image spans that the model reads."""

import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from gemma_serve.engine.sequence import ImageSpan, PromptInputs
from gemma_serve.errors import ContextLengthError, InvalidRequestError
from gemma_serve.gemma.bad_words import banned_token_sequences
from gemma_serve.gemma.function_calling import tool_form, tool_tokens
from gemma_serve.gemma.history import Turn, fit_history
from gemma_serve.gemma.rendering import START_OF_IMAGE, ChatRenderer, Segment
from gemma_serve.gemma.truncation import truncate
from gemma_serve.generation import (
    ChatPrompt,
    Prompt,
    TemplateValue,
    TextPrompt,
    TokenPrompt,
    VisionInput,
)
from gemma_serve.messages import ChatMessage, ImagePart, Role, TextPart

_END_OF_IMAGE: Final = "<end_of_image>"

_UNTRAINED_TOKEN = re.compile(r"<unused[0-9]+>|\[multimodal\]")
"""Gemma's reserved tokens, which its tokenizers do not always mark as special."""

_NUM_CONTEXTS_READ: Final = 4
"""How far a prompt that will be truncated may exceed the context: all of it is tokenized."""

_RESERVED_VARIABLES: Final = frozenset(
    ["messages", *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters]
)
"""What the renderer gives the template itself."""


@dataclass(frozen=True, slots=True)
class _View:
    """One view's soft tokens."""

    pixels: bytes


class PromptBuilder:
    """Builds prompts for one checkpoint; stateless, so any thread may call it."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        vision: VisionInput | None,
        image_token_id: int | None,
        max_model_len: int,
    ) -> None:
        """``image_token_id``: the soft token; needed if there is ``vision``."""
        self._tokenizer = tokenizer
        self._sees_images = vision is not None
        self._tokens_per_view = vision.tokens_per_view if vision is not None else 0
        self._image_token_id = image_token_id
        self._max_model_len = max_model_len
        self._tool_form = tool_form(tokenizer) or "json"
        self._renderer = ChatRenderer(tokenizer)
        self._control_tokens = _control_token_pattern(tokenizer)
        self._max_token_length = max(len(token) for token in tokenizer.get_vocab())
        self._control_tokens_per_turn = self._count_control_tokens_per_turn()

    def build(self, prompt: Prompt, *, truncate_to: int | None = None) -> PromptInputs:
        """What the model reads. ``truncate_to``: keep only so many tokens of the end.

        What ``tools`` offers comes first, so that chats that differ after it share its tokens.

        Raises ``InvalidRequestError`` for an image that the model cannot see and for text that is
        not Unicode, ``ContextLengthError`` for a prompt that leaves no room for an answer.
        """
        inputs = self.read(prompt, num_contexts=1 if truncate_to is None else _NUM_CONTEXTS_READ)
        if truncate_to is not None:
            inputs = truncate(inputs, truncate_to)
        if len(inputs.token_ids) >= self._max_model_len:
            raise ContextLengthError.of(
                prompt_tokens=len(inputs.token_ids),
                max_model_len=self._max_model_len,
                param="messages" if isinstance(prompt, ChatPrompt) else "prompt",
            )
        return inputs

    def read(self, prompt: Prompt, *, num_contexts: int = _NUM_CONTEXTS_READ) -> PromptInputs:
        """What the model would read, were there room. Raises as ``build`` does.

        ``num_contexts``: how many contexts of text are worth the work.
        """
        limit = self._max_model_len * num_contexts
        match prompt:
            case ChatPrompt():
                return self._chat(prompt, limit)
            case TextPrompt():
                return PromptInputs(self._text_token_ids(prompt, limit))
            case TokenPrompt(token_ids):
                return PromptInputs(token_ids)

    def banned_token_sequences(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """As ``gemma.bad_words``."""
        return banned_token_sequences(self._tokenizer, words)

    def _text_token_ids(self, prompt: TextPrompt, limit: int) -> tuple[int, ...]:
        """The text as the tokenizer reads it: control tokens in it are meant."""
        text = prompt.text
        self._refuse_if_too_long(len(text) // self._max_token_length, limit, param="prompt")
        bos_token: str | None = self._tokenizer.bos_token
        if prompt.add_bos and bos_token is not None and not text.startswith(bos_token):
            text = bos_token + text
        if not text:
            raise InvalidRequestError("The prompt has no tokens.", param="prompt")
        return tuple(self._token_ids([text]))

    def _chat(self, prompt: ChatPrompt, limit: int) -> PromptInputs:
        """The prompt of any legal history.

        What its tools offer comes first, so that chats that differ after it share its tokens.
        """
        messages = prompt.messages
        self._check_images(messages)
        self._refuse_if_too_many(messages, limit)
        turns = fit_history(messages, prompt.tools, tool_form=self._tool_form)
        self._refuse_if_too_long(self._min_num_tokens(turns), limit)
        segments = self._with_bos(self._render(turns, prompt))
        runs: list[list[Segment]] = [[]]  # of text, each but the last followed by a view
        views: list[_View] = []
        for item in self._with_images(segments, turns):
            if isinstance(item, _View):
                views.append(item)
                runs.append([])
            else:
                runs[-1].append(item)
        pieces = [self._pieces(run) for run in runs]
        num_image_tokens = len(views) * self._tokens_per_view
        self._refuse_if_too_long(num_image_tokens + sum(map(len, pieces)) - len(pieces), limit)
        return self._tokenize(pieces, views)

    def _render(self, turns: Sequence[Turn], prompt: ChatPrompt) -> list[Segment]:
        variables = dict(prompt.template_kwargs)
        for name, value in variables.items():
            self._check_template_variable(name, value)
        try:
            return self._renderer.render(
                turns, continue_final_turn=_continues(prompt), variables=variables
            )
        except TemplateError as error:
            if not variables:
                raise
            raise InvalidRequestError(
                f"The model's chat template does not take these chat_template_kwargs: {error}",
                param="chat_template_kwargs",
            ) from None

    def _check_template_variable(self, name: str, value: TemplateValue) -> None:
        """Refuse what would take over the template's own work, or write its control tokens."""
        param = f"chat_template_kwargs.{name}"
        if name in _RESERVED_VARIABLES or name in self._tokenizer.special_tokens_map:
            raise InvalidRequestError(f"{param} is the server's to set; leave it out", param=param)
        if isinstance(value, str) and self._control_tokens.search(value):
            raise InvalidRequestError(f"{param} must not hold control tokens", param=param)

    def _check_images(self, messages: Sequence[ChatMessage]) -> None:
        if self._sees_images:
            return
        for index, message in enumerate(messages):
            if any(isinstance(part, ImagePart) for part in message.parts):
                raise InvalidRequestError(
                    "This model reads text only and cannot see images.",
                    param=f"messages[{index}].content",
                )

    def _refuse_if_too_many(self, messages: Sequence[ChatMessage], limit: int) -> None:
        """Fitting takes 5 microseconds a part, and parts of less than a token are no chat."""
        num_parts = sum(max(1, len(m.parts) + len(m.tool_calls)) for m in messages)
        if num_parts >= limit:
            raise ContextLengthError(
                f"This model's maximum context length is {self._max_model_len} tokens, but the "
                f"messages have {num_parts} parts. Please shorten the messages."
            )

    def _min_num_tokens(self, turns: Sequence[Turn]) -> int:
        """A lower bound: what the template puts around turns, the views, and the longest tokens.

        Templates trim no more than the edges of texts.
        """
        parts = [part for turn in turns for part in turn.parts]
        num_views = sum(len(part.views) for part in parts if isinstance(part, ImagePart))
        num_characters = sum(len(part.text.strip()) for part in parts if isinstance(part, TextPart))
        return (
            len(turns) * self._control_tokens_per_turn
            + num_views * self._tokens_per_view
            + num_characters // self._max_token_length
        )

    def _count_control_tokens_per_turn(self) -> int:
        user = Turn(Role.USER, (TextPart("x"),))
        assistant = Turn(Role.ASSISTANT, (TextPart("x"),))
        one, three = (
            sum(len(self._control_tokens.findall(s.text)) for s in _of_template(segments))
            for segments in map(self._renderer.render, [[user], [user, assistant, user]])
        )
        return (three - one) // 2

    def _with_bos(self, segments: list[Segment]) -> list[Segment]:
        bos_token: str | None = self._tokenizer.bos_token
        if bos_token is None or segments[0].text.startswith(bos_token):
            return segments
        return [Segment(bos_token, "template"), *segments]

    def _with_images(
        self, segments: Sequence[Segment], turns: Sequence[Turn]
    ) -> Iterator[Segment | _View]:
        """``segments`` with every image in its place; its text is Gemma3Processor's."""
        images = [part for turn in turns for part in turn.parts if isinstance(part, ImagePart)]
        places = [segment.text.count(START_OF_IMAGE) for segment in _of_template(segments)]
        if sum(places) != len(images):
            raise InvalidRequestError(
                "The model's chat template has no place for images.", param="messages"
            )
        remaining = iter(images)
        for segment in segments:
            if segment.author == "client":
                yield segment
                continue
            first, *others = segment.text.split(START_OF_IMAGE)
            yield Segment(first, "template")
            for text in others:
                yield from _image(next(remaining))
                yield Segment(text, "template")

    def _pieces(self, run: Sequence[Segment]) -> list[str]:
        """The run's text, cut inside every control token that is not the template's own.

        Each piece is tokenized by itself, so what a client writes stays text, to the letter.
        """
        text = "".join(segment.text for segment in run)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidRequestError(
                "A message holds a lone surrogate, which is not Unicode text.", param="messages"
            ) from None
        pieces = []
        start = 0
        spans = _template_spans(run)
        beyond = (len(text), len(text) + 1)
        span_start, span_end = next(spans, beyond)
        for match in self._control_tokens.finditer(text):
            while span_end < match.end(1):
                span_start, span_end = next(spans, beyond)
            if match.start() < span_start:
                pieces.append(text[start : match.start() + 1])
                start = match.start() + 1
        pieces.append(text[start:])
        return pieces

    def _tokenize(self, runs: Sequence[Sequence[str]], views: Sequence[_View]) -> PromptInputs:
        tokens_per_view = self._tokens_per_view
        token_ids = self._token_ids(runs[0])
        spans = []
        for view, run in zip(views, runs[1:], strict=True):
            assert self._image_token_id is not None
            spans.append(ImageSpan(len(token_ids), tokens_per_view, view.pixels))
            token_ids += [self._image_token_id] * tokens_per_view
            token_ids += self._token_ids(run)
        return PromptInputs(tuple(token_ids), tuple(spans))

    def _refuse_if_too_long(self, num_tokens: int, limit: int, param: str = "messages") -> None:
        """Refuse by a lower bound before the work that takes long.

        Rendering takes 50 microseconds a turn, tokenizing about a second per megabyte.
        """
        if num_tokens >= limit:
            raise ContextLengthError(
                f"This model's maximum context length is {self._max_model_len} tokens, but the "
                f"prompt has at least {num_tokens} tokens. Please shorten the {param}.",
                param=param,
            )

    def _token_ids(self, pieces: Sequence[str]) -> list[int]:
        encodings: list[list[int]] = self._tokenizer(
            list(pieces),
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        return [token_id for encoding in encodings for token_id in encoding]


def _continues(prompt: ChatPrompt) -> bool:
    """A result that the model reads in its own turn leaves that turn open."""
    ends_with_result = bool(prompt.messages) and prompt.messages[-1].role is Role.TOOL
    return prompt.continue_final_message or ends_with_result


def _image(image: ImagePart) -> Iterator[Segment | _View]:
    whole, *crops = image.views
    if not crops:
        yield from _view(whole)
        return
    yield Segment("Here is the original image ", "template")
    yield from _view(whole)
    yield Segment(" and here are some crops to help you see better", "template")
    for crop in crops:
        yield Segment(" ", "template")
        yield from _view(crop)


def _view(pixels: bytes) -> Iterator[Segment | _View]:
    yield Segment(f"\n\n{START_OF_IMAGE}", "template")
    yield _View(pixels)
    yield Segment(f"{_END_OF_IMAGE}\n\n", "template")


def _of_template(segments: Sequence[Segment]) -> Iterator[Segment]:
    return (segment for segment in segments if segment.author == "template")


def _template_spans(run: Sequence[Segment]) -> Iterator[tuple[int, int]]:
    """Where the template's text starts and ends within the run's text, in order."""
    start = 0
    for segment in run:
        end = start + len(segment.text)
        if segment.author == "template":
            yield start, end
        start = end


def _control_token_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Finds control tokens in text, also overlapping ones; group 1 is the token."""
    added = tokenizer.added_tokens_decoder.values()
    control_tokens = {token.content for token in added if token.special}
    control_tokens |= tool_tokens(tokenizer)
    control_tokens.update(tokenizer.all_special_tokens)
    named = sorted(t for t in control_tokens if not _UNTRAINED_TOKEN.fullmatch(t))
    tokens = "|".join([*map(re.escape, named), _UNTRAINED_TOKEN.pattern])
    first = "".join(re.escape(character) for character in sorted({t[0] for t in named} | {*"<["}))
    # re searches for one of a few characters eight times faster than for a lookahead.
    return re.compile(f"[{first}](?<=(?=({tokens})).)", re.DOTALL)
