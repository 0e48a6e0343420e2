"""The OpenAPI document as a page that needs nothing from elsewhere: no script, no font."""

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any, Final

Schema = Mapping[str, Any]  # parsed JSON

_STYLE: Final = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; width: 100% }
td, th { border-bottom: 1px solid #8884; padding: .3rem .6rem; text-align: left }
td { vertical-align: top }
code { font-size: .9em }
details { margin: .5rem 0 1.5rem }
:root { color-scheme: light dark }
"""


def reference_page(document: Schema) -> str:
    """``document``: an OpenAPI 3.1 document."""
    operations = "".join(
        _operation(method, path, operation, document)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    )
    title = escape(f"{document['info']['title']} {document['info']['version']}")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style><h1>{title}</h1>"
        f'<p>As an <a href="openapi.json">OpenAPI document</a>.</p>{operations}</html>'
    )


def _operation(method: str, path: str, operation: Schema, document: Schema) -> str:
    parts = [f"<h2><code>{method.upper()} {escape(path)}</code></h2>"]
    body = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if body is not None:
        parts.append(_details("Body", body["schema"], document))
    for status, response in operation["responses"].items():
        for media_type, content in response.get("content", {}).items():
            heading = f"{status}: {media_type}"
            parts.append(_details(heading, content.get("schema", {}), document))
    return "".join(parts)


def _details(heading: str, schema: Schema, document: Schema) -> str:
    resolved = _resolve(schema, document)
    rows = "".join(_rows(resolved))
    table = f"<table><tr><th>Field<th>Type<th>Meaning</tr>{rows}</table>" if rows else ""
    about = escape(resolved.get("description", ""))
    return f"<details><summary>{escape(heading)}</summary><p>{about}</p>{table}</details>"


def _rows(schema: Schema) -> Iterator[str]:
    required = schema.get("required", ())
    for name, field in schema.get("properties", {}).items():
        mark = "" if name not in required else " <b>required</b>"
        about = escape(field.get("description", ""))
        kind = escape(_type_of(field))
        yield f"<tr><td><code>{escape(name)}</code>{mark}<td>{kind}<td>{about}</tr>"


def _resolve(schema: Schema, document: Schema) -> Schema:
    """What a reference into the document stands for."""
    if "$ref" not in schema:
        return schema
    *_, name = schema["$ref"].split("/")
    found: Schema = document["components"]["schemas"].get(name, {})
    return found


def _type_of(schema: Schema) -> str:
    """A field's type in a few words."""
    match schema:
        case {"$ref": str(reference)}:
            return reference.rpartition("/")[2]
        case {"anyOf": list(options)} | {"oneOf": list(options)}:
            kinds = (_type_of(option) for option in options)
            return " or ".join(dict.fromkeys(kind for kind in kinds if kind != "null")) or "null"
        case {"const": value}:
            return repr(value)
        case {"enum": list(values)}:
            return ", ".join(map(repr, values))
        case {"type": "array", "items": items}:
            return f"list of {_type_of(items)}"
        case {"type": str(kind)}:
            return kind + _range_of(schema)
        case _:
            return "any"


def _range_of(schema: Schema) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is None and high is None:
        return ""
    return f" {'' if low is None else low}…{'' if high is None or high >= 2**53 else high}"
