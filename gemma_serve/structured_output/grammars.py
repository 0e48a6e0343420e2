"""From an output constraint to llguidance's grammar."""

import json
from typing import Final

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import any_to_lark

from gemma_serve.errors import OutputConstraintError
from gemma_serve.generation import OutputConstraint
from gemma_serve.structured_output.json_schemas import parse_schema, place_of_error, schema_grammar

MAX_CONSTRAINT_CHARS: Final = 262_144
"""Of a schema, pattern, grammar or list of choices. Compiled in about a second at worst."""

_MAX_ERROR_CHARS: Final = 300


def grammar_of(constraint: OutputConstraint) -> str:
    """Raises ``OutputConstraintError`` for what is malformed at first sight."""
    if len(constraint.value) > MAX_CONSTRAINT_CHARS:
        raise OutputConstraintError(
            f"The format has {len(constraint.value)} characters; {MAX_CONSTRAINT_CHARS} are allowed"
        )
    match constraint.kind:
        case "json_schema":
            return schema_grammar(parse_schema(constraint.value))
        case "json_object":
            return schema_grammar({"type": "object"})
        case "regex":
            return LLMatcher.grammar_from_regex(constraint.value)
        case "choice":
            return LLMatcher.grammar_from_lark(_any_of(json.loads(constraint.value)))
        case "grammar":
            return LLMatcher.grammar_from_lark(_as_lark(constraint.value))


def refusal(constraint: OutputConstraint, reason: str) -> OutputConstraintError:
    """The error for a constraint that llguidance refused for ``reason``, with its place."""
    place = None
    if constraint.kind == "json_schema":
        place = place_of_error(parse_schema(constraint.value))
    reason = " ".join(reason.replace("<non-verbose/>", "").split())[:_MAX_ERROR_CHARS]
    return OutputConstraintError(
        f"The format cannot be enforced: {reason}", param=place, code="invalid_value"
    )


def _any_of(choices: list[str]) -> str:
    return "start: " + " | ".join(json.dumps(choice) for choice in choices)


def _as_lark(grammar: str) -> str:
    """Lark as it is, and GBNF (llama.cpp's notation) translated."""
    try:
        return any_to_lark(grammar)
    except RecursionError:
        raise OutputConstraintError("The grammar is nested too deeply") from None
    except Exception as error:  # The translator raises just that for some of its complaints.
        raise OutputConstraintError(f"The grammar cannot be read: {error}") from None
