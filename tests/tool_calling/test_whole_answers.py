"""Answers that are held to a format or to calls are the one or the other as a whole."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_serve.tool_calling.events import TextPiece
from gemma_serve.tool_calling.parser import ToolCallParser
from gemma_serve.tool_calling.whole_answers import whole_answer_parser
from tests.tool_calling.answers import assert_same_for_all_two_way_splits, outcome

CALL = '{"name": "get_weather", "parameters": {"city": "Paris"}}'
PARIS = ("get_weather", '{"city": "Paris"}')
TIME = ("get_time", "{}")


def make_parser() -> ToolCallParser:
    return whole_answer_parser(("get_time", "get_weather"))


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (CALL, [PARIS]),
        ('{"name":"get_time","parameters":{}}', [TIME]),
        ('{\n  "name": "get_time",\n  "parameters": {}\n}', [TIME]),
        (f"[{CALL}]", [PARIS]),
        (f'[\n {CALL},\n {{"name": "get_time", "parameters": {{}}}}\n]', [PARIS, TIME]),
        # Cut off by a limit.
        (CALL[:-5], [("get_weather", '{"city": "Par')]),
        (CALL[:-1], [PARIS]),
        (f'[{CALL}, {{"name": "get_ti', [PARIS]),
    ],
)
def test_answer_that_begins_with_a_call_is_calls(text: str, calls: list[tuple[str, str]]) -> None:
    assert_same_for_all_two_way_splits(make_parser, text, [*calls])


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "{}",
        "[]",
        "[1, 2]",
        "17",
        '"get_time"',
        '{"name": "get_time"}',
        '{"name": "Ada", "parameters": {}}',
        '{"name": "get_time", "parameters": [1]}',
        '{"name": "get_time", "arguments": {}}',
        '{"parameters": {}, "name": "get_time"}',
        '{"name": "get_time", "reason": "asked", "parameters": {}}',
        f'{{"call": {CALL}}}',
        f"[[{CALL}]]",
        f"[1, {CALL}]",
        '{"text": "```tool_code\\nget_time()\\n```"}',
        "[get_time()]",
        '{"name": "get_ti',
    ],
)
def test_any_other_answer_is_text_to_the_letter(text: str) -> None:
    assert_same_for_all_two_way_splits(make_parser, text, [text] if text else [])


@given(st.text('[{"}] :,name\n', max_size=40), st.integers(0, 40))
def test_text_is_text_in_any_two_pieces(text: str, cut: int) -> None:
    assert outcome(make_parser(), [text[:cut], text[cut:]]) == ([text] if text else [])


def test_text_waits_only_while_it_can_be_a_call() -> None:
    parser = make_parser()
    assert parser.feed('{"na') == []
    assert parser.feed("ils") == [TextPiece('{"nails')]
    assert parser.feed('": ') == [TextPiece('": ')]
    assert parser.feed(json.dumps([CALL])) == [TextPiece(json.dumps([CALL]))]
    assert parser.finish() == []


def test_only_the_first_call_counts_where_one_is_allowed() -> None:
    parser = whole_answer_parser(("get_weather",), max_calls=1)
    assert outcome(parser, [f"[{CALL}, {CALL}]"]) == [PARIS]
