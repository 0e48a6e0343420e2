"""A loaded Gemma 3 behind the ``GenerationClient`` protocol, in this process."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Self

from gemma_serve.engine.async_engine import AsyncEngine
from gemma_serve.engine.config import EngineConfig
from gemma_serve.engine.constraint import TokenConstraint
from gemma_serve.engine.engine import Engine
from gemma_serve.engine.stats import EngineStats
from gemma_serve.gemma.config import ModelConfig
from gemma_serve.gemma.draft_model import load_draft
from gemma_serve.gemma.engine_builder import build_engine, max_model_len
from gemma_serve.gemma.function_calling import calls_tools, tool_form
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
from gemma_serve.structured_output.compiler import ConstraintCompiler


class GemmaGenerator:
    """Answers requests with an engine of its own. Methods run on the caller's event loop."""

    def __init__(
        self,
        prompt_builder: PromptBuilder,
        engine: AsyncEngine,
        description: ModelDescription,
        constraint_compiler: ConstraintCompiler,
    ) -> None:
        self._prompt_builder = prompt_builder
        self._engine = engine
        self._description = description
        self._constraint_compiler = constraint_compiler

    @classmethod
    def load(cls, model: ModelConfig, config: EngineConfig) -> Self:
        """Load the weights and start the engine; takes seconds to minutes.

        Raises ``ConfigurationError`` (``CheckpointError``) with what to change.
        """
        gemma: LoadedGemma | None = None
        constraint_compiler: ConstraintCompiler | None = None

        def make_engine() -> Engine:
            nonlocal gemma, constraint_compiler
            draft = None if (d := config.draft_model) is None else load_draft(d, model)
            gemma = load_gemma(model)
            engine = build_engine(gemma, config, draft=draft)
            constraint_compiler = _constraint_compiler(gemma, engine)
            return engine

        engine = AsyncEngine(
            make_engine,
            max_unfinished_sequences=config.max_num_seqs + config.max_queued_requests,
        )
        assert gemma is not None  # the engine has been made
        assert constraint_compiler is not None
        description = ModelDescription(
            max_model_len=max_model_len(gemma, config),
            vocab_size=gemma.model.lm_head.out_features,
            default_sampling=gemma.default_sampling,
            vision=gemma.vision,
            calls_tools=calls_tools(gemma.model.config, gemma.tokenizer),
            tool_form=tool_form(gemma.tokenizer),
        )
        prompt_builder = PromptBuilder(
            gemma.tokenizer,
            vision=gemma.vision,
            image_token_id=getattr(gemma.model.config, "image_token_id", None),
            max_model_len=description.max_model_len,
        )
        return cls(prompt_builder, engine, description, constraint_compiler)

    @property
    def stats(self) -> EngineStats:
        return self._engine.stats

    async def describe(self) -> ModelDescription:
        """As ``GenerationClient.describe``."""
        return self._description

    async def generate(self, request: GenerationRequest) -> GenerationStream:
        """As ``GenerationClient.generate``. What takes time before admission runs on threads."""
        prompt = await asyncio.to_thread(
            self._prompt_builder.build, request.prompt, truncate_to=request.truncate_prompt_tokens
        )
        sampling = request.sampling
        if request.bad_words:
            banned = self._prompt_builder.banned_token_sequences(request.bad_words)
            sampling = replace(sampling, banned_token_sequences=banned)
        stream = self._engine.submit(
            request.request_id,
            prompt,
            sampling,
            request.n,
            user=request.user,
            priority=request.priority,
            cache_salt=request.cache_salt,
            constraints=await self._constraints(request),
        )
        if request.return_prompt:
            tokens = self._describe_tokens(prompt.token_ids)
            stream.started = replace(stream.started, prompt=tokens)
        return stream

    async def _constraints(self, request: GenerationRequest) -> tuple[TokenConstraint, ...]:
        if request.output_constraint is None:
            return ()
        return await self._constraint_compiler.constraints(request.output_constraint, request.n)

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
            num_drafted_tokens=stats.num_drafted_tokens,
            num_accepted_tokens=stats.num_accepted_tokens,
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
        self._constraint_compiler.close()
        self._engine.close()


def _constraint_compiler(gemma: LoadedGemma, engine: Engine) -> ConstraintCompiler:
    backend = gemma.tokenizer.backend_tokenizer

    def encode(text: str) -> list[int]:
        token_ids: list[int] = backend.encode(text, add_special_tokens=False).ids
        return token_ids

    vocabulary = engine.vocabulary
    return ConstraintCompiler(vocabulary.token_bytes, sorted(vocabulary.eos_token_ids), encode)
