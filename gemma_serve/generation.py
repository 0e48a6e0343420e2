"""The border between protocol and model: what is asked, what comes back, and who answers.

Everything here crosses process borders by pickle and needs the standard library only.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, Protocol, Self

from gemma_serve.messages import ChatMessage, ToolForm, ToolOffer


class FinishReason(StrEnum):
    """Why a sequence ended by itself. An abort or a failure ends it without a reason."""

    STOP = "stop"
    """The model ended its turn, or a stop string or stop token came."""
    LENGTH = "length"
    """``max_tokens`` or the end of the context."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when to stop, complete: no value is left to a default elsewhere.

    Order, as in transformers: penalties and ``logit_bias``, ``temperature``, ``top_k``, ``top_p``,
    ``min_p``. Ranges are checked at the edge (``openai_api.chat_schemas``).
    """

    max_tokens: int | None = None
    """Completion tokens per sequence; ``None``: up to the end of the context. 0 computes the prompt
    and ends."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """Smallest set of tokens that reaches this probability; 0 is greedy."""
    top_k: int | None = None
    """Most probable tokens kept; ``None`` keeps all."""
    min_p: float = 0.0
    """Drop tokens less probable than this fraction of the most probable one."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or completion
    (Keskar et al. 2019)."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of each token already in the completion."""
    frequency_penalty: float = 0.0
    """Subtracted once per occurrence of a token in the completion."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """``(token_id, bias)`` added to logits; -100 bans the token."""
    seed: int | None = None
    """Same seed and parameters give the same text on the same build, whatever else runs."""
    stop: tuple[str, ...] = ()
    """Texts that end the completion and are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the completion, besides the checkpoint's own."""
    ignore_eos: bool = False
    """Go on past the checkpoint's own stop tokens and strings, as benchmarks want."""
    min_tokens: int = 0
    """Nothing but ``max_tokens`` ends the completion before it has so many tokens."""
    include_stop_str_in_output: bool = False
    """Whether the stop string that ends the completion is part of it."""
    skip_special_tokens: bool = True
    """Whether control tokens write nothing; else they write their names."""
    allowed_token_ids: tuple[int, ...] | None = None
    """The only ids that may be chosen; ``None``: all."""
    banned_token_sequences: tuple[tuple[int, ...], ...] = ()
    """Ids that must not follow each other like this."""
    speculation: bool = True
    """Whether tokens may be guessed and verified together, where the operator turned that on. Only
    the time that it takes depends on it."""
    logprobs: int | None = None
    """Report each token's log-probability and those of so many most probable tokens, 0 to 20;
    ``None``: report none. They are the model's own: before temperature, penalties, biases, limits
    and output constraints."""
    prompt_logprobs: int | None = None
    """The same for each token of the prompt but the first. None of it comes from the prefix cache
    then: it takes the logits of all of it."""


TemplateValue = bool | int | float | str | None


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A chat, which the checkpoint's template turns into text."""

    messages: tuple[ChatMessage, ...]
    continue_final_message: bool = False
    """Go on with the assistant's last message instead of opening a new turn."""
    template_kwargs: tuple[tuple[str, TemplateValue], ...] = ()
    """Further variables of the template, by name."""
    tools: ToolOffer | None = None
    """What the model may call, told ahead of the messages."""


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Text as the model reads it, control tokens included."""

    text: str
    add_bos: bool = True
    """Open with the checkpoint's first token, unless the text does."""


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids as the model reads them; nothing is added."""

    token_ids: tuple[int, ...]


Prompt = ChatPrompt | TextPrompt | TokenPrompt


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputConstraint:
    """What a completion must look like from its first character to its last."""

    kind: Literal["json_schema", "json_object", "regex", "choice", "grammar"]
    value: str
    """A JSON Schema as JSON text, a pattern, choices as a JSON list of strings, or a grammar in
    Lark or GBNF notation. ``json_object`` has none: it is any JSON object."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """What one client asked: one prompt, ``n`` sequences."""

    request_id: str
    prompt: Prompt
    sampling: SamplingParams
    n: int = 1
    user: str | None = None
    """Whose turn it takes: users start their sequences by turns."""
    priority: int = 0
    """Among the user's own that wait, smaller ones start first."""
    cache_salt: str | None = None
    """Only requests of the same salt share what is cached of their prompts."""
    output_constraint: OutputConstraint | None = None
    bad_words: tuple[str, ...] = ()
    """Texts whose tokens are to join ``sampling.banned_token_sequences``."""
    truncate_prompt_tokens: int | None = None
    """Keep only so many tokens of the prompt's end."""
    return_prompt: bool = False
    """Whether ``GenerationStarted`` tells the prompt's tokens."""


@dataclass(frozen=True, slots=True)
class PromptToken:
    """One token of a prompt."""

    token_id: int
    written: bytes
    """What it writes, as UTF-8; a control token's name."""
    is_control: bool = False
    """Whether it is no text, such as the markers of turns."""


@dataclass(frozen=True, slots=True)
class GenerationStarted:
    """The request was valid and is admitted; the first token is still to come."""

    prompt_tokens: int
    prompt: tuple[PromptToken, ...] = ()
    """If the request asked for it."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How probable the model found one token."""

    token_id: int
    logprob: float
    """Natural logarithm, finite: -9999 for a token without any probability."""
    token_bytes: bytes
    """What it writes: maybe half a character; nothing for control tokens."""


