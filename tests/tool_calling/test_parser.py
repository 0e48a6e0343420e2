"""Calls are found in whatever form they come, and prose is left alone."""

import json
import re
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_serve.tool_calling.events import ArgumentsPiece, CallStarted, TextPiece
from gemma_serve.tool_calling.parser import ToolCallParser, gemma_parser
from tests.tool_calling.answers import assert_same_for_all_two_way_splits, outcome

NAMES = ("get_time", "get_weather", "get", "list-files")
Items = list[str | tuple[str, str]]


def make_parser() -> ToolCallParser:
    return gemma_parser(NAMES)


PARIS = ("get_weather", '{"city": "Paris"}')
TIME = ("get_time", "{}")
JSON_CALL = '{"name": "get_weather", "parameters": {"city": "Paris"}}'
PYTHON_CALL = 'get_weather(city="Paris")'

CALLS: list[tuple[str, Items]] = [
    (JSON_CALL, [PARIS]),
    (f"[{JSON_CALL}]", [PARIS]),
    (f" \n{JSON_CALL}\n ", [PARIS]),
    (f"```json\n{JSON_CALL}\n```", [PARIS]),
    (f"```json\n[\n  {JSON_CALL}\n]\n```\n", [PARIS]),
    (f"```\n{JSON_CALL}```", [PARIS]),
    (f"```tool_code\n{PYTHON_CALL}\n```", [PARIS]),
    (f"```tool_code\nprint({PYTHON_CALL})\n```", [PARIS]),
    (f"```python\nprint( default_api.{PYTHON_CALL} )\n```", [PARIS]),
    (f"```tool_code\n[{PYTHON_CALL}]\n```", [PARIS]),
    (f"```tool_code\n{JSON_CALL}\n```", [PARIS]),
    (f"[{PYTHON_CALL}]", [PARIS]),
    (f"[{PYTHON_CALL}, get_time()]", [PARIS, TIME]),
    (f"[ {PYTHON_CALL} ,\n get_time( ) , ]", [PARIS, TIME]),
    (f"[{JSON_CALL}, get_time()]", [PARIS, TIME]),
    ("```tool_code\nget_time()\nget(a=1)\n```", [TIME, ("get", '{"a": 1}')]),
    ("[list-files(depth=-1)]", [("list-files", '{"depth": -1}')]),
    (f'{JSON_CALL}\n{{"name": "get_time"}}', [PARIS, TIME]),
    (f'[{JSON_CALL},{{"name":"get_time","parameters":{{}}}}]', [PARIS, TIME]),
    ('{"name": "get_time", "arguments": null}', [TIME]),
    ('{"name": "get_time", "args": {}, "reason": [1, "]}"], "n": 5}', [TIME]),
    ('{"name": "get_time", "type": "function"}', [TIME]),
    ('{"parameters": {"a": [1, {"b": "}"}]}, "name": "get"}', [("get", '{"a": [1, {"b": "}"}]}')]),
    (
        '{"type": "function", "function": {"name": "get_weather", '
        '"arguments": "{\\"city\\": \\"Paris\\"}"}}',
        [PARIS],
    ),
    ('{"function": "get_time", "parameters": ""}', [TIME]),
    (f"Let me look.\n\n{JSON_CALL}", ["Let me look.\n\n", PARIS]),
    (f"Let me look: {JSON_CALL}.", ["Let me look: ", PARIS, "."]),
    (f"{JSON_CALL}\n\nDone?", [PARIS, "\n\nDone?"]),
    (f"```json\n{JSON_CALL}\n```\nWait.", [PARIS, "\nWait."]),
    (f"[see {JSON_CALL}]", ["[see ", PARIS, "]"]),
    (f"``{JSON_CALL}``", ["``", PARIS, "``"]),
    (f'[{JSON_CALL}, {{"name": "nothing"}}]', [PARIS, ' {"name": "nothing"}]']),
    (f"[{JSON_CALL} and more]", [PARIS, " and more]"]),
    (f"```tool_code\n{PYTHON_CALL}\n# done\n```", [PARIS, "\n# done\n```"]),
    (
        '{"name": "get", "parameters": {"q": "Straße \\"😀\\" \\\\", "n": null}}',
        [("get", '{"q": "Straße \\"😀\\" \\\\", "n": null}')],
    ),
    (
        '{"name": "get", "parameters": {"code": "a\n\tb\\n"}}',
        [("get", '{"code": "a\\n\\tb\\n"}')],
    ),
    (
        "[get(a='it\\'s', "
        'b="""x\n"y" \\d""", c=(1, 2.5), '
        "d={'e': [True, None, false]}, f='')]",
        [
            (
                "get",
                '{"a": "it\'s", "b": "x\\n\\"y\\" \\\\d", "c": [1, 2.5], '
                '"d": {"e": [true, null, false]}, "f": ""}',
            )
        ],
    ),
    # Cut off by a limit: what has been called stays called.
    ('{"name": "get_weather", "parameters": {"city": "Pa', [("get_weather", '{"city": "Pa')]),
    (f"[{JSON_CALL}", [PARIS]),
    (f"```json\n[{JSON_CALL},\n", [PARIS]),
    (JSON_CALL[:-1], [PARIS]),
    (JSON_CALL[:-1] + ', "reason": "be', [PARIS]),
    (JSON_CALL[:-1] + "\n```", [PARIS, "\n```"]),
]

