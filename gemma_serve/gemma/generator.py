"""A loaded Gemma 3 behind the ``GenerationClient`` protocol, in this process."""

import asyncio
from typing import Self

from gemma_serve.engine.async_engine import AsyncEngine
from gemma_serve.engine.config import EngineConfig
from gemma_serve.engine.engine import Engine
from gemma_serve.engine.stats import EngineStats
from gemma_serve.gemma.config import ModelConfig
from gemma_serve.gemma.engine_builder import build_engine, max_model_len
from gemma_serve.gemma.function_calling import calls_tools
from gemma_serve.gemma.loading import LoadedGemma, load_gemma
from gemma_serve.gemma.prompt import PromptBuilder
from gemma_serve.generation import GenerationRequest, GenerationStream, ModelDescription


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
            calls_tools=calls_tools(gemma.model.config),
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
            self._prompt_builder.build, request.messages, request.tools
        )
        return self._engine.submit(request.request_id, prompt, request.sampling, request.n)

    async def check_health(self) -> None:
        """As ``GenerationClient.check_health``."""
        self._engine.check_health()

    def close(self) -> None:
        """Stop the engine; unfinished requests get an ``UnavailableError``."""
        self._engine.close()
