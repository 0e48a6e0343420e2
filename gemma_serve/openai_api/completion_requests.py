"""From a plain completion request to one ``GenerationRequest`` per prompt."""

from dataclasses import replace

from gemma_serve.errors import InvalidRequestError
from gemma_serve.generation import (
    GenerationRequest,
    ModelDescription,
    Prompt,
    TextPrompt,
    TokenPrompt,
)
from gemma_serve.openai_api.completion_schemas import DEFAULT_MAX_TOKENS, CompletionRequest
from gemma_serve.openai_api.requesters import Requester
from gemma_serve.openai_api.sampling_params import check_token_id, given, sampling_params
from gemma_serve.openai_api.structured_outputs import constraining_field


def build_generation_requests(
    body: CompletionRequest,
    *,
    request_id: str,
    description: ModelDescription,
    requester: Requester,
) -> list[GenerationRequest]:
    """Check what takes more than one field or the model to check.

    Raises ``InvalidRequestError``.
    """
    prompts = _prompts(body, description)
    max_tokens = given(body.max_tokens, DEFAULT_MAX_TOKENS)
    _check_combinations(body, max_tokens)
    constraining = constraining_field(body)
    sampling = replace(
        sampling_params(body, description, max_tokens=max_tokens),
        logprobs=body.logprobs,
        prompt_logprobs=_num_prompt_logprobs(body),
    )
    return [
        GenerationRequest(
            request_id=request_id if len(prompts) == 1 else f"{request_id}-{index}",
            prompt=prompt,
            sampling=sampling,
            n=body.n or 1,
            user=requester.user,
            priority=requester.priority,
            cache_salt=requester.cache_salt,
            output_constraint=None if constraining is None else constraining.constraint,
            bad_words=tuple(body.bad_words or ()),
            truncate_prompt_tokens=body.truncate_prompt_tokens,
            return_prompt=bool(body.echo or body.return_token_ids),
        )
        for index, prompt in enumerate(prompts)
    ]


def _num_prompt_logprobs(body: CompletionRequest) -> int | None:
    """Enough for both who may ask: ``echo`` with ``logprobs``, and ``prompt_logprobs``."""
    of_echo = body.logprobs if body.echo else None
    return max((n for n in (of_echo, body.prompt_logprobs) if n is not None), default=None)


def _prompts(body: CompletionRequest, description: ModelDescription) -> list[Prompt]:
    add_bos = given(body.add_special_tokens, True)
    match body.prompt:
        case str(text):
            return [TextPrompt(text, add_bos)]
        case [str(), *_] as texts:
            return [TextPrompt(str(text), add_bos) for text in texts]
        case [int(), *_] as token_ids:
            return [_token_prompt(token_ids, "prompt", description)]
        case lists:
            return [
                _token_prompt(token_ids, f"prompt[{index}]", description)
                for index, token_ids in enumerate(lists)
            ]


def _token_prompt(token_ids: object, path: str, description: ModelDescription) -> TokenPrompt:
    assert isinstance(token_ids, list)  # the schema's union, which match does not narrow
    if max(token_ids) >= description.vocab_size:
        for index, token_id in enumerate(token_ids):
            check_token_id(token_id, description, param=f"{path}[{index}]")
    return TokenPrompt(tuple(token_ids))


def _check_combinations(body: CompletionRequest, max_tokens: int) -> None:
    if max_tokens == 0 and not body.echo:
        raise InvalidRequestError(
            "max_tokens may be 0 only with echo: there would be no answer",
            param="max_tokens",
            code="invalid_value",
        )
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise InvalidRequestError(
            f"best_of must be n, which is {body.n or 1}, or absent",
            param="best_of",
            code="unsupported_value",
        )
