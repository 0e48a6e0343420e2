"""What the engine is asked for, from what the client asked for."""

from dataclasses import replace

import pytest

from gemma_serve.errors import InvalidRequestError
from gemma_serve.generation import ChatPrompt, GenerationRequest, SamplingParams
from gemma_serve.images.limits import ImageLimits
from gemma_serve.messages import ChatMessage, Role, TextPart, ToolCall
from gemma_serve.openai_api.limits import ApiLimits
from tests.fakes import (
    TEXT_MODEL,
    VISION_MODEL,
    FakeGenerationClient,
    FakeImageLoader,
    answer,
    image_of,
)
from tests.openai_api.harness import error_of, make_app, messages_of, post_chat

TOOL = {"type": "function", "function": {"name": "get_time"}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}


async def requested(**fields: object) -> GenerationRequest:
    """What reaches the engine from a request with ``fields``."""
    client = FakeGenerationClient(*answer())
    response = await post_chat(make_app(client), **fields)
    assert response.status_code == 200, response.text
    return client.requests[0]


async def sampling(**fields: object) -> SamplingParams:
    return (await requested(**fields)).sampling


def image(url: str, detail: str | None = None) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": url, "detail": detail}}


async def test_open_fields_take_the_checkpoints_defaults() -> None:
    assert await sampling() == TEXT_MODEL.default_sampling


async def test_null_means_absent() -> None:
    fields = ["max_tokens", "temperature", "top_k", "stop", "seed", "n", "stream", "stream_options"]
    fields += ["logit_bias", "stop_token_ids", "ignore_eos", "tools", "tool_choice", "logprobs"]
    fields += ["min_tokens", "bad_words", "allowed_token_ids", "chat_template_kwargs"]
    fields += ["skip_special_tokens", "truncate_prompt_tokens", "return_token_ids"]
    fields += ["speculation"]
    fields += ["continue_final_message", "add_generation_prompt"]
    assert await sampling(**dict.fromkeys(fields)) == TEXT_MODEL.default_sampling


async def test_every_sampling_field_reaches_the_engine() -> None:
    assert await sampling(
        max_tokens=3,
        temperature=0,
        top_p=1,
        top_k=1,
        min_p=0.5,
        repetition_penalty=1.5,
        presence_penalty=-2,
        frequency_penalty=2.0,
        logit_bias={"0": -100, "999": 0.5},
        seed=-(2**63),
        stop=["a", "b"],
        stop_token_ids=[999],
        ignore_eos=True,
        min_tokens=2,
        include_stop_str_in_output=True,
        skip_special_tokens=False,
        speculation=False,
        allowed_token_ids=[5, 6],
    ) == SamplingParams(
        max_tokens=3,
        temperature=0.0,
        top_p=1.0,
        top_k=1,
        min_p=0.5,
        repetition_penalty=1.5,
        presence_penalty=-2.0,
        frequency_penalty=2.0,
        logit_bias=((0, -100.0), (999, 0.5)),
        seed=-(2**63),
        stop=("a", "b"),
        stop_token_ids=(999,),
        ignore_eos=True,
        min_tokens=2,
        include_stop_str_in_output=True,
        skip_special_tokens=False,
        speculation=False,
        allowed_token_ids=(5, 6),
    )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"max_tokens": 3, "max_completion_tokens": 4}, {"max_tokens": 4}),
        ({"max_completion_tokens": 4}, {"max_tokens": 4}),
        ({"top_k": 0}, {"top_k": None}),
        ({"top_k": -1}, {"top_k": None}),
        ({"repeat_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"repeat_penalty": 1.1, "repetition_penalty": 1.2}, {"repetition_penalty": 1.2}),
        ({"stop": "END"}, {"stop": ("END",)}),
        ({"stop": []}, {"stop": ()}),
        ({"no_stop_trim": True}, {"include_stop_str_in_output": True}),
        ({"allowed_token_ids": []}, {"allowed_token_ids": None}),
        ({"stop": ["x" * 1024] * 16}, {"stop": ("x" * 1024,) * 16}),
        ({"stop_token_ids": [7] * 1024}, {"stop_token_ids": (7,) * 1024}),
    ],
)
async def test_one_meaning_of_several_spellings(
    fields: dict[str, object], expected: dict[str, object]
) -> None:
    default = TEXT_MODEL.default_sampling
    assert await sampling(**fields) == replace(default, **expected)  # type: ignore[arg-type]