PROSE = [
    "",
    "Hello.",
    "  \n ",
    "  two spaces first",
    '{"city": "Paris"}',
    "{}",
    "[]",
    "[1, 2]",
    "[link](https://example.org) and [get",
    "`get_time()` is a function",
    "get_time()",
    '{"name": "nothing", "parameters": {}}',
    '{"name": "get_weat"}',
    '{"name": "Paris"}',
    '{"name": "get_time", "description": "tells the time", "parameters": {}}',
    '{"name": "get_time", "parameters": [1]}',
    '{"name": "get_time", "parameters": "now"}',
    '{"name": "get_time", "parameters": "\\ud800"}',
    '{"name": "get_time", "name": "get"}',
    '{"name": "get_time"',
    '{"type": "object"}',
    '{"parameters": {}}',
    '{"parameters": {}, "arguments": {}, "name": "get"}',
    '{"parameters": {"a": 1}, "name": "not',
    "```python\nprint(1)\n```",
    "```python\ndef get_time():\n    return 1\n```",
    "```json\n{}\n```",
    "```js\nget_time()\n```",
    "```\n```",
    "[get_weather(city)]",
    '[get_weather("Paris")]',
    "[get_weather(city=town)]",
    "[get_weather(city=open('x').read())]",
    "[get_weather(city=f'{1}')]",
    "[get_weather(**{'city': 1})]",
    "[get_weather(city=1, city=2)]",
    "[get_weather(a={1: 2})]",
    "[get_weather(a={**b})]",
    "[get_weather(a=1e999)]",
    "[get_weather(a=1j)]",
    "[get_weather(a='x\n')]",
    "[get_weather(a=1",
    "[get_weather(a='",
    "[get_weather(a='''",
    "[get_weather(a=" + "[" * 70 + "]" * 70 + ")]",
    "[get_weather(a=" + "-" * 10_000 + "1)]",
    "[nothing(a=1)]",
    '{"parameters": ' + '{"a":' * 70,
    "a `code` b ``` c",
]


@pytest.mark.parametrize(("text", "expected"), CALLS)
def test_call_is_found_in_every_split(text: str, expected: Items) -> None:
    assert_same_for_all_two_way_splits(make_parser, text, expected)


@pytest.mark.parametrize("text", [text for text in PROSE if len(text) < 1000])
def test_prose_is_said_as_it_is_in_every_split(text: str) -> None:
    assert_same_for_all_two_way_splits(make_parser, text, [text] if text else [])


@pytest.mark.parametrize("text", PROSE)
def test_prose_is_said_as_it_is_at_once(text: str) -> None:
    assert outcome(make_parser(), [text]) == ([text] if text else [])


TEXTS = st.sampled_from([text for text, _ in CALLS] + [text for text in PROSE if len(text) < 1000])
FRAGMENTS = st.lists(
    st.sampled_from(re.findall(r"\w+|\s+|.", " ".join(text for text, _ in CALLS)))
    | st.text(max_size=3),
    max_size=30,
).map("".join)


