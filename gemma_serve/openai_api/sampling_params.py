"""From the fields that choose tokens to the engine's ``SamplingParams``."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from gemma_serve.errors import InvalidRequestError
from gemma_serve.generation import ModelDescription, SamplingParams
from gemma_serve.openai_api.sampling_fields import SamplingFields

T = TypeVar("T")


def sampling_params(
    fields: SamplingFields, description: ModelDescription, *, max_tokens: int | None
) -> SamplingParams:
    """Fields that are open take the checkpoint's defaults.

    ``max_tokens``: as the endpoint reads it. Raises ``InvalidRequestError`` for what takes more
    than one field or the model to check.
    """
    _check(fields, max_tokens)
    default = description.default_sampling
    return replace(
        default,
        max_tokens=max_tokens,
        temperature=given(fields.temperature, default.temperature),
        top_p=given(fields.top_p, default.top_p),
        top_k=_top_k(fields.top_k, default.top_k),
        min_p=given(fields.min_p, default.min_p),
        repetition_penalty=given(
            first(fields.repetition_penalty, fields.repeat_penalty), default.repetition_penalty
        ),
        presence_penalty=given(fields.presence_penalty, default.presence_penalty),
        frequency_penalty=given(fields.frequency_penalty, default.frequency_penalty),
        logit_bias=_logit_bias(fields, description),
        seed=first(fields.seed, default.seed),
        stop=tuple(fields.stop or default.stop),
        stop_token_ids=_token_ids(fields.stop_token_ids, "stop_token_ids", description)
        or default.stop_token_ids,
        ignore_eos=given(fields.ignore_eos, default.ignore_eos),
        min_tokens=given(fields.min_tokens, default.min_tokens),
        include_stop_str_in_output=given(
            first(fields.include_stop_str_in_output, fields.no_stop_trim),
            default.include_stop_str_in_output,
        ),
        skip_special_tokens=given(fields.skip_special_tokens, default.skip_special_tokens),
        speculation=given(fields.speculation, default.speculation),
        allowed_token_ids=_token_ids(fields.allowed_token_ids, "allowed_token_ids", description)
        or default.allowed_token_ids,
        prompt_logprobs=fields.prompt_logprobs,
    )


def given(value: T | None, default: T) -> T:
    """``value`` unless it is absent."""
    return default if value is None else value


def first(*values: T | None) -> T | None:
    """The first that is not absent."""
    return next((value for value in values if value is not None), None)


def check_token_id(token_id: int, description: ModelDescription, *, param: str) -> None:
    """Raise ``InvalidRequestError`` for an id that the model does not have."""
    if token_id >= description.vocab_size:
        raise InvalidRequestError(
            f"{param}: the model's token ids end at {description.vocab_size - 1}",
            param=param,
            code="invalid_value",
        )


def _check(fields: SamplingFields, max_tokens: int | None) -> None:
    if fields.stream_options is not None and not fields.stream:
        raise InvalidRequestError(
            "stream_options is only allowed when stream is true",
            param="stream_options",
            code="invalid_value",
        )
    if fields.prompt_logprobs is not None and fields.stream:
        raise InvalidRequestError(
            "prompt_logprobs is only allowed without stream",
            param="prompt_logprobs",
            code="invalid_value",
        )
    if max_tokens is not None and (fields.min_tokens or 0) > max_tokens:
        raise InvalidRequestError(
            f"min_tokens is {fields.min_tokens}, more than the limit of {max_tokens} tokens",
            param="min_tokens",
            code="invalid_value",
        )


def _top_k(value: int | None, default: int | None) -> int | None:
    if value is None:
        return default
    return value if value > 0 else None


def _logit_bias(
    fields: SamplingFields, description: ModelDescription
) -> tuple[tuple[int, float], ...]:
    if fields.logit_bias is None:
        return description.default_sampling.logit_bias
    biases = tuple((int(key), bias) for key, bias in fields.logit_bias.items())
    for token_id, _ in biases:
        check_token_id(token_id, description, param=f"logit_bias.{token_id}")
    return biases


def _token_ids(
    token_ids: Sequence[int] | None, name: str, description: ModelDescription
) -> tuple[int, ...]:
    for index, token_id in enumerate(token_ids or ()):
        check_token_id(token_id, description, param=f"{name}[{index}]")
    return tuple(token_ids or ())
