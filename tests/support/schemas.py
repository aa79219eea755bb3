"""JSON schemas that hypothesis makes, and what a test needs to run over many of them."""

from typing import Any, TypeVar

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

T = TypeVar("T")

NAMES = st.sampled_from(["a", "b", "name", "größe", 'in "quotes"', "back\\slash", "x y", "$ref"])
PATTERNS = st.sampled_from(["^[a-c]{2,4}$", "^\\d+$", "x", "^(yes|no)\\.$", '^[^"]*é$'])
FORMATS = st.sampled_from(["date-time", "time", "date", "duration", "email", "ipv4", "ipv6", "uuid"])


def ordered(low: str, high: str, values: st.SearchStrategy) -> st.SearchStrategy[dict[str, Any]]:
    """Two bounds in their order, or one of them, or none."""
    pairs = st.tuples(values, values).map(sorted)
    both = pairs.map(lambda pair: {low: pair[0], high: pair[1]})
    return st.one_of(st.just({}), both, pairs.map(lambda pair: {low: pair[0]}), pairs.map(lambda pair: {high: pair[1]}))


def merged(*parts: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.tuples(*parts).map(lambda found: {key: value for part in found for key, value in part.items()})


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-999, 999), st.text('ab"\\\né😀', max_size=4))
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=2), st.dictionaries(NAMES, SCALARS, max_size=2))
LEAVES = st.one_of(
    st.sampled_from([{"type": "null"}, {"type": "boolean"}, {"type": ["string", "null"]}]),
    merged(st.just({"type": "integer"}), ordered("minimum", "maximum", st.integers(-200, 2000))),
    merged(st.just({"type": "integer"}), st.sampled_from([{"multipleOf": 7}, {"exclusiveMinimum": 3}, {}])),
    merged(st.just({"type": "number"}), ordered("minimum", "maximum", st.sampled_from([-2.5, 0, 0.25, 3.75, 40]))),
    merged(st.just({"type": "string"}), ordered("minLength", "maxLength", st.integers(0, 12))),
    PATTERNS.map(lambda pattern: {"type": "string", "pattern": pattern}),
    FORMATS.map(lambda name: {"type": "string", "format": name}),
    VALUES.map(lambda value: {"const": value}),
    st.lists(VALUES, min_size=1, max_size=4).map(lambda values: {"enum": values}),
)


def arrays(schemas: st.SearchStrategy) -> st.SearchStrategy[dict[str, Any]]:
    plain = merged(schemas.map(lambda items: {"type": "array", "items": items}), st.just({"maxItems": 3}))
    bounded = merged(plain, st.integers(0, 2).map(lambda least: {"minItems": least}))
    prefixed = st.lists(schemas, min_size=1, max_size=3).map(
        lambda parts: {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}
    )
    return st.one_of(bounded, prefixed)


def objects(schemas: st.SearchStrategy) -> st.SearchStrategy[dict[str, Any]]:
    def finished(parts: tuple[dict[str, Any], list[bool], Any]) -> dict[str, Any]:
        properties, flags, additional = parts
        required = [name for name, flag in zip(properties, flags, strict=False) if flag]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": additional}

    others = st.sampled_from([False, False, {"type": "integer", "maximum": 9, "minimum": 0}])
    flags = st.lists(st.booleans(), min_size=4, max_size=4)
    plain = st.tuples(st.dictionaries(NAMES, schemas, max_size=4), flags, others).map(finished)
    patterned = schemas.map(
        lambda schema: {
            "type": "object",
            "patternProperties": {"^x_[a-c]{1,3}$": schema},
            "additionalProperties": False,
        }
    )
    return st.one_of(plain, plain, patterned)


def combined(schemas: st.SearchStrategy) -> st.SearchStrategy[dict[str, Any]]:
    either = st.lists(schemas, min_size=1, max_size=3).map(lambda several: {"anyOf": several})
    return st.one_of(arrays(schemas), objects(schemas), either)


def with_references(schema: dict[str, Any]) -> dict[str, Any]:
    """A list of what the schema describes, which may hold such lists."""
    items = {"anyOf": [schema, {"$ref": "#/$defs/list"}]}
    return {"$ref": "#/$defs/list", "$defs": {"list": {"type": "array", "items": items, "maxItems": 2}}}


TREES = st.recursive(LEAVES, combined, max_leaves=6)
SCHEMAS = st.one_of(TREES, objects(TREES), TREES.map(with_references))


def drawn(strategy: st.SearchStrategy[T], number: int) -> list[T]:
    """So many examples, always the same ones."""
    found: list[T] = []
    given_number = settings(
        max_examples=number, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    given_number(given(strategy)(lambda example: found.append(example)))()
    return found[:number]
