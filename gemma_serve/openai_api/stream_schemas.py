"""How streams are described in the OpenAPI document: event by event, as OpenAPI 3.2 does."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel


def documented_stream(
    *payloads: type[BaseModel], ends_with_done: bool = False
) -> dict[int | str, dict[str, Any]]:
    """The success of an operation that may answer with a stream, for FastAPI's ``responses``.

    ``payloads``: what the data of an event may be. ``ends_with_done``: or OpenAI's end marker.
    FastAPI's own type for this holds ``Any``.
    """
    options: list[dict[str, Any]] = [{"const": "[DONE]"}] if ends_with_done else []
    options += [
        {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": _self_contained(payload),
        }
        for payload in payloads
    ]
    event = {
        "type": "object",
        "properties": {"data": {"anyOf": options}, "event": {"type": "string"}},
        "required": ["data"],
    }
    return {200: {"content": {"text/event-stream": {"schema": event}}}}


def _self_contained(payload: type[BaseModel]) -> Any:
    """Its JSON schema, with definitions in their places: references would lead out of it."""
    schema = payload.model_json_schema(mode="serialization")
    return _inlined(schema, schema.pop("$defs", {}))


def _inlined(value: Any, definitions: Mapping[str, Any]) -> Any:
    match value:
        case {"$ref": str(reference)}:
            return _inlined(definitions[reference.rpartition("/")[2]], definitions)
        case {"oneOf": list(options), "discriminator": dict()}:  # whose mapping leads out of it too
            return {"oneOf": _inlined(options, definitions)}
        case dict():
            return {key: _inlined(inner, definitions) for key, inner in value.items()}
        case list():
            return [_inlined(inner, definitions) for inner in value]
        case _:
            return value
