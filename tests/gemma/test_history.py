from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from gemma_serve.gemma.history import Turn, fit_history
from gemma_serve.messages import ChatMessage, ContentPart, ImagePart, Role, TextPart, ToolCall

IMAGE = ImagePart((b"image",))
OTHER_IMAGE = ImagePart((b"other",))


def message(role: str, *contents: str | ImagePart) -> ChatMessage:
    return ChatMessage(Role(role), parts(contents))


def turn(role: str, *contents: str | ImagePart) -> Turn:
    return Turn(Role(role), parts(contents))


def parts(contents: Sequence[str | ImagePart]) -> tuple[ContentPart, ...]:
    return tuple(TextPart(c) if isinstance(c, str) else c for c in contents)


def calling(*calls: tuple[str, str, str], text: str = "") -> ChatMessage:
    tool_calls = tuple(ToolCall(*call) for call in calls)
    return ChatMessage(Role.ASSISTANT, (TextPart(text),), tool_calls=tool_calls)


def result(call_id: str | None, text: str) -> ChatMessage:
    return ChatMessage(Role.TOOL, (TextPart(text),), tool_call_id=call_id)


def test_alternating_history_stays_as_it_is() -> None:
    history = [message("system", "s"), message("user", "u"), message("assistant", " a\n")]
    assert fit_history(history) == (
        turn("system", "s"),
        turn("user", "u"),
        turn("assistant", " a\n"),
    )


def test_system_messages_from_anywhere_come_first() -> None:
    history = [
        message("system", "one"),
        message("user", "u"),
        message("system", "two"),
        message("assistant", "a"),
        message("system", "three"),
    ]
    assert fit_history(history) == (
        turn("system", "one\n\ntwo\n\nthree"),
        turn("user", "u"),
        turn("assistant", "a"),
    )


def test_system_message_alone_gets_an_empty_user_turn_to_stand_in() -> None:
    assert fit_history([message("system", "s")]) == (turn("system", "s"), turn("user"))


def test_empty_system_message_vanishes() -> None:
    assert fit_history([message("system", ""), message("user", "u")]) == (turn("user", "u"),)


def test_no_messages_are_an_empty_user_turn() -> None:
    assert fit_history([]) == (turn("user"),)


def test_neighbours_of_one_role_become_one_turn_with_a_blank_line_between() -> None:
    history = [
        message("user", "one"),
        message("user", "two"),
        message("assistant", "three"),
        message("assistant", "four"),
    ]
    assert fit_history(history) == (turn("user", "one\n\ntwo"), turn("assistant", "three\n\nfour"))


def test_text_parts_of_one_message_are_joined_as_they_are_written() -> None:
    assert fit_history([message("user", "a ", "", "b")]) == (turn("user", "a b"),)


def test_images_bring_their_own_blank_lines() -> None:
    history = [message("user", "look", IMAGE), message("user", "and", OTHER_IMAGE, "here")]
    assert fit_history(history) == (turn("user", "look", IMAGE, "and", OTHER_IMAGE, "here"),)


def test_assistant_message_without_text_is_left_out() -> None:
    history = [message("user", "one"), message("assistant", "", " \n"), message("user", "two")]
    assert fit_history(history) == (turn("user", "one\n\ntwo"),)


def test_empty_user_message_between_two_answers_stays_a_turn() -> None:
    history = [
        message("user", "u"),
        message("assistant", "a"),
        message("user", ""),
        message("assistant", "b"),
    ]
    assert fit_history(history) == (
        turn("user", "u"),
        turn("assistant", "a"),
        turn("user"),
        turn("assistant", "b"),
    )


def test_assistant_who_speaks_first_answers_an_empty_user_turn() -> None:
    assert fit_history([message("assistant", "hi"), message("user", "u")]) == (
        turn("user"),
        turn("assistant", "hi"),
        turn("user", "u"),
    )


