import asyncio
import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Literal

import pytest

from gemma_serve.errors import OutputConstraintError, OverloadedError
from gemma_serve.generation import OutputConstraint
from gemma_serve.messages import ToolDefinition
from gemma_serve.structured_output import compiler as compiler_module
from gemma_serve.structured_output.compiler import ConstraintCompiler
from gemma_serve.structured_output.grammar_constraint import GrammarConstraint
from gemma_serve.tool_calling.call_schema import text_or_call_schema
from gemma_serve.tool_calling.choice import ToolChoice
from tests.structured_output.vocabularies import (
    END_OF_TURN,
    EOS,
    TOKEN_BYTES,
    encode,
    make_compiler,
)

Kind = Literal["json_schema", "json_object", "regex", "choice", "grammar"]


@pytest.fixture(scope="module")
def compiler() -> Iterator[ConstraintCompiler]:
    compiler = make_compiler()
    yield compiler
    compiler.close()


def start(compiler: ConstraintCompiler, kind: Kind, value: object) -> GrammarConstraint:
    text = value if isinstance(value, str) else json.dumps(value)
    wanted = OutputConstraint(kind=kind, value=text)
    (constraint,) = asyncio.run(compiler.constraints(wanted, 1))
    return constraint


def allowed(constraint: GrammarConstraint) -> set[int]:
    mask = constraint.allowed_tokens()
    assert mask is not None
    return {i for i in range(len(TOKEN_BYTES)) if mask[i // 8] >> (i % 8) & 1}


def takes(constraint: GrammarConstraint, text: str) -> bool:
    """Whether ``text`` fits from start to end, byte by byte."""
    for token_id in text.encode():
        if constraint.is_over or token_id not in allowed(constraint):
            return False
        constraint.accept(token_id)
    return constraint.is_over or EOS in allowed(constraint)


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


RECORD = {
    "type": "object",
    "propertyNames": {"type": "string"},
    "additionalProperties": {"type": "integer"},
    "unevaluatedProperties": {},
}
"""As zod writes a record of integers."""
PETS = {
    "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
    "$defs": {
        name: {"type": "object", "properties": {"kind": {"const": name}}} for name in ("Cat", "Dog")
    },
}
"""As pydantic writes a union with a discriminator."""
SIZED = {
    "type": "object",
    "properties": {"a": {"type": "null"}, "b": {"type": "null"}},
    "required": ["a"],
    "additionalProperties": False,
    "minProperties": 1,
    "maxProperties": 2,
}
"""Every object that fits has one or two keys, whether it is said or not."""


LISTED = {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}
"""Says nothing of other properties."""


EITHER = text_or_call_schema(
    {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/A"}},
        "required": ["a"],
        "$defs": {"A": {"const": 1}},
    },
    [
        ToolDefinition("get_time"),
        ToolDefinition("look", None, '{"properties": {"at": {"type": "string"}}}'),
    ],
    ToolChoice("auto", ("get_time", "look")),
    parallel=True,
)
"""A format that allows any object with the right ``a``, or calls."""
TIME_CALL = '{"name": "get_time", "parameters": {}}'


@pytest.mark.parametrize(
    ("kind", "value", "text", "fits"),
    [
        ("json_schema", PERSON, '{"name":"Ada","age":36}', True),
        ("json_schema", PERSON, '{"name": "Ada", "age": 36}', True),
        ("json_schema", PERSON, '{\n  "name": "Ada",\n  "age": 36\n}', True),
        ("json_schema", PERSON, '{  "name": "Ada", "age": 36}', False),
        ("json_schema", PERSON, '{"name": "Ada"}', False),
        ("json_schema", PERSON, '{"name": "Ada", "age": -1}', False),
        ("json_schema", PERSON, '{"name": "Ada", "age": 36, "x": 1}', False),
        ("json_schema", LISTED, '{"a": null}', True),
        ("json_schema", LISTED, '{"a": null, "b": 1}', False),
        ("json_schema", {"anyOf": [LISTED]}, '{"a": null, "b": 1}', False),
        ("json_schema", {"items": LISTED}, '[{"a": null, "b": 1}]', False),
        ("json_schema", {**LISTED, "additionalProperties": True}, '{"a": null, "b": 1}', True),
        ("json_schema", {**LISTED, "required": ["a", "b"]}, '{"a": null, "b": 1}', True),
        ("json_schema", {"allOf": [LISTED, {"required": ["b"]}]}, '{"a": null, "b": 1}', True),
        ("json_schema", {"type": "object", "properties": {}}, '{"b": 1}', True),
        ("json_schema", {**LISTED, "anyOf": [{"minProperties": 2}]}, '{"a": null, "b": 1}', True),
        ("json_schema", True, "[1, null]", True),
        ("json_schema", {"type": "string", "format": "password"}, '"secret"', True),
        ("json_schema", {"items": {"type": "null"}, "uniqueItems": False}, "[null, null]", True),
        ("json_schema", {"type": "string", "format": "date"}, '"2026-11-23"', True),
        ("json_schema", {"type": "string", "format": "date"}, '"tomorrow"', False),
        ("json_schema", {"const": "é\U0001f389"}, '"é\U0001f389"', True),
        ("json_schema", RECORD, '{"a": 1}', True),
        ("json_schema", RECORD, '{"a": "x"}', False),
        ("json_schema", PETS, '{"kind": "Dog"}', True),
        ("json_schema", PETS, "{}", False),
        ("json_schema", SIZED, '{"a": null}', True),
        ("json_schema", SIZED, '{"a": null, "b": null}', True),
        ("json_schema", SIZED, "{}", False),
        ("json_schema", {"anyOf": [SIZED]}, '{"a": null}', True),
        ("json_schema", {**SIZED, "minProperties": 2}, '{"a": null}', False),
        ("json_schema", EITHER, '{"a": 1}', True),
        ("json_schema", EITHER, '{"a": 2}', False),
        ("json_schema", EITHER, TIME_CALL, True),
        ("json_schema", EITHER, '{"name": "look", "parameters": {"at": "x"}}', True),
        ("json_schema", EITHER, '{"name": "look", "parameters": {"at": 1}}', False),
        ("json_schema", EITHER, f"[{TIME_CALL}, {TIME_CALL}]", True),
        ("json_schema", EITHER, f'[{TIME_CALL}, {{"a": 1}}]', False),
        ("json_schema", EITHER, "[]", False),
        ("json_object", "", '{"a": [1, {"b": null}]}', True),
        ("json_object", "", "[1]", False),
        ("json_object", "", "```json\n{}", False),
        ("json_object", "", " {}", False),
        ("regex", r"[a-z]+@\d{2}", "ab@12", True),
        ("regex", r"^[a-z]+@\d{2}$", "ab@12", True),
        ("regex", r"[a-z]+@\d{2}", "ab@123", False),
        ("choice", ["yes", "no", 'a "b"\n\\ \U0001f389\x7f'], 'a "b"\n\\ \U0001f389\x7f', True),
        ("choice", ["yes", "no"], "ye", False),
        ("choice", ["a|b"], "a", False),
        ("grammar", 'start: "a" x\nx: "b" | "c"', "ac", True),
        ("grammar", 'root ::= "a" x\nx ::= [bc]', "ac", True),
        ("grammar", 'root ::= "a" x\nx ::= [bc]', "ad", False),
    ],
)
def test_constraint_takes_what_fits_and_nothing_else(
    compiler: ConstraintCompiler, kind: Kind, value: object, text: str, fits: bool
) -> None:
    assert takes(start(compiler, kind, value), text) is fits


def test_tokens_that_write_the_same_are_allowed_alike(compiler: ConstraintCompiler) -> None:
    same = {i for i, written in enumerate(TOKEN_BYTES) if written == b"A"}
    assert len(same) == 2
    assert allowed(start(compiler, "choice", ["A", "B"])) == {*same, ord("B")}


def test_every_end_of_turn_token_waits_for_the_text_to_be_complete(
    compiler: ConstraintCompiler,
) -> None:
    constraint = start(compiler, "regex", "a+")
    assert allowed(constraint).isdisjoint({EOS, END_OF_TURN})
    constraint.accept(ord("a"))
    assert allowed(constraint) >= {EOS, END_OF_TURN, ord("a")}
    assert not constraint.is_over
    constraint.accept(END_OF_TURN)
    assert constraint.is_over


def test_copies_go_their_own_ways(compiler: ConstraintCompiler) -> None:
    wanted = OutputConstraint(kind="choice", value='["ab", "cd"]')
    first, second = asyncio.run(compiler.constraints(wanted, 2))
    first.accept(ord("c"))
    assert (allowed(first), ord("a") in allowed(second)) == ({ord("d")}, True)


def test_what_cannot_be_enforced_beside_calls_is_told_of_the_text_or_the_function(
    compiler: ConstraintCompiler,
) -> None:
    choice = ToolChoice("auto", ("f",))
    for text, parameters, place in (
        (ITEM, "{}", "$defs.$text.properties.set"),
        ({}, json.dumps(ITEM), "$defs.f.properties.set"),
    ):
        tool = ToolDefinition("f", None, parameters)
        either = text_or_call_schema(text, [tool], choice, parallel=True)
        with pytest.raises(OutputConstraintError) as caught:
            start(compiler, "json_schema", either)
        assert caught.value.param == place


def test_guesses_are_checked_without_a_step_and_forks_go_on_alone(
    compiler: ConstraintCompiler,
) -> None:
    constraint = start(compiler, "choice", ["yes yes", "yes no"])
    assert constraint.num_acceptable(list(b"yes you")) == 5
    assert constraint.num_acceptable(list(b"yes no")) == 6
    fork = constraint.fork()
    for token_id in b"yes n":
        fork.accept(token_id)
    assert allowed(fork) == {ord("o")}
    assert allowed(constraint) == {ord("y")}


def test_a_token_that_does_not_fit_leaves_nothing_to_come(compiler: ConstraintCompiler) -> None:
    constraint = start(compiler, "choice", ["ab"])
    constraint.accept(ord("x"))
    assert (constraint.allowed_tokens(), constraint.is_over) == (None, False)


ITEM = {"type": "object", "properties": {"ok": {"type": "string"}, "set": {"uniqueItems": True}}}


@pytest.mark.parametrize(
    ("kind", "value", "param", "message"),
    [
        ("json_schema", {"type": "strin"}, None, "strin"),
        ("json_schema", {"properties": {"a": {"type": "strin"}}}, "properties.a", "strin"),
        ("json_schema", {"items": ITEM}, "items.properties.set", "uniqueItems"),
        ("json_schema", {"anyOf": [{}, ITEM]}, "anyOf[1].properties.set", "uniqueItems"),
        (
            "json_schema",
            {"properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": ITEM}},
            "$defs.b.properties.set",
            "uniqueItems",
        ),
        ("json_schema", {"properties": {"a": 5}}, "properties.a", "object"),
        ("json_schema", {"properties": {"a": {"pattern": "("}}}, "properties.a", "unclosed"),
        ("json_schema", {"items": {**SIZED, "maxProperties": 1}}, "items", "maxProperties"),
        (
            "json_schema",
            {"items": {"propertyNames": {"pattern": "^a"}}},
            "items",
            "propertyNames",
        ),
        ("json_schema", {"$ref": "https://example.org/x"}, None, "example.org"),
        ("json_schema", {"$ref": "#"}, None, "enforced"),
        ("json_schema", {"not": {}}, None, "not"),
        ("json_schema", False, None, "object"),
        ("json_schema", [], None, "object"),
        ("json_schema", '{"a": ', None, "JSON"),
        ("json_schema", '{"const": NaN}', None, "NaN"),
        ("json_schema", {"properties": {"\ud800": {}}}, None, "surrogate"),
        ("json_schema", {"properties": {"a": {}}, "required": [{}]}, None, ""),
        ("json_schema", {"properties": {"a": 1}}, "properties.a", ""),
        ("json_schema", {"enum": ["\udfff"]}, None, "surrogate"),
        ("json_schema", '{"items":' * 100 + "{}" + "}" * 100, None, "deeper than 100"),
        ("json_schema", '{"items":' * 9999 + "{}" + "}" * 9999, None, ""),
        ("json_schema", {"description": "x" * 262_144}, None, "262144 are allowed"),
        ("regex", "(a", None, "unclosed"),
        ("regex", "(?=a)", None, "look"),
        ("grammar", "start: x", None, "unknown name"),
        ("grammar", "root ::= (", None, "cannot be read"),
        ("grammar", "root ::= " + "(" * 5000, None, "deeply"),
        ("grammar", "", None, "cannot be read"),
    ],
)
def test_what_cannot_be_enforced_is_refused_with_its_place(
    compiler: ConstraintCompiler, kind: Kind, value: object, param: str | None, message: str
) -> None:
    with pytest.raises(OutputConstraintError) as caught:
        start(compiler, kind, value)
    assert caught.value.param == param
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("json_schema", {"maxItems": 10**9, "items": {"maxLength": 10**9, "type": "string"}}),
        ("json_schema", {"type": "string", "pattern": "((a{1,999}){1,999}){1,999}"}),
        (
            "json_schema",
            {
                "allOf": [
                    {"anyOf": [{"required": [f"{letter}{i}"]} for letter in "abc"]}
                    for i in range(24)
                ]
            },
        ),
        ("json_schema", {"properties": {f"p{i}": {"type": "string"} for i in range(500)}}),
        ("regex", "(a|b)*a(a|b){25}"),
        ("grammar", 'start: x{1000000}\nx: "a"'),
        ("grammar", 'start: s\ns: s s | "a" | ""'),
    ],
)
def test_hostile_constraint_is_settled_in_time(
    compiler: ConstraintCompiler, kind: Kind, value: object
) -> None:
    async def settle() -> None:
        wanted = OutputConstraint(
            kind=kind, value=value if isinstance(value, str) else json.dumps(value)
        )
        with suppress(OutputConstraintError):
            await asyncio.wait_for(compiler.constraints(wanted, 1), 5)

    asyncio.run(settle())


