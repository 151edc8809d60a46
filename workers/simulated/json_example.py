"""A value that fits a JSON schema, chosen by a number: how the simulated model obeys a grammar."""

from collections.abc import Mapping
from typing import Any

import xxhash

WORDS = ("herd", "cattle", "pasture", "meadow", "fence", "gate", "barn", "drover")

# Schemas may refer to themselves; below this depth only what is required is filled in.
MAX_DEPTH = 6


def example(schema: Mapping[str, Any], seed: int) -> Any:
    """The value; the same schema and seed give the same one. ValueError for a $ref that leads nowhere."""
    return _value(schema, schema, seed, 0)


def _value(schema: Any, root: Mapping[str, Any], seed: int, depth: int) -> Any:
    if not isinstance(schema, Mapping):  # true and {} allow anything
        return _word(seed)
    if "const" in schema:
        return schema["const"]
    if options := schema.get("enum"):
        return options[seed % len(options)]
    if "$ref" in schema:
        return _value(_resolve(schema["$ref"], root), root, seed, depth + 1)
    for several in ("anyOf", "oneOf", "allOf"):
        if branches := schema.get(several):
            return _value(branches[0 if depth < MAX_DEPTH else -1], root, seed, depth + 1)
    kind = schema.get("type") or ("object" if "properties" in schema else "string")
    if isinstance(kind, list):
        kind = kind[0]
    match kind:
        case "object":
            return _object(schema, root, seed, depth)
        case "array":
            return _array(schema, root, seed, depth)
        case "integer":
            return int(_number(schema, seed, 1))
        case "number":
            return _number(schema, seed, 0.5)
        case "boolean":
            return bool(seed & 1)
        case "null":
            return None
    return _string(schema, seed)


def _object(schema: Mapping[str, Any], root: Mapping[str, Any], seed: int, depth: int) -> dict[str, Any]:
    properties: Mapping[str, Any] = schema.get("properties") or {}
    required = schema.get("required") or ()
    names = [name for name in properties if name in required or depth < MAX_DEPTH]
    names += [name for name in required if name not in properties]
    return {name: _value(properties.get(name), root, _derive(seed, name), depth + 1) for name in names}


def _array(schema: Mapping[str, Any], root: Mapping[str, Any], seed: int, depth: int) -> list[Any]:
    fewest = schema.get("minItems", 0)
    count = max(fewest, min(1 + seed % 2, schema.get("maxItems", 2))) if depth < MAX_DEPTH else fewest
    return [_value(schema.get("items"), root, _derive(seed, str(n)), depth + 1) for n in range(count)]


def _number(schema: Mapping[str, Any], seed: int, unit: float) -> float:
    """A multiple near the lower bound, or near the upper one where that is the only bound."""
    step = schema.get("multipleOf", unit)
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is None and (exclusive := schema.get("exclusiveMinimum")) is not None:
        low = exclusive + step
    if high is None and (exclusive := schema.get("exclusiveMaximum")) is not None:
        high = exclusive - step
    if low is None:
        low = 0 if high is None or high >= 0 else high - 10 * step
    if "multipleOf" in schema:
        low = -(-low // step) * step
    room = 100 if high is None else int((high - low) / step)
    chosen: float = low + seed % (max(room, 0) + 1) * step
    return chosen


def _string(schema: Mapping[str, Any], seed: int) -> str:
    shortest, longest = schema.get("minLength", 0), schema.get("maxLength")
    text = FORMATS.get(schema.get("format", ""), "") or _word(seed)
    while len(text) < shortest:
        text += " " + _word(_derive(seed, text))
    return text if longest is None else text[:longest]


FORMATS = {
    "date": "2026-01-31",
    "date-time": "2026-01-31T12:00:00Z",
    "time": "12:00:00Z",
    "email": "drover@example.com",
    "uri": "https://example.com/herd",
    "uuid": "00000000-0000-4000-8000-000000000000",
}


def _word(seed: int) -> str:
    return WORDS[seed % len(WORDS)]


def _derive(seed: int, name: str) -> int:
    return xxhash.xxh3_64_intdigest(name.encode(), seed=seed)


def _resolve(reference: str, root: Mapping[str, Any]) -> Any:
    target: Any = root
    for part in reference.removeprefix("#").strip("/").split("/") if reference != "#" else ():
        if not isinstance(target, Mapping) or part not in target:
            raise ValueError(f"the schema refers to {reference}, which it does not hold")
        target = target[part]
    return target
