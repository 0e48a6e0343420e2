"""One record of a plain completion, from which both the stream's chunks and the whole are made."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NotRequired, TypedDict

from gemma_serve.errors import GenerationError
from gemma_serve.generation import (
    FinishReason,
    GenerationDelta,
    GenerationStarted,
    Prompt,
    SampledLogprobs,
    Usage,
)
from gemma_serve.openai_api.completion_logprobs import (
    LogprobsPayload,
    LogprobsWriter,
    empty_logprobs,
    extend_logprobs,
)
from gemma_serve.openai_api.completion_schemas import CompletionRequest
from gemma_serve.openai_api.prompt_echo import PromptEcho
from gemma_serve.openai_api.prompt_logprobs import PromptLogprobsPayload, prompt_logprobs
from gemma_serve.openai_api.response_schemas import Completion
from gemma_serve.openai_api.usage import completion_usage


class ChoicePayload(TypedDict):
    """``CompletionChoice`` as it is written."""

    index: int
    text: str
    logprobs: LogprobsPayload | None
    finish_reason: FinishReason | None
    stop_reason: NotRequired[str | int]
    prompt_token_ids: NotRequired[list[int]]
    token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[PromptLogprobsPayload]


class CompletionPayload(TypedDict):
    """``Completion`` as it is written."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[ChoicePayload]
    usage: NotRequired[dict[str, object] | None]


@dataclass(frozen=True, slots=True)
class AdmittedPrompt:
    """One of a request's prompts, and what the model said when it took it."""

    prompt: Prompt
    started: GenerationStarted


@dataclass(slots=True)
class _ChoiceRecord:
    writer: LogprobsWriter
    texts: list[str] = field(default_factory=list)
    logprobs: LogprobsPayload = field(default_factory=empty_logprobs)
    token_ids: list[int] = field(default_factory=list)
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    is_open: bool = False
    """Whether everything that precedes the answer has been written."""

    def add(self, payload: ChoicePayload) -> None:
        self.texts.append(payload["text"])
        self.finish_reason = payload["finish_reason"]
        self.stop_reason = payload.get("stop_reason")
        if payload["logprobs"] is not None:
            extend_logprobs(self.logprobs, payload["logprobs"])


