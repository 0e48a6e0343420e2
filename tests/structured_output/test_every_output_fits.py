"""Whatever the model prefers: what a constrained sequence finishes fits its schema."""

import asyncio
import json

import jsonschema
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma_serve.engine.sampling.sampler import Sampler
from gemma_serve.engine.sampling_state import SamplingState
from gemma_serve.generation import OutputConstraint, SamplingParams
from tests.structured_output.vocabularies import (
    END_OF_TURN,
    EOS,
    TOKEN_BYTES,
    make_compiler,
    text_of,
)

COMPILER = make_compiler()
SAMPLER = Sampler(vocab_size=len(TOKEN_BYTES), forbidden_token_ids=[], device=torch.device("cpu"))
MAX_TOKENS = 400
FAVOURITES = tuple(b'"}]0123,:e')
"""Preferred a little, or random texts would rarely end."""

NAMES = st.sampled_from(["a", "b", "name", "é", "x y", 'q"'])
STRINGS = st.one_of(
    st.fixed_dictionaries({"type": st.just("string")}, optional={"maxLength": st.integers(2, 9)}),
    st.fixed_dictionaries({"type": st.just("string"), "minLength": st.integers(0, 4)}),
    st.builds(
        lambda pattern: {"type": "string", "pattern": pattern},
        st.sampled_from(["^[a-c]+$", "^\\d{2,4}$", "x", "^(ab|cd)*$"]),
    ),
    st.builds(
        lambda name: {"type": "string", "format": name},
        st.sampled_from(["date", "ipv4", "uuid", "no-such-format"]),
    ),
)
NUMBERS = st.one_of(
    st.builds(
        lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size},
        st.integers(-50, 50),
        st.integers(0, 500),
    ),
    st.builds(lambda low: {"type": "number", "exclusiveMinimum": low}, st.integers(-5, 5)),
    st.just({"type": "integer", "multipleOf": 3}),
)
CHOICES = st.one_of(
    st.builds(
        lambda values: {"enum": values},
        st.lists(
            st.one_of(NAMES, st.integers(-9, 9), st.none(), st.booleans()), min_size=1, max_size=4
        ),
    ),
    st.builds(lambda value: {"const": value}, st.one_of(NAMES, st.just({"k": [1, "z"]}))),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["integer", "null"]}]),
)


def arrays(items: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    return st.builds(
        lambda items, low, more: {
            "type": "array",
            "items": items,
            "minItems": low,
            "maxItems": low + more,
        },
        items,
        st.integers(0, 2),
        st.integers(0, 2),
    )


def objects(values: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    return st.builds(
        lambda properties, is_open: {
            "type": "object",
            "properties": properties,
            "required": sorted(properties)[::2],
            "additionalProperties": is_open and {"type": "null"},
        },
        st.dictionaries(NAMES, values, max_size=4),
        st.booleans(),
    )


SCHEMAS = st.recursive(
    st.one_of(STRINGS, NUMBERS, CHOICES),
    lambda inner: st.one_of(
        arrays(inner),
        objects(inner),
        objects(inner),
        st.builds(lambda one, other: {"anyOf": [one, other]}, inner, inner),
    ),
    max_leaves=8,
)
TREE = {
    "$ref": "#/$defs/tree",
    "$defs": {
        "tree": {
            "type": "object",
            "properties": {
                "value": {"type": "integer", "minimum": 0, "maximum": 9},
                "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2},
            },
            "required": ["value"],
            "additionalProperties": False,
        }
    },
}


def generate(wanted: OutputConstraint, seed: int) -> str | None:
    """A text of random logits; ``None`` if it is not complete after ``MAX_TOKENS``."""
    (constraint,) = asyncio.run(COMPILER.constraints(wanted, 1))
    state = SamplingState(SamplingParams(), seed=seed, prompt_token_ids=(), constraint=constraint)
    logits = torch.randn(
        MAX_TOKENS, len(TOKEN_BYTES), generator=torch.Generator().manual_seed(seed)
    )
    logits[:, FAVOURITES] += 3
    token_ids: list[int] = []
    for row in logits:
        (sampled,) = SAMPLER.sample(row[None], [state])
        assert sampled.token_id is not None
        state.append(sampled.token_id)
        if sampled.token_id in (EOS, END_OF_TURN):
            return text_of(token_ids)
        token_ids.append(sampled.token_id)
        if state.is_over:
            return text_of(token_ids)
    return None


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
@given(schema=SCHEMAS, seed=st.integers(0, 2**32))
def test_every_finished_text_fits_its_schema(schema: object, seed: int) -> None:
    text = generate(OutputConstraint(kind="json_schema", value=json.dumps(schema)), seed)
    if text is not None:
        jsonschema.validate(json.loads(text), schema)


def test_recursive_schemas_are_followed_down() -> None:
    wanted = OutputConstraint(kind="json_schema", value=json.dumps(TREE))
    texts = [text for seed in range(20) if (text := generate(wanted, seed)) is not None]
    for text in texts:
        jsonschema.validate(json.loads(text), TREE)
    assert any("children" in text for text in texts)


def test_json_object_is_an_object_whatever_is_in_it() -> None:
    wanted = OutputConstraint(kind="json_object", value="")
    texts = [text for seed in range(20) if (text := generate(wanted, seed)) is not None]
    assert texts
    assert all(isinstance(json.loads(text), dict) for text in texts)