def test_tool_calls_and_their_results_become_text() -> None:
    history = [
        message("user", "Weather?"),
        calling(("c1", "weather", '{"city": "Paris"}'), ("c2", "time", "")),
        result("c1", "18 °C"),
        result("c2", "noon"),
    ]
    assert fit_history(history) == (
        turn("user", "Weather?"),
        turn(
            "assistant",
            '[{"name": "weather", "parameters": {"city": "Paris"}}, '
            '{"name": "time", "parameters": {}}]',
        ),
        turn("user", "Result of weather:\n18 °C\n\nResult of time:\nnoon"),
    )


def test_tool_calls_follow_the_text_of_their_message() -> None:
    history = [message("user", "u"), calling(("c1", "f", "{}"), text="Let me see.")]
    assert fit_history(history)[1] == turn(
        "assistant", 'Let me see.\n\n{"name": "f", "parameters": {}}'
    )


def test_tool_calls_that_ended_a_line_of_text_stand_right_after_it() -> None:
    history = [message("user", "u"), calling(("c1", "f", "{}"), text="Let me see.\n")]
    assert fit_history(history)[1] == turn(
        "assistant", 'Let me see.\n{"name": "f", "parameters": {}}'
    )


def test_tool_calls_are_shown_in_the_form_that_was_asked_for() -> None:
    history = [message("user", "u"), calling(("c1", "f", '{"a": true}'))]
    assert fit_history(history, tool_form="pythonic")[1] == turn("assistant", "[f(a=True)]")


def test_arguments_that_are_no_json_are_shown_as_they_are() -> None:
    history = [message("user", "u"), calling(("c1", "f", '{"broken'))]
    assert fit_history(history)[1] == turn("assistant", '{"name": "f", "parameters": {"broken}')


def test_result_of_an_unknown_call_is_named_by_its_id() -> None:
    assert fit_history([result("c9", "x"), result(None, "y")]) == (
        turn("user", "Result of tool call c9:\nx\n\nResult of a tool call:\ny"),
    )


def test_tool_result_and_the_next_question_share_a_turn() -> None:
    history = [message("user", "u"), calling(("c1", "f", "{}")), result("c1", "x")]
    assert fit_history([*history, message("user", "thanks")])[2] == turn(
        "user", "Result of f:\nx\n\nthanks"
    )


def test_image_of_another_role_opens_a_user_turn_in_its_place() -> None:
    history = [
        message("system", IMAGE, "s"),
        message("user", "u"),
        message("assistant", "a", OTHER_IMAGE, "b"),
    ]
    assert fit_history(history) == (
        turn("system", "s"),
        turn("user", IMAGE, "u"),
        turn("assistant", "a"),
        turn("user", OTHER_IMAGE),
        turn("assistant", "b"),
    )


def test_image_in_a_tool_result_follows_its_heading() -> None:
    history = [ChatMessage(Role.TOOL, (IMAGE, TextPart("seen")), tool_call_id="c1")]
    assert fit_history(history) == (turn("user", "Result of tool call c1:\n", IMAGE, "seen"),)


CONTENTS = st.lists(st.sampled_from(["", " ", "x"]) | st.just(IMAGE), max_size=3)
MESSAGES = st.builds(
    ChatMessage,
    st.sampled_from(Role),
    CONTENTS.map(parts),
    st.sampled_from([(), (ToolCall("c", "f", "{}"),)]),
    st.sampled_from([None, "c"]),
)


@given(st.lists(MESSAGES, max_size=8))
def test_any_history_fits_and_keeps_every_image(history: list[ChatMessage]) -> None:
    turns = fit_history(history)
    spoken = [t.role for t in turns if t.role is not Role.SYSTEM]
    assert [t.role for t in turns].count(Role.SYSTEM) == (turns[0].role is Role.SYSTEM)
    assert spoken == [Role.USER, Role.ASSISTANT] * (len(spoken) // 2) + [Role.USER] * (
        len(spoken) % 2
    )
    images = [p for t in turns for p in t.parts if isinstance(p, ImagePart)]
    assert len(images) == sum(isinstance(p, ImagePart) for m in history for p in m.parts)
    assert all(isinstance(p, TextPart) for t in turns if t.role is not Role.USER for p in t.parts)
