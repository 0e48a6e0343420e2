"""No body, however wrong, is the server's fault."""

from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_serve.openai_api.chat_schemas import ChatCompletionRequest
from tests.fakes import FakeGenerationClient, answer
from tests.openai_api.harness import error_of, make_app, post_chat

APP = make_app(FakeGenerationClient(*answer()))
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters())
    | st.sampled_from(["user", "text", "image_url", "function", "auto", "json", "\ud800"])
)
KEYS = st.text(max_size=3) | st.sampled_from(
    ["role", "content", "type", "text", "image_url", "url", "tool_calls", "function", "name"]
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)
FIELDS = st.dictionaries(
    st.sampled_from(list(ChatCompletionRequest.model_fields)), JSON, max_size=3
)


@given(fields=FIELDS)
@settings(max_examples=150, deadline=None)
async def test_no_body_is_the_servers_fault(fields: dict[str, object]) -> None:
    response = await post_chat(APP, **fields)
    assert response.status_code in {200, 400, 404}
    if response.status_code != 200:
        error_of(response)


MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool", "function", "robot"])},
        optional={
            "content": JSON | st.lists(JSON, max_size=3),
            "tool_calls": JSON,
            "tool_call_id": JSON,
            "name": JSON,
            "refusal": JSON,
        },
    ),
    max_size=4,
)


@given(messages=MESSAGES)
@settings(max_examples=150, deadline=None)
async def test_no_history_is_the_servers_fault(messages: list[dict[str, object]]) -> None:
    response = await post_chat(APP, messages=messages)
    assert response.status_code in {200, 400}
