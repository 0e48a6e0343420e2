"""``docs/api.md`` says what the code does."""

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from pydantic import BaseModel

from gemma_serve.generation import SamplingParams
from gemma_serve.openai_api.chat_schemas import ChatCompletionRequest
from gemma_serve.openai_api.completion_schemas import CompletionRequest, UnsupportedInCompletions
from gemma_serve.openai_api.limits import ApiLimits
from gemma_serve.openai_api.requesters import RequesterFields
from gemma_serve.openai_api.responses.request_schemas import ResponseRequest, UnsupportedInResponses
from gemma_serve.openai_api.sampling_fields import SamplingFields, TokenFields
from gemma_serve.openai_api.structured_outputs import StructuredOutputFields
from gemma_serve.openai_api.unsupported_fields import UnsupportedFields

DOCS = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """The text under the heading ``title``, up to the next heading."""
    return re.split(r"^#+ ", DOCS.partition(f" {title}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def rows(title: str) -> list[list[str]]:
    """The cells of a section's table, without its head."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


TABLES: Mapping[str, tuple[type[BaseModel], tuple[type[BaseModel], ...]]] = {
    "Chat completion fields": (
        ChatCompletionRequest,
        (SamplingFields, StructuredOutputFields, UnsupportedFields),
    ),
    "Sampling fields": (SamplingFields, ()),
    "Completion fields": (
        CompletionRequest,
        (SamplingFields, StructuredOutputFields, UnsupportedInCompletions),
    ),
    "Response fields": (
        ResponseRequest,
        (TokenFields, RequesterFields, UnsupportedInResponses),
    ),
}
"""The model of each table's fields, and the models whose fields are documented elsewhere."""
ROWS = [(title, row) for title in TABLES for row in rows(title)]


def own_fields(title: str) -> dict[str, str | None]:
    """Names and descriptions of the fields that a table is about."""
    model, elsewhere = TABLES[title]
    others = {name for other in elsewhere for name in other.model_fields}
    return {
        name: field.description for name, field in model.model_fields.items() if name not in others
    }


def schema_of(title: str, name: str) -> Mapping[str, object]:
    """The field's JSON schema, without the ``null`` that every field takes."""
    schema: dict[str, object] = TABLES[title][0].model_json_schema()["properties"][name]
    match schema.get("anyOf"):
        case [dict() as first, {"type": "null"}]:
            return {**schema, **first}
    return schema


@pytest.mark.parametrize("title", TABLES)
def test_table_has_every_supported_field_with_its_description(title: str) -> None:
    documented = {name.strip("`"): text for name, _, _, text in rows(title)}
    assert documented == own_fields(title)


@pytest.mark.parametrize(("title", "row"), ROWS)
def test_table_has_the_ranges_that_are_checked(title: str, row: list[str]) -> None:
    name, documented, _, _ = row
    schema = schema_of(title, name.strip("`"))
    if "minimum" in schema and "64-bit" not in documented:
        bounds = [float(number) for number in re.findall(r"-?[0-9.]+", documented)]
        checked = [schema["minimum"], schema["maximum"]]
        assert bounds == [bound for bound in checked if bound != 2**63 - 1]
    sizes = [schema[key] for key in ("minItems", "maxItems", "maxProperties") if key in schema]
    if sizes:
        assert [int(number) for number in re.findall(r"[0-9]+", documented)] == sizes


@pytest.mark.parametrize(("title", "row"), ROWS)
def test_table_has_the_types_that_are_checked(title: str, row: list[str]) -> None:
    documented_types = {
        "integer": "integer",
        "number": "number",
        "string": "string",
        "boolean": "boolean",
        "array": "list",
        "object": "object",
    }
    name, documented, _, _ = row
    kind = schema_of(title, name.strip("`")).get("type")
    if isinstance(kind, str):
        assert documented_types[kind] in documented


def test_checkpoints_defaults_are_those_of_sampling_params() -> None:
    documented = {
        name.strip("`") for name, _, absent, _ in rows("Sampling fields") if "check" in absent
    }
    sampling = set(SamplingParams.__dataclass_fields__).intersection(SamplingFields.model_fields)
    ours = {"seed", "prompt_logprobs", "speculation"}
    assert documented == sampling - ours | {"repeat_penalty", "no_stop_trim"}


def test_table_has_every_field_that_constrains_the_answer() -> None:
    fields = StructuredOutputFields.model_fields
    assert [(name.strip("`"), text) for name, text in rows("Structured output")] == [
        (name, field.description) for name, field in fields.items()
    ]


def test_list_of_unsupported_fields_is_complete() -> None:
    listing = section("Not supported yet").split("\n\n")[1]
    assert re.findall(r"`(\w+)`", listing) == list(UnsupportedFields.model_fields)
    in_completions = section("Completion fields").partition("as above:")[2]
    assert re.findall(r"`(\w+)`", in_completions) == list(UnsupportedInCompletions.model_fields)
    in_responses = section("Response fields").partition("as above:")[2].partition("(but")[0]
    assert re.findall(r"`(\w+)`", in_responses) == list(UnsupportedInResponses.model_fields)


def test_limits_are_the_defaults() -> None:
    limits, text = ApiLimits(), section("Keys, limits and headers")
    assert f"{limits.max_body_bytes // 2**20} MiB" in text
    assert f"{limits.images.max_images} images of {limits.images.max_bytes // 2**20} MiB" in text
    assert f"{limits.images.max_pixels // 10**6} million pixels" in text
