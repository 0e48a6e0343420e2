"""A loaded Gemma 3 behind the ``GenerationClient`` protocol, in this process."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Self

from gemma_serve.engine.async_engine import AsyncEngine
from gemma_serve.engine.config import EngineConfig
from gemma_serve.engine.engine import Engine
from gemma_serve.engine.stats import EngineStats
from gemma_serve.gemma.config import ModelConfig
from gemma_serve.gemma.engine_builder import build_engine, max_model_len
from gemma_serve.gemma.loading import LoadedGemma, load_gemma
from gemma_serve.gemma.prompt import PromptBuilder
from gemma_serve.generation import (
    GenerationRequest,
    GenerationStream,
    ModelDescription,
    ModelLoad,
    Prompt,
    PromptToken,
)


class GemmaGenerator:
    """Answers requests with an engine of its own. Methods run on the caller's event loop."""

    def __init__(
        self, prompt_builder: PromptBuilder, engine: AsyncEngine, description: ModelDescription
    ) -> None:
        self._prompt_builder = prompt_builder
        self._engine = engine
        self._description = description

    @classmethod
    def load(cls, model: ModelConfig, config: EngineConfig) -> Self:
        """Load the weights and start the engine; takes seconds to minutes.

        Raises ``ConfigurationError`` (``CheckpointError``) with what to change.
        """
        gemma: LoadedGemma | None = None

        def make_engine() -> Engine:
            nonlocal gemma
            gemma = load_gemma(model)
            return build_engine(gemma, config)

        engine = AsyncEngine(
            make_engine,
            max_unfinished_sequences=config.max_num_seqs + config.max_queued_requests,
        )
        assert gemma is not None  # the engine has been made
        description = ModelDescription(
            max_model_len=max_model_len(gemma, config),
            vocab_size=gemma.model.lm_head.out_features,
            default_sampling=gemma.default_sampling,
            vision=gemma.vision,
        )
        prompt_builder = PromptBuilder(
            gemma.tokenizer,
            vision=gemma.vision,
            image_token_id=getattr(gemma.model.config, "image_token_id", None),
            max_model_len=description.max_model_len,
        )
        return cls(prompt_builder, engine, description)

    @property
    def stats(self) -> EngineStats:
        return self._engine.stats

    async def describe(self) -> ModelDescription:
        """As ``GenerationClient.describe``."""
        return self._description

    async def generate(self, request: GenerationRequest) -> GenerationStream:
        """As ``GenerationClient.generate``. Templating and tokenizing run on a worker thread."""
        prompt = await asyncio.to_thread(
            self._prompt_builder.build, request.prompt, truncate_to=request.truncate_prompt_tokens
        )
        sampling = request.sampling
        if request.bad_words:
            banned = self._prompt_builder.banned_token_sequences(request.bad_words)
            sampling = replace(sampling, banned_token_sequences=banned)
        stream = self._engine.submit(request.request_id, prompt, sampling, request.n)
        if request.return_prompt:
            tokens = self._describe_tokens(prompt.token_ids)
            stream.started = replace(stream.started, prompt=tokens)
        return stream

    async def tokenize(self, prompt: Prompt) -> tuple[PromptToken, ...]:
        """As ``GenerationClient.tokenize``."""
        inputs = await asyncio.to_thread(self._prompt_builder.read, prompt)
        return self._describe_tokens(inputs.token_ids)

    async def measure_load(self) -> ModelLoad:
        """As ``GenerationClient.measure_load``."""
        stats = self._engine.stats
        return ModelLoad(
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            cache_usage=1 - stats.num_free_blocks / stats.num_blocks,
        )

    def _describe_tokens(self, token_ids: Sequence[int]) -> tuple[PromptToken, ...]:
        vocabulary = self._engine.vocabulary
        names, texts = vocabulary.control_token_names, vocabulary.token_bytes
        return tuple(
            PromptToken(i, names[i], is_control=True) if i in names else PromptToken(i, texts[i])
            for i in token_ids
        )

    async def check_health(self) -> None:
        """As ``GenerationClient.check_health``."""
        self._engine.check_health()

    def close(self) -> None:
        """Stop the engine; unfinished requests get an ``UnavailableError``."""
        self._engine.close()
