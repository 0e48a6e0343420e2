"""The fields that say what an answer must look like: OpenAI's and those of other servers."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from gemma_serve.errors import InvalidRequestError
from gemma_serve.generation import OutputConstraint
from gemma_serve.openai_api.field_types import Bool, Text
from gemma_serve.openai_api.unsupported_fields import UnsupportedIfSet, empty_as_absent

_ANY_OBJECT = OutputConstraint(kind="json_object", value="")

_EMPTY_AS_ABSENT = BeforeValidator(empty_as_absent)
Schema = dict[str, object]
SchemaOrText = Annotated[Schema | Text | None, _EMPTY_AS_ABSENT]
Pattern = Annotated[Text | None, _EMPTY_AS_ABSENT]
Choices = Annotated[
    list[Annotated[Text, Field(min_length=1)]] | None, Field(max_length=10_000), _EMPTY_AS_ABSENT
]


FormatName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class TextFormat(BaseModel):
    """Anything goes."""

    type: Literal["text"]


class JsonObjectFormat(BaseModel):
    """One JSON object, of any kind or, as llama.cpp has it, one that fits a schema."""

    type: Literal["json_object"]
    definition: SchemaOrText = Field(default=None, alias="schema", description="A JSON Schema.")


class JsonSchemaDefinition(BaseModel):
    """A schema with a name, which nothing depends on. It is enforced, ``strict`` or not."""

    name: FormatName
    description: str | None = None
    definition: Schema = Field(alias="schema", description="A JSON Schema.")
    strict: Bool | None = None


class JsonSchemaFormat(BaseModel):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchemaDefinition


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")
]


class StructuredOutputs(BaseModel):
    """vLLM's way to ask: one of these."""

    model_config = ConfigDict(extra="allow")

    json_: SchemaOrText = Field(default=None, alias="json")
    json_object: Bool | None = None
    regex: Pattern = None
    choice: Choices = None
    grammar: Pattern = None
    structural_tag: UnsupportedIfSet = None

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        """Options beside a kind are vLLM's own, but one of them alone may be a kind of tomorrow."""
        asked = (self.json_, self.json_object, self.regex, self.choice, self.grammar)
        if any(asked) or not any((self.model_extra or {}).values()):
            return self
        raise PydanticCustomError(
            "unsupported", "None of json, json_object, regex, choice and grammar is given"
        )


class StructuredOutputFields(BaseModel):
    """At most one may constrain the answer. Each description is the field's line in the docs."""

    response_format: ResponseFormat | None = Field(
        default=None,
        description="OpenAI's: `text`, `json_object` or `json_schema`, enforced with or without "
        "`strict`. A `schema` beside `json_object` is one too, as in llama.cpp.",
    )
    structured_outputs: StructuredOutputs | None = Field(
        default=None,
        description="vLLM's: `json`, `json_object`, `regex`, `choice` or `grammar`.",
    )
    guided_json: SchemaOrText = Field(default=None, description="vLLM's older name: a JSON Schema.")
    guided_regex: Pattern = Field(
        default=None, description="vLLM's older name: a pattern for the whole answer."
    )
    guided_choice: Choices = Field(
        default=None, description="vLLM's older name: the answer is one of these texts."
    )
    guided_grammar: Pattern = Field(
        default=None, description="vLLM's older name: a grammar in Lark or GBNF notation."
    )
    json_schema: SchemaOrText = Field(
        default=None, description="llama.cpp's and SGLang's: a JSON Schema."
    )
    regex: Pattern = Field(default=None, description="SGLang's: a pattern for the whole answer.")
    grammar: Pattern = Field(default=None, description="llama.cpp's: a grammar in GBNF notation.")
    ebnf: Pattern = Field(default=None, description="SGLang's: a grammar in GBNF notation.")
    format: object = Field(
        default=None, description='Ollama\'s: `"json"` or a JSON Schema; other values do nothing.'
    )


@dataclass(frozen=True, slots=True)
class ConstrainingField:
    """What the answer must look like, and where in the request that was said."""

    path: str
    constraint: OutputConstraint

    @property
    def leaves_calls(self) -> bool:
        """Whether it is of the text alone, so that calls need not fit: OpenAI's own."""
        return self.path.startswith("response_format")


def constraining_field(body: StructuredOutputFields) -> ConstrainingField | None:
    """``None``: any text will do. Raises ``InvalidRequestError`` if several fields constrain it."""
    fields = [ConstrainingField(*field) for field in _constraints(body)]
    if len(fields) > 1:
        raise InvalidRequestError(
            f"{fields[0].path} and {fields[1].path} both say what the answer must look like; "
            "leave one out",
            param=fields[1].path,
            code="invalid_value",
        )
    return fields[0] if fields else None


def _constraints(body: StructuredOutputFields) -> Iterator[tuple[str, OutputConstraint]]:
    match body.response_format:
        case JsonObjectFormat(definition=None):
            yield "response_format", _ANY_OBJECT
        case JsonObjectFormat(definition=schema):
            assert schema is not None  # what match does not narrow
            yield "response_format.schema", _json_schema(schema)
        case JsonSchemaFormat(json_schema=schema):
            yield "response_format.json_schema.schema", _json_schema(schema.definition)
    if body.structured_outputs is not None:
        for field, constraint in _of_structured_outputs(body.structured_outputs):
            yield f"structured_outputs.{field}", constraint
    if body.format == "json":
        yield "format", _ANY_OBJECT
    if isinstance(body.format, dict) and body.format:
        yield "format", _json_schema(body.format)
    if body.guided_json:
        yield "guided_json", _json_schema(body.guided_json)
    if body.json_schema:
        yield "json_schema", _json_schema(body.json_schema)
    if body.guided_choice:
        yield "guided_choice", _choice(body.guided_choice)
    yield from _texts("regex", guided_regex=body.guided_regex, regex=body.regex)
    yield from _texts(
        "grammar", guided_grammar=body.guided_grammar, grammar=body.grammar, ebnf=body.ebnf
    )


def _of_structured_outputs(asked: StructuredOutputs) -> Iterator[tuple[str, OutputConstraint]]:
    if asked.json_:
        yield "json", _json_schema(asked.json_)
    if asked.json_object:
        yield "json_object", _ANY_OBJECT
    if asked.choice:
        yield "choice", _choice(asked.choice)
    yield from _texts("regex", regex=asked.regex)
    yield from _texts("grammar", grammar=asked.grammar)


def _texts(
    kind: Literal["regex", "grammar"], **texts: str | None
) -> Iterator[tuple[str, OutputConstraint]]:
    """Those of ``texts``, by field, that are given."""
    for field, text in texts.items():
        if text:
            yield field, OutputConstraint(kind=kind, value=text)


def _json_schema(schema: Schema | str) -> OutputConstraint:
    text = schema if isinstance(schema, str) else json.dumps(schema)
    return OutputConstraint(kind="json_schema", value=text)


def _choice(choices: list[str]) -> OutputConstraint:
    return OutputConstraint(kind="choice", value=json.dumps(choices))
