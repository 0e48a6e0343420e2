"""What the model is told of functions, to the letter: a prefix cache compares every byte."""

from dataclasses import replace

from gemma_serve.messages import ToolCall, ToolDefinition, ToolOffer
from gemma_serve.tool_calling.prompt import calls_text, tool_prompt

OFFER = ToolOffer(
    definitions=(
        ToolDefinition("get_time"),
        ToolDefinition("get_weather", 'Says "sun" or so: é', '{"type": "object"}'),
    )
)
PARIS = ToolCall("call_1", "get_weather", ' {"city": "Paris", "days": [1, true, null]}')
TIME = ToolCall("call_2", "get_time", "")


def test_json_prompt_is_the_documented_one_with_a_line_on_several_calls() -> None:
    assert tool_prompt(OFFER) == (
        "You have access to functions. If you decide to invoke any of the function(s), "
        "you MUST put it in the format of\n"
        '{"name": function name, "parameters": dictionary of argument name and its value}\n'
        "To invoke several functions, put them in a list: "
        '[{"name": ...}, {"name": ...}]\n'
        "\n"
        "You SHOULD NOT include any other text in the response if you call a function\n"
        "[\n"
        '{"name": "get_time"},\n'
        '{"name": "get_weather", "description": "Says \\"sun\\" or so: é", '
        '"parameters": {"type": "object"}}\n'
        "]"
    )


def test_pythonic_prompt_is_the_documented_one() -> None:
    text = tool_prompt(replace(OFFER, form="pythonic"))
    assert text.startswith(
        "You have access to functions. If you decide to invoke any of the function(s), "
        "you MUST put it in the format of\n"
        "[func_name1(params_name1=params_value1, params_name2=params_value2...), "
        "func_name2(params)]\n"
        "\n"
        "You SHOULD NOT include any other text in the response if you call a function\n"
        '[\n{"name": "get_time"},\n'
    )


def test_choice_among_the_functions_leaves_the_prefix_as_it_is() -> None:
    assert tool_prompt(replace(OFFER, allowed=("get_time",))) == (
        tool_prompt(OFFER) + "\n\nOf these, you may now call only: get_time"
    )


def test_format_of_other_answers_leaves_the_prefix_as_it_is() -> None:
    assert tool_prompt(replace(OFFER, allowed=("get_time",), answer_schema='{"const": 1}')) == (
        tool_prompt(replace(OFFER, allowed=("get_time",)))
        + "\n\nIf you do not call a function, respond only with JSON that fits this JSON Schema:"
        + '\n{"const": 1}'
    )


def test_one_earlier_call_is_an_object_and_several_are_a_list() -> None:
    paris = '{"name": "get_weather", "parameters": {"city": "Paris", "days": [1, true, null]}}'
    time = '{"name": "get_time", "parameters": {}}'
    assert calls_text([PARIS], "json") == paris
    assert calls_text([PARIS, TIME], "json") == f"[{paris}, {time}]"


def test_earlier_calls_are_shown_as_python_where_python_was_asked_for() -> None:
    assert calls_text([PARIS, TIME], "pythonic") == (
        "[get_weather(city='Paris', days=[1, True, None]), get_time()]"
    )


def test_arguments_that_python_cannot_name_stay_json() -> None:
    for arguments in ('{"broken', "[1]", '{"a-b": 1}', "[" * 100_000):
        call = ToolCall("call_1", "f", arguments)
        expected = f'[{{"name": "f", "parameters": {arguments}}}, '
        assert calls_text([call, TIME], "pythonic").startswith(expected)
