"""What a server remembers of its responses."""

from gemma_serve.openai_api.chat_messages import Message, TextContentPart, UserMessage
from gemma_serve.openai_api.responses.request_schemas import TextOptions
from gemma_serve.openai_api.responses.response_schemas import Response
from gemma_serve.openai_api.responses.store import ResponseStore, StoredResponse


def stored(response_id: str, text: str = "") -> StoredResponse:
    response = Response(
        id=response_id,
        created_at=0,
        status="completed",
        instructions=None,
        model="gemma",
        output=[],
        previous_response_id=None,
        parallel_tool_calls=True,
        tools=[],
        tool_choice="auto",
        temperature=1,
        top_p=1,
        presence_penalty=0,
        frequency_penalty=0,
        max_output_tokens=None,
        max_tool_calls=None,
        text=TextOptions(),
        store=True,
        metadata={},
    )
    message: Message = UserMessage(role="user", content=[TextContentPart(type="text", text=text)])
    return StoredResponse(response, (message,))


def test_least_recently_used_responses_make_room() -> None:
    size = stored("a").num_bytes
    store = ResponseStore(max_bytes=2 * size)
    for response_id in ("a", "b"):
        store.put(stored(response_id))
    assert store.get("a") is not None
    store.put(stored("c"))
    assert [store.get(i) is not None for i in ("a", "b", "c")] == [True, False, True]


def test_response_larger_than_the_memory_is_not_stored_and_drives_none_out() -> None:
    store = ResponseStore(max_bytes=2 * stored("a").num_bytes)
    store.put(stored("a"))
    store.put(stored("b", text="x" * 10_000))
    assert store.get("a") is not None
    assert store.get("b") is None


def test_deleting_makes_room() -> None:
    store = ResponseStore(max_bytes=stored("a").num_bytes)
    store.put(stored("a"))
    assert store.delete("a")
    assert not store.delete("a")
    store.put(stored("b"))
    assert store.get("b") is not None