@st.composite
def splits(draw: st.DrawFn) -> tuple[str, Sequence[str]]:
    text = draw(TEXTS | FRAGMENTS | st.tuples(TEXTS, FRAGMENTS, TEXTS).map("".join))
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return text, [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@given(splits())
def test_any_split_gives_the_same_result(case: tuple[str, Sequence[str]]) -> None:
    text, pieces = case
    assert outcome(make_parser(), pieces) == outcome(make_parser(), [text])


@given(st.lists(TEXTS | FRAGMENTS, max_size=4).map("".join))
def test_all_that_is_said_stands_in_the_answer_in_that_order(text: str) -> None:
    position = 0
    for item in outcome(make_parser(), [text]):
        for said in item if isinstance(item, str) else item[0]:
            position = text.index(said, position) + 1


@given(FRAGMENTS)
def test_without_functions_everything_is_prose(text: str) -> None:
    assert "".join(map(str, outcome(gemma_parser(()), [text]))) == text


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), JSON_VALUES, max_size=3), st.booleans(), st.data())
def test_any_arguments_come_through_to_the_letter(
    arguments: dict[str, object], is_ascii: bool, data: st.DataObject
) -> None:
    try:
        written = json.dumps(arguments, ensure_ascii=is_ascii, allow_nan=False)
    except ValueError:
        return
    text = f'{{"name": "get", "parameters": {written}}}'
    cut = data.draw(st.integers(0, len(text)))
    assert outcome(make_parser(), [text[:cut], text[cut:]]) == [("get", written)]


def test_arguments_stream_as_they_come() -> None:
    parser = make_parser()
    assert parser.feed('{"name": "get", "param') == []
    started, opening = parser.feed('eters": {"a')
    assert isinstance(started, CallStarted)
    assert (started.index, started.name) == (0, "get")
    assert opening == ArgumentsPiece(0, '{"a')
    assert parser.feed('": 1') == [ArgumentsPiece(0, '": 1')]
    assert parser.feed("}}") == [ArgumentsPiece(0, "}")]
    assert parser.finish() == []


def test_second_call_has_the_next_index_and_an_id_of_its_own() -> None:
    events = make_parser().feed(f"[{JSON_CALL}, {JSON_CALL}]")
    first, second = [event for event in events if isinstance(event, CallStarted)]
    assert (first.index, second.index) == (0, 1)
    assert first.id != second.id
    assert re.fullmatch(r"call_[0-9a-f]{24}", first.id)


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        (["Hel", "lo"], ["Hel", "lo"]),
        (["a {", "x"], ["a ", "{x"]),
        (["[", "get_w", "orld"], ["", "", "[get_world"]),
        (['{"na', "il"], ["", '{"nail']),
        (["`", "x`"], ["", "`x"]),
        (["```p", "hp\n"], ["", "```php\n"]),
        (["\n", "x"], ["", "\nx"]),
        (["x", "\n", "y"], ["x", "\n", "y"]),
        (["[get_weather(", '"'], ["", '[get_weather("']),
    ],
)
def test_text_waits_only_while_it_can_be_a_call(pieces: list[str], said: list[str]) -> None:
    parser = make_parser()
    told = [parser.feed(piece) for piece in pieces]
    assert [
        "".join(event.text for event in events if isinstance(event, TextPiece)) for events in told
    ] == said


def test_only_the_first_call_counts_where_one_is_allowed() -> None:
    parser = gemma_parser(NAMES, max_calls=1)
    assert outcome(parser, [f"[{JSON_CALL}, get_time()] Done."]) == [PARIS, " Done."]
    assert parser.num_calls == 1


def test_what_is_no_call_is_left_out_where_there_can_be_nothing_but_calls() -> None:
    parser = gemma_parser(NAMES, calls_only=True)
    assert outcome(parser, [f'[{JSON_CALL}, {{"name": "get_ti']) == [PARIS]
    assert outcome(gemma_parser(NAMES, calls_only=True), [' [{"na']) == []


def test_long_answer_of_nothing_but_openings_is_prose() -> None:
    for text in ("[" * 50_000, '{"parameters":' * 5_000, "[get(a=" * 2_000, "```json\n" * 5_000):
        assert outcome(make_parser(), [text]) == [text]