async def test_checkpoints_stop_strings_hold_until_the_client_names_its_own() -> None:
    description = replace(TEXT_MODEL, default_sampling=SamplingParams(stop=("User:",)))
    client = FakeGenerationClient(*answer(), description=description)
    await post_chat(make_app(client))
    await post_chat(make_app(client), stop=[])
    await post_chat(make_app(client), stop="END")
    assert [request.sampling.stop for request in client.requests] == [
        ("User:",),
        ("User:",),
        ("END",),
    ]


async def test_n_is_one_unless_asked_otherwise() -> None:
    assert (await requested()).n == 1
    client = FakeGenerationClient()
    await post_chat(make_app(client), n=128)
    assert client.requests[0].n == 128


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "system", "content": "Be kind."}, (Role.SYSTEM, "Be kind.")),
        ({"role": "developer", "content": "Be kind."}, (Role.SYSTEM, "Be kind.")),
        ({"role": "user", "content": "Hi", "name": "Ada", "x": 1}, (Role.USER, "Hi")),
        ({"role": "user", "content": ""}, (Role.USER, "")),
        ({"role": "user", "content": "a\0b"}, (Role.USER, "a\0b")),
        ({"role": "assistant", "content": "Hi", "audio": None}, (Role.ASSISTANT, "Hi")),
        ({"role": "assistant", "content": None, "refusal": "No."}, (Role.ASSISTANT, "No.")),
        (
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
            (Role.ASSISTANT, "No."),
        ),
    ],
)
async def test_message_with_one_text(
    message: dict[str, object], expected: tuple[Role, str]
) -> None:
    role, text = expected
    request = await requested(messages=[message])
    assert messages_of(request) == (ChatMessage(role, (TextPart(text),)),)


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant", "tool", "function"])
async def test_every_role_takes_text_parts(role: str) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": " b"}]
    message = {"role": role, "content": parts, "tool_call_id": "call_1", "name": "get_time"}
    request = await requested(messages=[message])
    assert messages_of(request)[0].parts == (TextPart("a"), TextPart(" b"))


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": []}])
async def test_assistant_content_may_be_missing(content: dict[str, object]) -> None:
    message = {"role": "assistant", "tool_calls": [CALL], "function_call": None, **content}
    request = await requested(messages=[message])
    assert messages_of(request) == (
        ChatMessage(Role.ASSISTANT, tool_calls=(ToolCall("call_1", "get_time", "{}"),)),
    )


async def test_kind_of_a_call_may_be_null() -> None:
    message = {"role": "assistant", "tool_calls": [{**CALL, "type": None}]}
    (said,) = messages_of(await requested(messages=[message]))
    assert said.tool_calls == (ToolCall("call_1", "get_time", "{}"),)


async def test_tool_result_names_its_call() -> None:
    message = {"role": "tool", "tool_call_id": "call_1", "content": "12:00"}
    request = await requested(messages=[message])
    assert messages_of(request) == (
        ChatMessage(Role.TOOL, (TextPart("12:00"),), tool_call_id="call_1"),
    )


async def test_deprecated_function_call_and_its_result_refer_to_each_other_by_name() -> None:
    function = {"name": "get_time", "arguments": "{}"}
    request = await requested(
        messages=[
            {"role": "assistant", "content": None, "function_call": function},
            {"role": "function", "name": "get_time", "content": "12:00"},
        ]
    )
    assert messages_of(request) == (
        ChatMessage(Role.ASSISTANT, tool_calls=(ToolCall("get_time", "get_time", "{}"),)),
        ChatMessage(Role.TOOL, (TextPart("12:00"),), tool_call_id="get_time"),
    )


async def test_any_order_of_roles_is_passed_on_as_it_is() -> None:
    roles = ["assistant", "user", "user", "system", "assistant", "assistant", "system"]
    request = await requested(messages=[{"role": role, "content": "x"} for role in roles])
    assert [message.role for message in messages_of(request)] == roles