class CompletionBuilder:
    """Collects one request's deltas. Only the task that answers the request touches it.

    Choices are numbered prompt by prompt: ``index`` is that of the prompt times ``n``, and more.
    """

    def __init__(
        self,
        body: CompletionRequest,
        *,
        completion_id: str,
        created: int,
        model: str,
        prompts: Sequence[AdmittedPrompt],
    ) -> None:
        """``created``: Unix time in seconds."""
        self.completion_id = completion_id
        self._body = body
        self._created = created
        self._model = model
        self._prompts = prompts
        self._n = body.n or 1
        as_token_ids = bool(body.return_tokens_as_token_ids)
        self._choices = [
            _ChoiceRecord(LogprobsWriter(as_token_ids=as_token_ids))
            for _ in range(len(prompts) * self._n)
        ]
        self._prompt_logprobs: dict[int, tuple[SampledLogprobs, ...]] = {}
        self._early: list[GenerationDelta] = []

    @property
    def finish_reasons(self) -> list[FinishReason | None]:
        """One per choice; ``None`` while it goes on."""
        return [choice.finish_reason for choice in self._choices]

    @property
    def usage(self) -> Usage:
        """Tokens so far; a prompt counts once, however many choices it has."""
        return Usage(
            prompt_tokens=sum(prompt.started.prompt_tokens for prompt in self._prompts),
            completion_tokens=sum(len(choice.token_ids) for choice in self._choices),
            cached_tokens=sum(choice.num_cached_tokens for choice in self._choices[:: self._n]),
        )

    def require_finished(self) -> None:
        """Raise ``GenerationError`` if the engine stopped before every choice had ended."""
        if None in self.finish_reasons:
            raise GenerationError("The model stopped before its answer was complete.")

    def opening_chunks(self) -> Iterator[CompletionPayload]:
        """Nothing precedes the first delta: it may be needed to write the echo."""
        return iter(())

    def delta_chunks(self, deltas: Iterable[GenerationDelta]) -> Iterator[CompletionPayload]:
        """Record one step's deltas; gives a chunk for each that says something."""
        for delta in self._in_order(deltas):
            choice = self._choices[delta.index]
            payload = self._choice_payload(choice, delta)
            choice.add(payload)
            choice.token_ids += delta.token_ids
            choice.num_cached_tokens += delta.cached_tokens
            if payload["text"] or payload["finish_reason"] or _tells_tokens(payload):
                yield self._payload([payload])

    def add(self, deltas: Iterable[GenerationDelta]) -> None:
        """Record one step's deltas."""
        for _ in self.delta_chunks(deltas):
            pass

    def usage_chunks(self) -> Iterator[CompletionPayload]:
        """The chunk that closes a stream, if the client asked for it."""
        if self._body.stream_usage != "none":
            chunk = self._payload([])
            chunk["usage"] = self._usage_payload()
            yield chunk

    def completion(self) -> Completion:
        """The whole answer. Raises ``GenerationError`` if it is not whole."""
        self.require_finished()
        choices = [self._whole_choice(index) for index in range(len(self._choices))]
        payload = self._payload(choices)
        payload["usage"] = self._usage_payload()
        return Completion.model_validate(payload)

    def _in_order(self, deltas: Iterable[GenerationDelta]) -> list[GenerationDelta]:
        """``deltas`` as they came, without those whose echo needs what is still to come.

        The prompt's logprobs come with the first delta of the prompt's first choice.
        """
        candidates = [*self._early, *deltas]
        for delta in candidates:
            if delta.index % self._n == 0:
                self._prompt_logprobs.setdefault(delta.index // self._n, delta.prompt_logprobs)
        if not self._body.echo or self._body.logprobs is None:
            return candidates
        self._early = [d for d in candidates if d.index // self._n not in self._prompt_logprobs]
        return [d for d in candidates if d.index // self._n in self._prompt_logprobs]

    def _choice_payload(self, choice: _ChoiceRecord, delta: GenerationDelta) -> ChoicePayload:
        payload: ChoicePayload = {
            "index": delta.index,
            "text": "",
            "logprobs": None if self._body.logprobs is None else empty_logprobs(),
            "finish_reason": delta.finish_reason,
        }
        if delta.stop_reason is not None:
            payload["stop_reason"] = delta.stop_reason
        if not choice.is_open:
            choice.is_open = True
            self._open(payload, choice.writer)
        payload["text"] += delta.text
        if payload["logprobs"] is not None:
            extend_logprobs(payload["logprobs"], choice.writer.write(delta.logprobs))
        if self._body.return_token_ids:
            payload["token_ids"] = list(delta.token_ids)
        return payload

    def _open(self, payload: ChoicePayload, writer: LogprobsWriter) -> None:
        """Write what precedes the answer into its first piece."""
        position = payload["index"] // self._n
        prompt = self._prompts[position]
        if self._body.echo:
            echo = PromptEcho.of(prompt.prompt, prompt.started.prompt)
            payload["text"] = echo.text
            if payload["logprobs"] is not None:
                of_prompt = echo.logprobs(self._echoed_positions(position), writer)
                extend_logprobs(payload["logprobs"], of_prompt)
        if self._body.return_token_ids:
            payload["prompt_token_ids"] = _token_ids(prompt.started)

    def _whole_choice(self, index: int) -> ChoicePayload:
        choice = self._choices[index]
        payload: ChoicePayload = {
            "index": index,
            "text": "".join(choice.texts),
            "logprobs": None if self._body.logprobs is None else choice.logprobs,
            "finish_reason": choice.finish_reason,
        }
        if choice.stop_reason is not None:
            payload["stop_reason"] = choice.stop_reason
        if self._body.return_token_ids:
            payload["prompt_token_ids"] = _token_ids(self._prompts[index // self._n].started)
            payload["token_ids"] = choice.token_ids
        if (num_top := self._body.prompt_logprobs) is not None:
            positions = self._prompt_logprobs[index // self._n]
            payload["prompt_logprobs"] = prompt_logprobs(positions, num_top)
        return payload

    def _echoed_positions(self, position: int) -> list[SampledLogprobs]:
        """Without what only ``prompt_logprobs`` asks for."""
        return [
            replace(told, top=told.top[: self._body.logprobs])
            for told in self._prompt_logprobs[position]
        ]

    def _payload(self, choices: list[ChoicePayload]) -> CompletionPayload:
        payload: CompletionPayload = {
            "id": self.completion_id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }
        match self._body.stream_usage:
            case "last":
                payload["usage"] = None
            case "every":
                payload["usage"] = self._usage_payload()
        return payload

    def _usage_payload(self) -> dict[str, object]:
        return completion_usage(self.usage).model_dump()


def _tells_tokens(payload: ChoicePayload) -> bool:
    logprobs = payload["logprobs"]
    return bool(payload.get("token_ids") or (logprobs is not None and logprobs["tokens"]))


def _token_ids(started: GenerationStarted) -> list[int]:
    return [token.token_id for token in started.prompt]
