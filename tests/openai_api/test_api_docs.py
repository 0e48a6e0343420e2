"""``docs/api.md`` says what the code does."""

import re
from collections.abc import Mapping
from pathlib import Path

from gemma_serve.generation import SamplingParams
from gemma_serve.openai_api.chat_schemas import ChatCompletionRequest
from gemma_serve.openai_api.limits import ApiLimits
from gemma_serve.openai_api.unsupported_fields import UnsupportedFields

DOCS = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """The text under the heading ``title``, up to the next heading."""
    return re.split(r"^#+ ", DOCS.partition(f" {title}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def rows(title: str) -> list[list[str]]:
    """The cells of a section's table, without its head."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def supported_fields() -> list[str]:
    return [
        name
        for name in ChatCompletionRequest.model_fields
        if name not in UnsupportedFields.model_fields
    ]


def schema_of(name: str) -> Mapping[str, object]:
    """The field's JSON schema, without the ``null`` that every field takes."""
    schema: dict[str, object] = ChatCompletionRequest.model_json_schema()["properties"][name]
    match schema.get("anyOf"):
        case [dict() as first, {"type": "null"}]:
            return {**schema, **first}
    return schema


def test_table_has_every_supported_field_with_its_description() -> None:
    fields = ChatCompletionRequest.model_fields
    assert [(name.strip("`"), text) for name, _, _, text in rows("Chat completion fields")] == [
        (name, fields[name].description) for name in supported_fields()
    ]


def test_table_has_the_ranges_that_are_checked() -> None:
    for name, documented, _, _ in rows("Chat completion fields"):
        schema = schema_of(name.strip("`"))
        if "minimum" in schema and "64-bit" not in documented:
            bounds = [float(number) for number in re.findall(r"-?[0-9.]+", documented)]
            checked = [schema["minimum"], schema["maximum"]]
            assert bounds == [bound for bound in checked if bound != 2**63 - 1], name
        sizes = [schema[key] for key in ("minItems", "maxItems", "maxProperties") if key in schema]
        if sizes:
            assert [int(number) for number in re.findall(r"[0-9]+", documented)] == sizes, name


def test_table_has_the_types_that_are_checked() -> None:
    documented_types = {
        "integer": "integer",
        "number": "number",
        "string": "string",
        "boolean": "boolean",
        "array": "list",
        "object": "object",
    }
    for name, documented, _, _ in rows("Chat completion fields"):
        kind = schema_of(name.strip("`")).get("type")
        if isinstance(kind, str):
            assert documented_types[kind] in documented, name


def test_checkpoints_defaults_are_those_of_sampling_params() -> None:
    documented = {
        name for name, _, absent, _ in rows("Chat completion fields") if "check" in absent
    }
    others = {"max_tokens", "min_tokens", "seed", "logprobs", "prompt_logprobs"}
    sampling = {f"`{name}`" for name in SamplingParams.__dataclass_fields__ if name not in others}
    assert documented == sampling | {"`repeat_penalty`"}


def test_list_of_unsupported_fields_is_complete() -> None:
    listing = section("Not supported yet").split("\n\n")[1]
    assert re.findall(r"`(\w+)`", listing) == list(UnsupportedFields.model_fields)


def test_limits_are_the_defaults() -> None:
    limits, text = ApiLimits(), section("Keys, limits and headers")
    assert f"{limits.max_body_bytes // 2**20} MiB" in text
    assert f"{limits.images.max_images} images of {limits.images.max_bytes // 2**20} MiB" in text
    assert f"{limits.images.max_pixels // 10**6} million pixels" in text
