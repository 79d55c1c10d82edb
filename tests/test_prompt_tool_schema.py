"""sglfast.prompt.tool_schema: type names as SGLang rewrites them (more cases in the golden file of test_prompt_chat.py)."""

import copy
from typing import Any

import pytest

from sglfast.prompt.tool_schema import STANDARD, standard_types


@pytest.mark.parametrize(
    ("name", "want"),
    [
        *((name, name) for name in sorted(STANDARD)),
        ("dict", "object"),
        ("Dict[str, int]", "object"),
        ("list[str]", "array"),
        ("tuple", "array"),
        ("int", "integer"),
        ("INT64", "integer"),
        ("unsigned int", "integer"),
        ("float", "number"),
        ("decimal(10,2)", "number"),
        ("VARCHAR(255)", "string"),
        (" String ", "string"),
        ("bool", "boolean"),
        # A stem must end at a boundary, and what nobody knows stays.
        ("internal", "internal"),
        ("list_price", "list_price"),
        ("number_of_legs", "number_of_legs"),
        ("Any", "Any"),
        ("", ""),
    ],
)
def test_names(name: str, want: str) -> None:
    assert standard_types({"type": name}) == {"type": want}


def test_lists_of_names_lose_doubles() -> None:
    assert standard_types({"type": ["str", "string", None, "text", "null"]}) == {"type": ["string", None, "null"]}


def test_only_where_a_schema_holds_schemas() -> None:
    schema = {
        "type": "dict",
        "properties": {"type": {"type": "int"}, "b": {"items": {"type": "str"}, "enum": ["dict"]}},
        "anyOf": [{"type": "float"}],
        "additionalProperties": {"type": "bool"},
        "default": {"type": "int"},
        "examples": [{"type": "int"}],
    }
    before = copy.deepcopy(schema)
    assert standard_types(schema) == {
        "type": "object",
        "properties": {"type": {"type": "integer"}, "b": {"items": {"type": "string"}, "enum": ["dict"]}},
        "anyOf": [{"type": "number"}],
        "additionalProperties": {"type": "boolean"},
        "default": {"type": "int"},
        "examples": [{"type": "int"}],
    }
    assert schema == before
    assert list(standard_types(schema)) == list(schema), "the order of keys is part of the prompt"


@pytest.mark.parametrize("schema", [None, 5, "dict", True, [], {}, {"type": 5}, {"properties": 5, "anyOf": {"type": "int"}}])
def test_no_schema_at_all(schema: Any) -> None:
    assert standard_types(schema) == schema


def test_too_deep() -> None:
    schema: dict[str, Any] = {}
    for _ in range(100_000):
        schema = {"items": schema}
    with pytest.raises(RecursionError):
        standard_types(schema)