@dataclass(frozen=True, slots=True)
class SampledLogprobs:
    """A sampled token among the most probable ones."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]
    """``SamplingParams.logprobs`` many, the most probable first; may contain the chosen one."""


@dataclass(frozen=True, slots=True)
class GenerationDelta:
    """What became final of one sequence since its last delta; ``a + b`` merges neighbours."""

    index: int
    """Which of the request's ``n`` sequences."""
    text: str
    """May be empty while it could still be the start of a stop string or half a character."""
    token_ids: tuple[int, ...]
    """All tokens sampled since the last delta, the ending one included."""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The text of ``stop`` or the id of ``stop_token_ids`` that ended it, if one did."""
    cached_tokens: int = 0
    """Prompt tokens that came from the prefix cache; told once, with the first delta."""
    logprobs: tuple[SampledLogprobs, ...] = ()
    """One per token of ``token_ids`` if the request asked for them, else none."""
    prompt_logprobs: tuple[SampledLogprobs, ...] = ()
    """Of the prompt's second token to its last: with sequence 0's first delta, if asked for."""

    def __add__(self, later: Self) -> "GenerationDelta":
        if later.index != self.index or self.finish_reason is not None:
            raise ValueError(f"cannot merge {later!r} into {self!r}")
        return GenerationDelta(
            self.index,
            self.text + later.text,
            self.token_ids + later.token_ids,
            later.finish_reason,
            later.stop_reason,
            cached_tokens=self.cached_tokens + later.cached_tokens,
            logprobs=self.logprobs + later.logprobs,
            prompt_logprobs=self.prompt_logprobs + later.prompt_logprobs,
        )


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request; ``completion_tokens`` counts all ``n`` sequences."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    """Of the prompt's, those that were not computed for the first sequence. What its siblings share
    with it does not count."""


@dataclass(frozen=True, slots=True)
class PanAndScan:
    """Gemma 3's rule for cropping long images (``image_processing_gemma3`` in transformers)."""

    min_crop_size: int = 256
    """Pixels; an image is not cut into crops with a shorter side."""
    max_num_crops: int = 4
    min_ratio_to_activate: float = 1.2
    """Longer side over shorter side."""


@dataclass(frozen=True, slots=True)
class VisionInput:
    """The images that a model takes."""

    view_size: int
    """Pixels a side of the square that every view is resized to."""
    tokens_per_view: int
    """Prompt tokens that one view's features fill (its start and end markers come on top)."""
    pan_and_scan: PanAndScan = field(default_factory=PanAndScan)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDescription:
    """What the protocol side must know of a loaded model."""

    max_model_len: int
    """Prompt and completion tokens together."""
    vocab_size: int
    """Token ids are in ``[0, vocab_size)``."""
    default_sampling: SamplingParams
    """The checkpoint's own defaults, for what a client leaves open."""
    vision: VisionInput | None
    """``None``: the model takes text only."""
    calls_tools: bool = True
    """Whether it is able to call functions when a prompt explains them."""
    tool_form: ToolForm | None = None
    """The only form of calls that it knows; ``None``: the one that a prompt asks for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLoad:
    """How busy a copy of the model is."""

    num_running: int
    """Sequences that are being computed."""
    num_waiting: int
    """Sequences that wait for a place."""
    cache_usage: float
    """Share of the memory for keys and values that is taken, 0 to 1."""
    num_drafted_tokens: int = 0
    """Since the copy's start: guesses that were computed."""
    num_accepted_tokens: int = 0
    """Those of them that became part of an answer."""


class GenerationStream:
    """The lists of deltas of one admitted request. Close it to stop the request.

    It is its own async iterator and has one consumer. ``aclose`` may come at any time, also before
    the first item, and more than once; every tokens' worth of memory is given back then.
    """

    def __init__(
        self,
        started: GenerationStarted,
        deltas: AsyncIterator[Sequence[GenerationDelta]],
        close: Callable[[], Awaitable[None]],
    ) -> None:
        self.started = started
        self._deltas = deltas
        self._close = close

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Sequence[GenerationDelta]:
        return await anext(self._deltas)

    async def aclose(self) -> None:
        """Stop the request if it still runs."""
        await self._close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()


class GenerationClient(Protocol):
    """Whoever answers requests: the engine in this process, a Ray handle, or a test's fake."""

    async def describe(self) -> ModelDescription:
        """The model's limits and defaults, which do not change. May wait until it is loaded.

        Raises ``UnavailableError``.
        """

    async def check_health(self) -> None:
        """Raises ``UnavailableError`` unless the model can answer now. Waits for no loading."""

    async def measure_load(self) -> ModelLoad:
        """Of one copy of the model, where there are several. Raises ``UnavailableError``."""

    async def tokenize(self, prompt: Prompt) -> tuple[PromptToken, ...]:
        """The tokens that the model would read, were there room; images are soft tokens.

        Raises ``InvalidRequestError`` or ``UnavailableError``.
        """

    async def generate(self, request: GenerationRequest) -> GenerationStream:
        """Admit ``request``; the first token is not awaited.

        Raises ``InvalidRequestError`` (``ContextLengthError``), ``OverloadedError`` or
        ``UnavailableError``. The stream may raise ``GenerationError`` or ``UnavailableError``.
        """
