"""Small real implementations of the project's seams, for the tests of every package."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from gemma_serve.generation import (
    FinishReason,
    GenerationDelta,
    GenerationRequest,
    GenerationStarted,
    GenerationStream,
    ModelDescription,
    ModelLoad,
    Prompt,
    PromptToken,
    SamplingParams,
    TextPrompt,
    TokenPrompt,
    VisionInput,
)
from gemma_serve.images.loader import ImageLoader
from gemma_serve.images.views import Detail
from gemma_serve.messages import ImagePart

Step = Sequence[GenerationDelta] | Exception | asyncio.Event
"""What an engine step brings: deltas, a failure, or nothing until an event is set."""

TEXT_MODEL = ModelDescription(
    max_model_len=4096,
    vocab_size=1000,
    default_sampling=SamplingParams(temperature=0.8, top_k=64, top_p=0.95),
    vision=None,
)
VISION_MODEL = ModelDescription(
    max_model_len=8192,
    vocab_size=1000,
    default_sampling=SamplingParams(),
    vision=VisionInput(view_size=2, tokens_per_view=4),
)
STARTED = GenerationStarted(prompt_tokens=7)
LOAD = ModelLoad(
    num_running=2, num_waiting=1, cache_usage=0.25, num_drafted_tokens=9, num_accepted_tokens=7
)


def delta(
    text: str, finish_reason: FinishReason | None = None, *, index: int = 0
) -> GenerationDelta:
    """One token that became ``text``."""
    return GenerationDelta(index, text, (5,), finish_reason)


def answer(*texts: str, finish_reason: FinishReason = FinishReason.STOP) -> list[Step]:
    """A step for each text and one for the token that ends the turn; two tokens were cached."""
    first, *others = [*(delta(text) for text in texts), delta("", finish_reason)]
    return [[replace(first, cached_tokens=2)], *([other] for other in others)]


class FakeGenerationClient:
    """A ``GenerationClient`` that plays the same script for every request."""

    def __init__(
        self,
        *script: Step,
        description: ModelDescription = TEXT_MODEL,
        started: GenerationStarted = STARTED,
        describe_error: Exception | None = None,
        health_error: Exception | None = None,
        generate_error: Exception | None = None,
        admission: asyncio.Event | None = None,
    ) -> None:
        """``admission``: what ``generate`` waits for."""
        self.requests: list[GenerationRequest] = []
        """Every request, in the order of arrival."""
        self.closed: list[str] = []
        """The ids of the requests whose streams were closed."""
        self.waiting = asyncio.Event()
        """Set once a request waits for an event."""
        self._script = script
        self._description = description
        self._started = started
        self._describe_error = describe_error
        self._health_error = health_error
        self._generate_error = generate_error
        self._admission = admission

    def play(self, *script: Step) -> None:
        """Change the script."""
        self._script = script

    async def describe(self) -> ModelDescription:
        if self._describe_error is not None:
            raise self._describe_error
        return self._description

    async def check_health(self) -> None:
        if self._health_error is not None:
            raise self._health_error

    async def measure_load(self) -> ModelLoad:
        if self._health_error is not None:
            raise self._health_error
        return LOAD

    async def tokenize(self, prompt: Prompt) -> tuple[PromptToken, ...]:
        if self._generate_error is not None:
            raise self._generate_error
        return tokens_of(prompt)

    async def generate(self, request: GenerationRequest) -> GenerationStream:
        self.requests.append(request)
        if self._admission is not None:
            await self._wait_for(self._admission)
        if self._generate_error is not None:
            raise self._generate_error

        async def close() -> None:
            await asyncio.sleep(0)  # a real one waits too, and can be cancelled there
            self.closed.append(request.request_id)

        prompt = tokens_of(request.prompt) if request.return_prompt else ()
        return GenerationStream(replace(self._started, prompt=prompt), self._play(), close)

    async def _play(self) -> AsyncIterator[Sequence[GenerationDelta]]:
        for step in self._script:
            if isinstance(step, asyncio.Event):
                await self._wait_for(step)
            elif isinstance(step, Exception):
                raise step
            else:
                yield step

    async def _wait_for(self, event: asyncio.Event) -> None:
        self.waiting.set()
        await event.wait()


def tokens_of(prompt: Prompt) -> tuple[PromptToken, ...]:
    """A token per byte, whose id it is; a chat is its control token alone."""
    bos = PromptToken(2, b"<bos>", is_control=True)
    match prompt:
        case TokenPrompt(token_ids):
            return tuple(bos if i == 2 else PromptToken(i, bytes([i % 256])) for i in token_ids)
        case TextPrompt(text, add_bos):
            tokens = (PromptToken(i, bytes([i])) for i in text.encode())
            return (bos, *tokens) if add_bos else tuple(tokens)
        case _:
            return (bos,)


class FakeImageLoader(ImageLoader):
    """Makes an image out of its own URL, unless the URL is one that fails."""

    def __init__(self, failures: dict[str, Exception] | None = None) -> None:
        self.calls: list[tuple[str, Detail, str]] = []
        """URL, detail and param of every image that was asked for."""
        self.is_closed = False
        self._failures = failures or {}

    async def load(self, url: str, *, detail: Detail, vision: VisionInput, param: str) -> ImagePart:
        assert vision == VISION_MODEL.vision
        self.calls.append((url, detail, param))
        await asyncio.sleep(0)
        if url in self._failures:
            raise self._failures[url]
        return image_of(url)

    async def aclose(self) -> None:
        self.is_closed = True


def image_of(url: str) -> ImagePart:
    """What ``FakeImageLoader`` makes of ``url``."""
    return ImagePart((url.encode(),))
