"""From a client's chat completion request to the engine's ``GenerationRequest``."""

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TypeVar

from gemma_serve.errors import InvalidRequestError
from gemma_serve.generation import (
    GenerationRequest,
    ModelDescription,
    SamplingParams,
    VisionInput,
)
from gemma_serve.images.limits import ImageLimits
from gemma_serve.images.loader import ImageLoader
from gemma_serve.messages import ChatMessage, ContentPart, ImagePart, Role, TextPart, ToolCall
from gemma_serve.openai_api.chat_messages import (
    AssistantMessage,
    FunctionMessage,
    ImageContentPart,
    ImageUrl,
    Message,
    RefusalContentPart,
    TextContentPart,
    ToolMessage,
)
from gemma_serve.openai_api.chat_schemas import ChatCompletionRequest
from gemma_serve.openai_api.chat_tools import ToolUse

T = TypeVar("T")

_ROLES = {
    "system": Role.SYSTEM,
    "developer": Role.SYSTEM,
    "user": Role.USER,
    "assistant": Role.ASSISTANT,
    "tool": Role.TOOL,
    "function": Role.TOOL,
}


async def build_generation_request(
    body: ChatCompletionRequest,
    *,
    request_id: str,
    description: ModelDescription,
    image_loader: ImageLoader,
    image_limits: ImageLimits,
    tool_use: ToolUse | None = None,
) -> GenerationRequest:
    """Check what takes more than one field or the model to check, and fetch the images.

    Raises ``InvalidRequestError``.
    """
    _check_combinations(body)
    sampling = _sampling_params(body, description)
    urls = dict(_image_urls(body.messages))
    vision = _vision_for(urls, description, image_limits)
    images = {} if vision is None else await _load_images(urls, vision, image_loader)
    return GenerationRequest(
        request_id=request_id,
        messages=tuple(
            _chat_message(message, f"messages[{index}]", images)
            for index, message in enumerate(body.messages)
        ),
        sampling=sampling,
        n=body.n or 1,
        tools=None if tool_use is None else tool_use.offer,
        output_constraint=None if tool_use is None else tool_use.constraint,
    )


def _check_combinations(body: ChatCompletionRequest) -> None:
    if body.stream_options is not None and not body.stream:
        raise InvalidRequestError(
            "stream_options is only allowed when stream is true",
            param="stream_options",
            code="invalid_value",
        )
    _check_turn_to_generate(body)


def _check_turn_to_generate(body: ChatCompletionRequest) -> None:
    """Refuse what this server does not do: it always continues a last message of the assistant,
    and always answers any other."""
    ends_with_answer = isinstance(body.messages[-1], AssistantMessage)
    if body.continue_final_message and not ends_with_answer:
        raise InvalidRequestError(
            "continue_final_message is only allowed when the last message is the assistant's",
            param="continue_final_message",
            code="invalid_value",
        )
    if body.continue_final_message is False and ends_with_answer:
        raise InvalidRequestError(
            "This server always continues a last message of the assistant",
            param="continue_final_message",
            code="unsupported_value",
        )
    if body.add_generation_prompt is False and not ends_with_answer:
        raise InvalidRequestError(
            "This server always answers a last message that is not the assistant's",
            param="add_generation_prompt",
            code="unsupported_value",
        )


def _sampling_params(body: ChatCompletionRequest, description: ModelDescription) -> SamplingParams:
    default = description.default_sampling
    return replace(
        default,
        max_tokens=_first(body.max_completion_tokens, body.max_tokens, default.max_tokens),
        temperature=_given(body.temperature, default.temperature),
        top_p=_given(body.top_p, default.top_p),
        top_k=_top_k(body.top_k, default.top_k),
        min_p=_given(body.min_p, default.min_p),
        repetition_penalty=_given(
            _first(body.repetition_penalty, body.repeat_penalty), default.repetition_penalty
        ),
        presence_penalty=_given(body.presence_penalty, default.presence_penalty),
        frequency_penalty=_given(body.frequency_penalty, default.frequency_penalty),
        logit_bias=_logit_bias(body, description),
        seed=_first(body.seed, default.seed),
        stop=tuple(body.stop or default.stop),
        stop_token_ids=_stop_token_ids(body, description),
        ignore_eos=_given(body.ignore_eos, default.ignore_eos),
    )