def test_compiling_twice_is_done_once(compiler: ConstraintCompiler) -> None:
    wanted = OutputConstraint(kind="regex", value="once")
    hits = compiler._compiled.cache_info().hits
    for _ in range(3):
        asyncio.run(compiler.constraints(wanted, 1))
    assert compiler._compiled.cache_info().hits == hits + 2


def test_compiling_that_takes_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = make_compiler()
    monkeypatch.setattr(compiler_module, "_MAX_COMPILE_S", 0.0)
    with pytest.raises((OutputConstraintError, OverloadedError)):
        asyncio.run(compiler.constraints(OutputConstraint(kind="regex", value="a"), 1))
    compiler.close()


def test_text_that_names_a_control_token_is_spelled_out() -> None:
    def encode_as_control_token(text: str) -> list[int]:
        return [EOS] if text == "<eos>" else encode(text)

    compiler = ConstraintCompiler(TOKEN_BYTES, (EOS,), encode_as_control_token)
    assert takes(start(compiler, "choice", ["<eos>"]), "<eos>")
    compiler.close()


def test_failing_tokenizer_costs_nothing_but_a_log_entry(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(text: str) -> list[int]:
        raise RuntimeError(f"cannot encode {len(text)}")

    compiler = ConstraintCompiler(TOKEN_BYTES, (EOS,), broken)
    assert takes(start(compiler, "choice", ["forced"]), "forced")
    assert "cannot encode" in caplog.text
    compiler.close()