async def test_ten_megabytes_of_text_pass() -> None:
    text = "🙂" * 2_500_000
    request = await requested(messages=[{"role": "user", "content": text}])
    assert messages_of(request)[0].parts == (TextPart(text),)


async def test_images_are_loaded_into_their_places() -> None:
    client, loader = FakeGenerationClient(*answer(), description=VISION_MODEL), FakeImageLoader()
    content = [
        image("https://a/1.png", "high"),
        {"type": "text", "text": "or"},
        {"type": "image_url", "image_url": "https://a/2.png"},
    ]
    messages = [{"role": "user", "content": "Hi"}, {"role": "user", "content": content}]
    response = await post_chat(make_app(client, loader), messages=messages)
    assert response.status_code == 200
    assert messages_of(client.requests[0])[1].parts == (
        image_of("https://a/1.png"),
        TextPart("or"),
        image_of("https://a/2.png"),
    )
    assert loader.calls == [
        ("https://a/1.png", "high", "messages[1].content[0].image_url.url"),
        ("https://a/2.png", "auto", "messages[1].content[2].image_url.url"),
    ]


async def test_image_that_cannot_be_loaded_fails_the_request() -> None:
    param = "messages[0].content[1].image_url.url"
    error = InvalidRequestError("The image could not be fetched.", param=param)
    client = FakeGenerationClient(*answer(), description=VISION_MODEL)
    loader = FakeImageLoader({"https://a/2.png": error})
    content = [image("https://a/1.png"), image("https://a/2.png"), image("https://a/3.png")]
    response = await post_chat(
        make_app(client, loader), messages=[{"role": "user", "content": content}]
    )
    assert response.status_code == 400
    assert error_of(response)["param"] == param
    assert client.requests == []


async def test_text_model_refuses_an_image_before_it_is_fetched() -> None:
    loader = FakeImageLoader()
    content = [{"type": "text", "text": "What is this?"}, image("https://a/1.png")]
    response = await post_chat(
        make_app(FakeGenerationClient(), loader), messages=[{"role": "user", "content": content}]
    )
    assert response.status_code == 400
    assert error_of(response)["param"] == "messages[0].content[1]"
    assert loader.calls == []


async def test_too_many_images_are_refused_before_any_is_fetched() -> None:
    client, loader = FakeGenerationClient(*answer(), description=VISION_MODEL), FakeImageLoader()
    app = make_app(client, loader, limits=ApiLimits(images=ImageLimits(max_images=2)))
    messages = [{"role": "user", "content": [image("https://a/1.png")]}] * 3
    response = await post_chat(app, messages=messages)
    assert response.status_code == 400
    assert error_of(response)["message"] == "a request may have 2 images, got 3"
    assert loader.calls == []
    assert (await post_chat(app, messages=messages[:2])).status_code == 200


@pytest.mark.parametrize(
    ("roles", "fields", "expected"),
    [
        (["user"], {}, False),
        (["user", "assistant"], {}, True),
        (["user", "assistant"], {"continue_final_message": True}, True),
        (["user", "assistant"], {"continue_final_message": False}, False),
        (["user", "assistant"], {"add_generation_prompt": False}, True),
    ],
)
async def test_last_message_of_the_assistant_is_continued_unless_refused(
    roles: list[str], fields: dict[str, object], expected: bool
) -> None:
    messages = [{"role": role, "content": "x"} for role in roles]
    prompt = (await requested(messages=messages, **fields)).prompt
    assert isinstance(prompt, ChatPrompt)
    assert prompt.continue_final_message is expected


async def test_fields_of_the_prompt_reach_the_model() -> None:
    request = await requested(
        bad_words=["a", "b"],
        truncate_prompt_tokens=7,
        return_token_ids=True,
        chat_template_kwargs={"enable_thinking": False, "level": "high"},
    )
    assert request.bad_words == ("a", "b")
    assert (request.truncate_prompt_tokens, request.return_prompt) == (7, True)
    assert isinstance(request.prompt, ChatPrompt)
    assert request.prompt.template_kwargs == (("enable_thinking", False), ("level", "high"))
