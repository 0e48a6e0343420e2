"""From a client's chat completion request to the engine's ``GenerationRequest``."""

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import replace

from gemma_serve.errors import InvalidRequestError
from gemma_serve.generation import (
    ChatPrompt,
    GenerationRequest,
    ModelDescription,
    OutputConstraint,
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
from gemma_serve.openai_api.requesters import Requester
from gemma_serve.openai_api.sampling_params import first, sampling_params
from gemma_serve.openai_api.structured_outputs import constraining_field

_ROLES = {
    "system": Role.SYSTEM,
    "developer": Role.SYSTEM,
    "user": Role.USER,
    "assistant": Role.ASSISTANT,
    "tool": Role.TOOL,
    "function": Role.TOOL,
}


_ANYONE = Requester(user=None, cache_salt=None)


async def build_generation_request(
    body: ChatCompletionRequest,
    *,
    request_id: str,
    description: ModelDescription,
    image_loader: ImageLoader,
    image_limits: ImageLimits,
    requester: Requester = _ANYONE,
    tool_use: ToolUse | None = None,
) -> GenerationRequest:
    """Check what takes more than one field or the model to check, and fetch the images.

    Raises ``InvalidRequestError``.
    """
    _check_combinations(body)
    sampling = _sampling_params(body, description)
    constraint = _output_constraint(body, tool_use)
    urls = dict(_image_urls(body.messages))
    vision = _vision_for(urls, description, image_limits)
    images = {} if vision is None else await _load_images(urls, vision, image_loader)
    return GenerationRequest(
        request_id=request_id,
        prompt=ChatPrompt(
            messages=tuple(
                _chat_message(message, f"messages[{index}]", images)
                for index, message in enumerate(body.messages)
            ),
            continue_final_message=_continues(body),
            template_kwargs=tuple((body.chat_template_kwargs or {}).items()),
            tools=None if tool_use is None else tool_use.offer,
        ),
        sampling=sampling,
        n=body.n or 1,
        bad_words=tuple(body.bad_words or ()),
        truncate_prompt_tokens=body.truncate_prompt_tokens,
        return_prompt=bool(body.return_token_ids),
        user=requester.user,
        priority=requester.priority,
        cache_salt=requester.cache_salt,
        output_constraint=constraint,
    )


def _output_constraint(
    body: ChatCompletionRequest, tool_use: ToolUse | None
) -> OutputConstraint | None:
    """What the answer must look like, be it by its format or as calls.

    OpenAI's own format is one of the text alone: with a call that must be made, as from instructor,
    there is none, and where calls may be made it is the one or the other.
    """
    field = constraining_field(body)
    of_calls = None if tool_use is None else tool_use.constraint
    if field is None or (of_calls is not None and field.leaves_calls):
        return of_calls
    if of_calls is not None:
        raise InvalidRequestError(
            f"{field.path} says what the answer must look like, but tool_choice makes it a call; "
            "leave one out",
            param=field.path.partition(".")[0],
            code="invalid_value",
        )
    return field.constraint


def _check_combinations(body: ChatCompletionRequest) -> None:
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequestError(
            "top_logprobs is only allowed when logprobs is true",
            param="top_logprobs",
            code="invalid_value",
        )
    _check_turn_to_generate(body)


def _check_turn_to_generate(body: ChatCompletionRequest) -> None:
    """The model either goes on with the assistant's last message or opens a turn of its own."""
    ends_with_answer = isinstance(body.messages[-1], AssistantMessage)
    if body.continue_final_message and not ends_with_answer:
        raise InvalidRequestError(
            "continue_final_message is only allowed when the last message is the assistant's",
            param="continue_final_message",
            code="invalid_value",
        )
    if body.add_generation_prompt is False and not _continues(body):
        raise InvalidRequestError(
            "This server always opens a turn of the assistant, unless it continues one",
            param="add_generation_prompt",
            code="unsupported_value",
        )


def _continues(body: ChatCompletionRequest) -> bool:
    """Whether the answer goes on with the last message: an assistant's, unless refused."""
    if body.continue_final_message is None:
        return isinstance(body.messages[-1], AssistantMessage)
    return body.continue_final_message


def _sampling_params(body: ChatCompletionRequest, description: ModelDescription) -> SamplingParams:
    default = description.default_sampling.max_tokens
    max_tokens = first(body.max_completion_tokens, body.max_tokens, default)
    sampling = sampling_params(body, description, max_tokens=max_tokens)
    return replace(sampling, logprobs=(body.top_logprobs or 0) if body.logprobs else None)


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
            "This model reads text only: leave images out.",
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
