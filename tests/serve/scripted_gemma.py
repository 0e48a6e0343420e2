"""A model whose answers are scripted, in a replica of its own; the workers of Ray import it."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from deployments.gemma import GemmaDeployment
from gemma_serve.errors import CheckpointError, ContextLengthError, OverloadedError
from gemma_serve.generation import (
    ChatPrompt,
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
)
from gemma_serve.messages import TextPart

if TYPE_CHECKING:
    from gemma_serve.gemma.generator import GemmaGenerator  # brings torch along


class ScriptedGenerator:
    """A ``GenerationClient`` that does what the last message's text says.

    ``say A B``: answer in one list of deltas per word. ``go on``: answer without end. ``think``: be
    admitted and never answer. ``wait``: never be admitted. ``too long``, ``full``, ``crash``: fail
    before admission. ``crash later``: fail after the first word.
    """

    def __init__(self) -> None:
        self.num_running = 0

    async def describe(self) -> ModelDescription:
        return ModelDescription(
            max_model_len=100, vocab_size=10, default_sampling=SamplingParams(), vision=None
        )

    async def generate(self, request: GenerationRequest) -> GenerationStream:
        script = _last_text(request)
        self.num_running += 1
        try:
            await _admit(script)
        except BaseException:
            self.num_running -= 1
            raise
        deltas = self._deltas(script)
        return GenerationStream(GenerationStarted(prompt_tokens=3), deltas, self._close)

    async def check_health(self) -> None:
        pass

    async def measure_load(self) -> ModelLoad:
        return ModelLoad(num_running=self.num_running, num_waiting=0, cache_usage=0.0)

    async def tokenize(self, prompt: Prompt) -> tuple[PromptToken, ...]:
        raise NotImplementedError

    def close(self) -> None:
        pass

    async def _close(self) -> None:
        self.num_running -= 1

    async def _deltas(self, script: str) -> AsyncIterator[Sequence[GenerationDelta]]:
        match script.split():
            case ["say", *words]:
                for word in words:
                    yield [GenerationDelta(0, word, (1,))]
            case ["go", "on"]:
                while True:
                    yield [GenerationDelta(0, "on ", (1,))]
                    await asyncio.sleep(0.01)
            case ["think"]:
                await asyncio.Event().wait()
            case ["crash", "later"]:
                yield [GenerationDelta(0, "so far", (1,))]
                raise RuntimeError("secret internals")
        yield [GenerationDelta(0, "", (2,), FinishReason.STOP)]


async def _admit(script: str) -> None:
    match script:
        case "wait":
            await asyncio.Event().wait()
        case "too long":
            raise ContextLengthError.of(prompt_tokens=120, max_model_len=100)
        case "full":
            raise OverloadedError("The queue is full.", retry_after_s=7.0)
        case "crash":
            raise RuntimeError("secret internals")


def _last_text(request: GenerationRequest) -> str:
    assert isinstance(request.prompt, ChatPrompt)
    part = request.prompt.messages[-1].parts[-1]
    assert isinstance(part, TextPart)
    return part.text


class ScriptedGemma(GemmaDeployment):
    """The real deployment around the scripted generator."""

    def __init__(self) -> None:
        self._script = ScriptedGenerator()
        # The real class needs a checkpoint and torch; the deployment uses these methods only.
        self._generator = cast("GemmaGenerator", self._script)

    async def num_running(self) -> int:
        return self._script.num_running

    async def pid(self) -> int:
        return os.getpid()


class SlowlyLoadingGemma(ScriptedGemma):
    """Loads until ``may_finish`` exists, and fails if it says so."""

    def __init__(self, may_finish: Path) -> None:
        while not may_finish.exists():
            time.sleep(0.02)
        if may_finish.read_text() == "fail":
            raise CheckpointError("no such model")
        super().__init__()
