"""Compiles output constraints away from the engine's thread, once each."""

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from time import perf_counter
from typing import Final

from llguidance import LLMatcher, LLParserLimits

from gemma_serve.errors import OutputConstraintError, OverloadedError
from gemma_serve.generation import OutputConstraint
from gemma_serve.structured_output.grammar_constraint import GrammarConstraint
from gemma_serve.structured_output.grammars import grammar_of, refusal
from gemma_serve.structured_output.vocabulary import Encode, grammar_tokenizer

logger = logging.getLogger(__name__)

_MAX_COMPILED: Final = 32
"""Grammars kept. Each has the lexer's states of its first mask; a copy adds its own."""
_MAX_COMPILE_S: Final = 10.0
"""A schema of 20,000 enum values takes 0.3 s, one of 2,000 optional properties 0.8 s."""
_NUM_THREADS: Final = 2
_LIMITS: Final = LLParserLimits(
    max_lexer_states=50_000,  # of 1 to 2 kB, in each sequence; a fifth of the default
    verbose_errors=False,  # which hold what the client sent, and end up in logs
)


class ConstraintCompiler:
    """Makes the constraints of sequences for one vocabulary."""

    def __init__(
        self, token_bytes: Sequence[bytes], eos_token_ids: Sequence[int], encode: Encode
    ) -> None:
        """As ``grammar_tokenizer``, seconds of the interpreter's lock included."""
        self._tokenizer = grammar_tokenizer(token_bytes, eos_token_ids, encode)
        self._compiled = lru_cache(maxsize=_MAX_COMPILED)(self._compile)
        self._executor = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="grammar-compiler")

    async def constraints(self, wanted: OutputConstraint, n: int) -> tuple[GrammarConstraint, ...]:
        """One for each of ``n`` sequences.

        Raises ``OutputConstraintError``, or ``OverloadedError`` if others keep the compiler busy.
        """
        work = self._executor.submit(self._copies, wanted, n)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(work), _MAX_COMPILE_S)
        except TimeoutError:
            if work.cancelled():  # It never began.
                raise OverloadedError("Too many output formats wait to be compiled.") from None
            raise OutputConstraintError(
                f"The format takes longer than {_MAX_COMPILE_S:.0f} s to compile"
            ) from None

    def close(self) -> None:
        """Take no more work."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _copies(self, wanted: OutputConstraint, n: int) -> tuple[GrammarConstraint, ...]:
        compiled = self._compiled(wanted)
        return tuple(GrammarConstraint(compiled.deep_copy()) for _ in range(n))

    def _compile(self, wanted: OutputConstraint) -> LLMatcher:
        """A matcher at its start, which is only ever copied."""
        started_at = perf_counter()
        matcher = LLMatcher(self._tokenizer, grammar_of(wanted), log_level=0, limits=_LIMITS)
        if not matcher.is_error():
            # The first mask is the dearest; copies inherit its states. It fails if no text fits.
            matcher.compute_bitmask()
        if matcher.is_error():
            raise refusal(wanted, matcher.get_error())
        logger.debug("compiled kind=%s duration_s=%.3f", wanted.kind, perf_counter() - started_at)
        return matcher
