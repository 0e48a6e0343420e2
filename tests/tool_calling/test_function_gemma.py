"""FunctionGemma's tokens for calls."""

import pytest

from gemma_serve.tool_calling.function_gemma import function_gemma_parser
from gemma_serve.tool_calling.parser import ToolCallParser
from tests.tool_calling.answers import assert_same_for_all_two_way_splits

START, END, ESC = "<start_function_call>", "<end_function_call>", "<escape>"


def make_parser() -> ToolCallParser:
    return function_gemma_parser(("f", "get_weather"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            f"{START}call:get_weather{{city:{ESC}São {{Paulo}}, BR{ESC}}}{END}",
            [("get_weather", '{"city": "São {Paulo}, BR"}')],
        ),
        (
            f"{START}call:f{{a:1,b:-2.5e3,c:true,d:null,e:[{ESC}x{ESC},2],g:{{h:[]}}}}{END}",
            [("f", '{"a": 1, "b": -2.5e3, "c": true, "d": null, "e": ["x", 2], "g": {"h": []}}')],
        ),
        (
            f"{START}call:f{{a:True,b:[False,None]}}{END}",
            [("f", '{"a": true, "b": [false, null]}')],
        ),
        (f"{START}call:f{{}}{END}{START}call:f{{}}{END}", [("f", "{}"), ("f", "{}")]),
        (f"One < two. {START}call:f{{}}{END}", ["One < two. ", ("f", "{}")]),
        (f"{START}call:g{{}}{END}", [f"{START}call:g{{}}{END}"]),
        (f"{START}call:f{{a:}}{END}", [f"{START}call:f{{a:}}{END}"]),
        (f"{START}call:f{{a:1 b}}{END}", [f"{START}call:f{{a:1 b}}{END}"]),
        (f"{START}call:f{{a:{ESC}x}}{END}", [f"{START}call:f{{a:{ESC}x}}{END}"]),
        (f"{START}call:f{{a:1", [f"{START}call:f{{a:1"]),
        (f"{START}call:f{{a:{'[' * 70}", [f"{START}call:f{{a:{'[' * 70}"]),
    ],
)
def test_answer_is_read_the_same_in_every_split(
    text: str, expected: list[str | tuple[str, str]]
) -> None:
    assert_same_for_all_two_way_splits(make_parser, text, expected)
