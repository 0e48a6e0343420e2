"""The items of stored responses: listed, referred to, forgotten."""

import httpx
import pytest
from fastapi import FastAPI

from gemma_serve.messages import ChatMessage, Role, TextPart, ToolCall
from tests.fakes import VISION_MODEL, FakeGenerationClient, answer, image_of
from tests.openai_api.harness import connect, error_of, make_app, messages_of
from tests.openai_api.responses.harness import RESPONSES, Json, post, said

INPUT: list[Json] = [
    {"role": "system", "content": "Be kind."},
    {
        "role": "user",
        "content": [
            {"type": "input_text", "text": "What is it?"},
            {"type": "input_image", "image_url": "https://a/1.png"},
        ],
    },
    {"type": "reasoning", "id": "rs_1", "summary": []},
    {"role": "assistant", "content": "Let me see."},
    {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c1", "output": "A cat"},
]
CALL = '{"name": "f", "parameters": {"a": 1}}'


async def list_input(app: FastAPI, response_id: str, **query: str | int) -> httpx.Response:
    async with connect(app) as http:
        return await http.get(f"{RESPONSES}/{response_id}/input_items", params=query)


async def test_input_is_told_again_with_ids_the_last_item_first() -> None:
    app = make_app(FakeGenerationClient(*answer("Hi"), description=VISION_MODEL))
    made = (await post(app, INPUT)).json()
    body = (await list_input(app, made["id"])).json()
    ids = [item.pop("id") for item in body["data"]]
    assert (body["first_id"], body["last_id"], body["has_more"]) == (ids[0], ids[-1], False)
    assert [item_id.partition("_")[0] for item_id in ids] == ["fco", "fc", "msg", "msg", "msg"]
    text = {"type": "output_text", "text": "Let me see.", "annotations": [], "logprobs": []}
    assert body["data"] == [
        {
            "type": "function_call_output",
            "call_id": "c1",
            "output": [{"type": "input_text", "text": "A cat"}],
            "status": "completed",
        },
        {**INPUT[4], "status": "completed"},
        {"type": "message", "role": "assistant", "content": [text], "status": "completed"},
        {"type": "message", **INPUT[1], "status": "completed"},
        {
            "type": "message",
            "role": "system",
            "content": [{"type": "input_text", "text": "Be kind."}],
            "status": "completed",
        },
    ]


async def test_pages_follow_each_other_in_either_order() -> None:
    app = make_app(FakeGenerationClient(*answer("Hi")))
    made = (await post(app, [{"role": "user", "content": str(i)} for i in range(5)])).json()
    for order, expected in (("asc", "01234"), ("desc", "43210")):
        told = ""
        query: dict[str, str | int] = {"order": order, "limit": 2}
        while True:
            page = (await list_input(app, made["id"], **query)).json()
            told += "".join(item["content"][0]["text"] for item in page["data"])
            if not page["has_more"]:
                break
            query["after"] = page["last_id"]
        assert told == expected


@pytest.mark.parametrize("kind", [{"type": "item_reference"}, {"type": None}, {}])
async def test_items_of_input_and_output_can_be_referred_to(kind: Json) -> None:
    client = FakeGenerationClient(*answer(f"One moment.\n{CALL}"))
    app = make_app(client)
    tools = [{"type": "function", "name": "f"}]
    made = (await post(app, "Hello", tools=tools)).json()
    (asked,) = (await list_input(app, made["id"])).json()["data"]
    _, call = made["output"]
    ids = [asked["id"], *(item["id"] for item in made["output"])]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "2"}
    response = await post(app, [*({**kind, "id": item_id} for item_id in ids), result])
    assert response.status_code == 200, response.text
    assert messages_of(client.requests[1]) == (
        said(Role.USER, "Hello"),
        ChatMessage(
            Role.ASSISTANT,
            (TextPart("One moment.\n"),),
            tool_calls=(ToolCall(call["call_id"], "f", '{"a": 1}'),),
        ),
        ChatMessage(Role.TOOL, (TextPart("2"),), tool_call_id=call["call_id"]),
    )


async def test_image_that_is_referred_to_is_loaded_again() -> None:
    client = FakeGenerationClient(*answer("Hi"), description=VISION_MODEL)
    app = make_app(client)
    made = (await post(app, INPUT[:2])).json()
    (image, _) = (await list_input(app, made["id"])).json()["data"]
    await post(app, [{"type": "item_reference", "id": image["id"]}])
    (message,) = messages_of(client.requests[1])
    assert message.parts == (TextPart("What is it?"), image_of("https://a/1.png"))


async def test_items_are_forgotten_with_their_response() -> None:
    app = make_app(FakeGenerationClient(*answer("Hi")))
    made = (await post(app, "Hello")).json()
    async with connect(app) as http:
        await http.delete(f"{RESPONSES}/{made['id']}")
    reference = {"type": "item_reference", "id": made["output"][0]["id"]}
    response = await post(app, [reference])
    assert (response.status_code, error_of(response)["param"]) == (400, "input[0].id")
    assert (await list_input(app, made["id"])).status_code == 404


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"limit": 0}, "limit"),
        ({"limit": 101}, "limit"),
        ({"limit": "x"}, "limit"),
        ({"order": "up"}, "order"),
        ({"after": "msg_x"}, "after"),
    ],
)
async def test_wrong_query_is_a_400_that_names_it(query: dict[str, str | int], param: str) -> None:
    app = make_app(FakeGenerationClient(*answer("Hi")))
    made = (await post(app, "Hello")).json()
    response = await list_input(app, made["id"], **query)
    assert (response.status_code, error_of(response)["param"]) == (400, param)


async def test_whole_response_cannot_be_cancelled_or_streamed_again() -> None:
    app = make_app(FakeGenerationClient(*answer("Hi")))
    path = f"{RESPONSES}/{(await post(app, 'Hello')).json()['id']}"
    async with connect(app) as http:
        cancelled = await http.post(f"{path}/cancel")
        streamed = await http.get(path, params={"stream": "true"})
        whole = await http.get(path, params={"stream": "false"})
        unknown = await http.post(f"{RESPONSES}/resp_x/cancel")
    assert (cancelled.status_code, error_of(cancelled)["message"]) == (
        400,
        "Cannot cancel a synchronous response.",
    )
    assert (streamed.status_code, error_of(streamed)["param"]) == (400, "stream")
    assert (whole.status_code, unknown.status_code) == (200, 404)
