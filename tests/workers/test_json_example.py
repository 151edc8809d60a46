"""Values that fit a JSON schema."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.simulated.json_example import example

NODE = {
    "type": "object",
    "properties": {
        "value": {"type": "integer"},
        "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
    },
    "required": ["value", "next"],
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "enum": {"enum": ["a", 2, None]},
    "const": {"const": {"a": 1}},
    "integer in a range": {"type": "integer", "minimum": 3, "maximum": 5},
    "integer below": {"type": "integer", "exclusiveMaximum": -4},
    "integer above": {"type": "integer", "exclusiveMinimum": 10},
    "a multiple": {"type": "integer", "multipleOf": 7, "minimum": 10, "maximum": 30},
    "number": {"type": "number", "minimum": 0, "maximum": 1},
    "short string": {"type": "string", "maxLength": 2},
    "long string": {"type": "string", "minLength": 40, "maxLength": 41},
    "date": {"type": "string", "format": "date"},
    "array": {"type": "array", "items": {"type": "boolean"}, "minItems": 3},
    "few": {"type": "array", "items": {"type": "null"}, "maxItems": 1},
    "nullable": {"type": ["string", "null"]},
    "one of": {"oneOf": [{"type": "integer"}, {"type": "string"}]},
    "free object": {"type": "object"},
    "recursive": {"$defs": {"node": NODE}, "$ref": "#/$defs/node"},
    "nested": {
        "type": "object",
        "properties": {"town": {"type": "object", "properties": {"name": {"type": "string"}}}},
        "required": ["town", "extra"],
    },
}


@pytest.mark.parametrize("name", SCHEMAS)
@given(seed=st.integers(0, 2**64 - 1))
def test_fits_the_schema(name: str, seed: int) -> None:
    value = example(SCHEMAS[name], seed)
    jsonschema.validate(value, SCHEMAS[name])
    assert example(SCHEMAS[name], seed) == value


def test_a_reference_to_nowhere_is_an_error() -> None:
    with pytest.raises(ValueError, match="refers to #/nope"):
        example({"$ref": "#/nope"}, 0)