def _given(value: T | None, default: T) -> T:
    return default if value is None else value


def _first(*values: T | None) -> T | None:
    return next((value for value in values if value is not None), None)


def _top_k(value: int | None, default: int | None) -> int | None:
    if value is None:
        return default
    return value if value > 0 else None


def _logit_bias(
    body: ChatCompletionRequest, description: ModelDescription
) -> tuple[tuple[int, float], ...]:
    if body.logit_bias is None:
        return description.default_sampling.logit_bias
    biases = tuple((int(key), bias) for key, bias in body.logit_bias.items())
    for token_id, _ in biases:
        _check_token_id(token_id, description, param=f"logit_bias.{token_id}")
    return biases


def _stop_token_ids(body: ChatCompletionRequest, description: ModelDescription) -> tuple[int, ...]:
    if not body.stop_token_ids:
        return description.default_sampling.stop_token_ids
    for index, token_id in enumerate(body.stop_token_ids):
        _check_token_id(token_id, description, param=f"stop_token_ids[{index}]")
    return tuple(body.stop_token_ids)


def _check_token_id(token_id: int, description: ModelDescription, *, param: str) -> None:
    if token_id >= description.vocab_size:
        raise InvalidRequestError(
            f"{param}: the model's token ids end at {description.vocab_size - 1}",
            param=param,
            code="invalid_value",
        )


def _image_urls(messages: list[Message]) -> Iterator[tuple[str, ImageUrl]]:
    """Each image's URL under the path of its part."""
    for message_index, message in enumerate(messages):
        for part_index, part in enumerate(message.content or ()):
            if isinstance(part, ImageContentPart):
                yield f"messages[{message_index}].content[{part_index}]", part.image_url


def _vision_for(
    urls: Mapping[str, ImageUrl], description: ModelDescription, limits: ImageLimits
) -> VisionInput | None:
    """How to prepare the images; ``None`` when there are none."""
    if not urls:
        return None
    if description.vision is None:
        raise InvalidRequestError(
            "this model reads text only; leave images out",
            param=next(iter(urls)),
            code="unsupported_value",
        )
    if len(urls) > limits.max_images:
        raise InvalidRequestError(
            f"a request may have {limits.max_images} images, got {len(urls)}",
            param="messages",
            code="invalid_value",
        )
    return description.vision


async def _load_images(
    urls: Mapping[str, ImageUrl], vision: VisionInput, image_loader: ImageLoader
) -> dict[str, ImagePart]:
    """All at once; the first that fails stops the others."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = {
                path: group.create_task(
                    image_loader.load(
                        image.url,
                        detail=image.detail or "auto",
                        vision=vision,
                        param=f"{path}.image_url.url",
                    )
                )
                for path, image in urls.items()
            }
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return {path: task.result() for path, task in tasks.items()}


def _chat_message(message: Message, path: str, images: Mapping[str, ImagePart]) -> ChatMessage:
    parts = tuple(
        _content_part(part, f"{path}.content[{index}]", images)
        for index, part in enumerate(message.content or ())
    )
    if isinstance(message, AssistantMessage):
        return _assistant_message(message, parts)
    return ChatMessage(_ROLES[message.role], parts, tool_call_id=_answered_call(message))


def _content_part(
    part: TextContentPart | RefusalContentPart | ImageContentPart,
    path: str,
    images: Mapping[str, ImagePart],
) -> ContentPart:
    if isinstance(part, ImageContentPart):
        return images[path]
    return TextPart(part.text if isinstance(part, TextContentPart) else part.refusal)


def _assistant_message(message: AssistantMessage, parts: tuple[ContentPart, ...]) -> ChatMessage:
    if message.refusal is not None:
        parts += (TextPart(message.refusal),)
    calls = tuple(
        ToolCall(call.id, call.function.name, call.function.arguments)
        for call in message.tool_calls or ()
    )
    if message.function_call is not None:
        # The deprecated call has no id; its result refers to it by name.
        function = message.function_call
        calls += (ToolCall(function.name, function.name, function.arguments),)
    return ChatMessage(Role.ASSISTANT, parts, tool_calls=calls)


def _answered_call(message: Message) -> str | None:
    if isinstance(message, ToolMessage):
        return message.tool_call_id
    return message.name if isinstance(message, FunctionMessage) else None
