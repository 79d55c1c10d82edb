"""What the fields of ServeConfig mean for those who read or print them: names, types, conversion of text.

Runs in: control, at start and at SIGHUP. Contract: every way in (flag, environment, file) converts with the same rules, so a
    value that one takes the others take too.
"""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sglfast.config.settings import ServeConfig
from sglfast.errors import ConfigError

_WORDS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@dataclass(frozen=True, slots=True)
class Field:
    """One setting. kind: type of the value, or of each of them when `is_list`; is_optional: None means "not set"."""

    name: str
    kind: type
    is_list: bool
    is_optional: bool
    default: Any
    meta: Mapping[str, Any]

    @property
    def flag(self) -> str:
        """`--a-b` of field `a_b`."""
        return flag_of(self.name)

    @property
    def names(self) -> tuple[str, ...]:
        """The field's name and its other names."""
        return (self.name, *self.meta.get("also", ()))


def flag_of(name: str) -> str:
    """`--a-b` of `a_b`."""
    return "--" + name.replace("_", "-")


def _field_of(field: dataclasses.Field[Any], hint: Any) -> Field:
    is_optional = isinstance(hint, types.UnionType)
    kind = next(part for part in typing.get_args(hint) if part is not types.NoneType) if is_optional else hint
    is_list = typing.get_origin(kind) is tuple
    if is_list:
        kind = typing.get_args(kind)[0]
    return Field(field.name, kind, is_list, is_optional, field.default, field.metadata)


_HINTS = typing.get_type_hints(ServeConfig)
FIELDS: dict[str, Field] = {field.name: _field_of(field, _HINTS[field.name]) for field in dataclasses.fields(ServeConfig)}
BY_ANY_NAME: dict[str, Field] = {name: field for field in FIELDS.values() for name in field.names}


def from_text(field: Field, text: str, where: str) -> Any:
    """The value that a flag's or a variable's text means. where: what the message names. Raises ConfigError."""
    if field.is_list:
        parts = re.split(field.meta.get("split", r"[,\s]+"), text)
        return tuple(_one(field, part.strip(), where) for part in parts if part.strip())
    return _one(field, text, where)


def from_words(field: Field, occurrences: Sequence[Sequence[str]], where: str) -> Any:
    """The value of a flag that was given these words, each time that it was given. Raises ConfigError."""
    if "repeats" not in field.meta:
        words = occurrences[-1]
        return tuple(_one(field, text, where) for text in words) if field.is_list else from_text(field, words[0], where)
    if field.meta["repeats"] == "line":
        return tuple(_one(field, " ".join(words), where) for words in occurrences)
    return tuple(_one(field, text, where) for words in occurrences for text in words)


def _one(field: Field, text: str, where: str) -> Any:
    shown = "" if "secret" in field.meta else f" {text}"
    if field.kind is bool:
        return is_true(text, where)
    if field.kind is str:
        return _spelled(field, text)
    try:
        return field.kind(text)
    except ValueError:
        raise ConfigError(f"{where}{shown}: must be {_KINDS[field.kind]}") from None


def is_true(text: str, where: str) -> bool:
    """What the text of a switch means. Raises ConfigError."""
    if text.lower() not in _WORDS:
        raise ConfigError(f"{where} {text}: must be {_KINDS[bool]}")
    return _WORDS[text.lower()]


def _spelled(field: Field, value: Any) -> Any:
    return field.meta.get("same_as", {}).get(value, value)


def from_file(field: Field, value: Any, where: str) -> Any:
    """The value that a parsed YAML or TOML value means: of its own type, not text that looks like it. Raises ConfigError."""
    if value is None and field.is_optional:
        return None
    if field.is_list:
        if not isinstance(value, list):
            raise ConfigError(f"{where}: must be a list of {_KINDS[field.kind]}, is {_shown(field, value)}")
        return tuple(_own_type(field, item, where) for item in value)
    return _own_type(field, value, where)


def _own_type(field: Field, value: Any, where: str) -> Any:
    if field.kind is float and type(value) is int:
        value = float(value)
    if type(value) is not field.kind:
        raise ConfigError(f"{where}: must be {_KINDS[field.kind]}, is {_shown(field, value)}")
    return _spelled(field, value)


def _shown(field: Field, value: Any) -> str:
    if "secret" in field.meta:
        return "of another type"
    return "empty" if value is None else f"{str(value)[:80]!r} ({type(value).__name__})"


def check_limits(field: Field, value: Any) -> None:
    """Refuse a value outside the field's limits. Raises ConfigError."""
    if value is None and field.is_optional:
        return
    meta = field.meta
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{field.flag} {value}: must be a finite number")
    if "low" in meta and value < meta["low"]:
        raise ConfigError(f"{field.flag} {value}: must be at least {meta['low']}")
    if "low" in meta and value > (high := meta.get("high", (1 << 63) - 1)):
        raise ConfigError(f"{field.flag} {value}: must be at most {high}")
    if "choices" in meta and value not in meta["choices"]:
        raise ConfigError(f"{field.flag} {value}: must be one of {', '.join(meta['choices'])}")
