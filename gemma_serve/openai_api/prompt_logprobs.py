"""How probable the model found a prompt's tokens, in vLLM's form: one object per token."""

from collections.abc import Sequence
from typing import TypedDict

from gemma_serve.generation import SampledLogprobs


class PromptLogprobPayload(TypedDict):
    """``response_schemas.PromptLogprob`` as it is written."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobsPayload = list[dict[str, PromptLogprobPayload] | None]


def prompt_logprobs(positions: Sequence[SampledLogprobs], num_top: int) -> PromptLogprobsPayload:
    """The prompt's own token of each place and the ``num_top`` most probable ones, by their ids.

    ``positions``: of all tokens but the first, which nothing before it could foretell.
    """
    return [None, *(_alternatives(position, num_top) for position in positions)]


def _alternatives(position: SampledLogprobs, num_top: int) -> dict[str, PromptLogprobPayload]:
    ranks = {token.token_id: rank for rank, token in enumerate(position.top, start=1)}
    return {
        str(token.token_id): {
            "logprob": token.logprob,
            "rank": ranks.get(token.token_id),
            "decoded_token": token.token_bytes.decode(errors="replace"),
        }
        for token in (position.chosen, *position.top[:num_top])
    }
