"""The deployment that holds the model: one replica is one copy on its own GPUs."""

import os
import sys
from collections.abc import AsyncIterator, Sequence

from deployments.logs import configure_logging
from deployments.return_path import ReturnAddress, StreamSender
from gemma_serve.engine.config import EngineConfig
from gemma_serve.gemma.config import ModelConfig
from gemma_serve.generation import (
    GenerationDelta,
    GenerationRequest,
    GenerationStarted,
    GenerationStream,
    ModelDescription,
    ModelLoad,
    Prompt,
    PromptToken,
)


class GemmaDeployment:
    """Answers ``RayGenerationClient``; the constructor loads the model, which can take minutes."""

    def __init__(self, model: ModelConfig, engine: EngineConfig, num_threads: int) -> None:
        configure_logging()
        # Ray has set it from the cores that it reserved, fewer than there are. torch reads it when
        # it is loaded, for every thread; torch.set_num_threads would not reach the engine's.
        os.environ["OMP_NUM_THREADS"] = str(num_threads)
        # The engine's thread takes Python's lock back after every operation; at each hop of a token
        # the event loop would wait for it the usual 5 ms.
        sys.setswitchinterval(0.0005)
        # Imported here: whoever only wires the application needs no torch.
        from gemma_serve.gemma.generator import GemmaGenerator

        self._generator = GemmaGenerator.load(model, engine)

    async def describe(self) -> ModelDescription:
        return await self._generator.describe()

    async def measure_load(self) -> ModelLoad:
        return await self._generator.measure_load()

    async def tokenize(self, prompt: Prompt) -> tuple[PromptToken, ...]:
        return await self._generator.tokenize(prompt)

    async def generate(
        self, request: GenerationRequest, return_to: ReturnAddress | None = None
    ) -> AsyncIterator[GenerationStarted | Sequence[GenerationDelta]]:
        """``GenerationStarted``, then lists of deltas; Serve cancels it with the caller.

        They are sent to ``return_to`` if that is on this machine, and yielded otherwise. Errors are
        raised either way.
        """
        async with await self._generator.generate(request) as stream:
            sender = None if return_to is None else await StreamSender.connect(return_to)
            if sender is not None:
                await _send(stream, sender)
                return
            yield stream.started
            async for deltas in stream:
                yield deltas

    async def check_health(self) -> None:
        """Serve calls it every few seconds and replaces the replica when it raises."""
        await self._generator.check_health()

    def __del__(self) -> None:
        # Serve calls it once the last request of a replica that stops is done. There is no
        # generator when the constructor has failed.
        if hasattr(self, "_generator"):
            self._generator.close()


async def _send(stream: GenerationStream, sender: StreamSender) -> None:
    async with sender:
        try:
            await sender.send(stream.started)
            async for deltas in stream:
                await sender.send(deltas)
            await sender.send_end()
        except ConnectionError:
            pass  # nobody reads any more
