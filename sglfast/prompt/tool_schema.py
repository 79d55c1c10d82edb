"""Type names in the JSON schema of a tool -> the names of the JSON Schema standard, as SGLang rewrites them.

Runs in: shard, simulator, load generator.

Contract: `standard_types` returns what SGLang 0.5.23 puts in place of a schema before the template prints it
    (srt/function_call/utils.py); a schema that needs no change is returned itself, nothing is ever changed in place.

Why: clients write Python's or a database's type names ("dict", "int", "varchar(20)"). The engine's prompt has the standard
    ones, so without this a tool written that way costs all overlap after the system message.
"""

from typing import Any

STANDARD = frozenset({"null", "boolean", "object", "array", "number", "string", "integer"})
# Names that are taken whole.
ALIASES = {
    **dict.fromkeys(("str", "text", "varchar", "char", "enum", "uuid"), "string"),
    **dict.fromkeys(("date", "datetime", "time", "timestamp"), "string"),
    **dict.fromkeys(("binary", "varbinary", "blob", "bytea", "bytes"), "string"),
    **dict.fromkeys(("bigint", "smallint", "tinyint"), "integer"),
    **dict.fromkeys(("double", "decimal", "real", "numeric"), "number"),
    **dict.fromkeys(("arr", "tuple", "set"), "array"),
    "bool": "boolean",
    "map": "object",
}
# Names that may go on with one of BOUNDARIES: int32, list[str], dict (of any).
STEMS = {
    **dict.fromkeys(("int", "uint", "long", "short", "unsigned"), "integer"),
    **dict.fromkeys(("num", "float"), "number"),
    "list": "array",
    "dict": "object",
}
BOUNDARIES = frozenset("0123456789[<( \t")
# Where a schema holds schemas: as values of an object, as items of an array, or one itself.
NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
LISTED = frozenset({"anyOf", "oneOf", "allOf", "prefixItems"})
SINGLE = frozenset(
    {
        *("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames"),
        *("unevaluatedItems", "unevaluatedProperties"),
    }
)


def standard_types(schema: Any) -> Any:
    """Return `schema` with every `type` inside it named as the standard names it.

    Raises RecursionError for a schema that is nested deeper than Python's stack; the engine refuses that one too.
    """
    if isinstance(schema, list):
        return [standard_types(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: _standard_value(key, value) for key, value in schema.items()}


def _standard_value(key: str, value: Any) -> Any:
    if key == "type":
        if isinstance(value, str):
            return _standard_name(value)
        if isinstance(value, list):
            names: list[Any] = []
            for item in value:
                name = _standard_name(item) if isinstance(item, str) else item
                if name not in names:
                    names.append(name)
            return names
    elif key in NAMED and isinstance(value, dict):
        return {name: standard_types(inner) for name, inner in value.items()}
    elif key in SINGLE or (key in LISTED and isinstance(value, list)):
        return standard_types(value)
    return value


def _standard_name(name: str) -> str:
    """Return the standard's word for a type name, the name itself when it is unknown; "varchar(20)" counts as varchar."""
    if name in STANDARD:
        return name
    base = name.split("(", 1)[0].strip().lower()
    if base in STANDARD:
        return base
    if base in ALIASES:
        return ALIASES[base]
    for stem, standard in STEMS.items():
        if base.startswith(stem) and (len(base) == len(stem) or base[len(stem)] in BOUNDARIES):
            return standard
    return name
