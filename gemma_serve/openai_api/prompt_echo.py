"""The prompt as the beginning of a choice."""

from collections.abc import Sequence
from dataclasses import dataclass

from gemma_serve.generation import Prompt, PromptToken, SampledLogprobs, TextPrompt
from gemma_serve.openai_api.completion_logprobs import (
    LogprobsPayload,
    LogprobsWriter,
    extend_logprobs,
)


@dataclass(frozen=True, slots=True)
class PromptEcho:
    """What ``echo`` puts before a choice."""

    tokens: tuple[PromptToken, ...]
    first_is_shown: bool
    """Whether the text begins with the first token; the server's own is left out."""

    @classmethod
    def of(cls, prompt: Prompt, tokens: Sequence[PromptToken]) -> "PromptEcho":
        """``tokens``: as ``GenerationStarted`` tells them."""
        first = tokens[0]
        is_ours = (
            isinstance(prompt, TextPrompt)
            and prompt.add_bos
            and first.is_control
            and not prompt.text.encode().startswith(first.written)
        )
        return cls(tuple(tokens), not is_ours)

    @property
    def text(self) -> str:
        return b"".join(self._shown).decode(errors="replace")

    def logprobs(
        self, positions: Sequence[SampledLogprobs], writer: LogprobsWriter
    ) -> LogprobsPayload:
        """``positions``: of all tokens but the first."""
        first, *others = self._shown
        payload = writer.write_first(self.tokens[0], first)
        extend_logprobs(payload, writer.write(positions, others))
        return payload

    @property
    def _shown(self) -> list[bytes]:
        """What of the text each token is."""
        shown = [token.written for token in self.tokens]
        return shown if self.first_is_shown else [b"", *shown[1:]]
