"""How tokens are counted in answers."""

from gemma_serve.generation import Usage
from gemma_serve.openai_api.response_schemas import (
    CompletionTokensDetails,
    CompletionUsage,
    PromptTokensDetails,
)


def completion_usage(usage: Usage) -> CompletionUsage:
    """``usage`` in OpenAI's form."""
    return CompletionUsage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=usage.cached_tokens),
        completion_tokens_details=CompletionTokensDetails(),
    )
