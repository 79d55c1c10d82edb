"""The settings as flags of a command line.

Runs in: control, at start. Contract: the parser only collects words; fields.py converts them, as it does for file and environment.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from sglfast.config.checks import check
from sglfast.config.fields import FIELDS, Field, flag_of, from_text, from_texts
from sglfast.config.settings import ServeConfig

_METAVARS = {int: "N", float: "X", str: "TEXT"}


class _Given(argparse.Action):
    """Keeps the flag as it was spelled beside its words."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: str | Sequence[Any] | None, option: str | None = None
    ) -> None:
        setattr(namespace, self.dest, (option, values))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add one flag for each setting, grouped as the fields say."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for field in FIELDS.values():
        name = field.meta["group"]
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        kwargs: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "metavar": _metavar(field), "action": _Given}
        if field.is_list:
            kwargs["nargs"] = "*"
        elif field.kind is bool:
            kwargs |= {"nargs": "?", "const": "true"}
        groups[name].add_argument(*(flag_of(name) for name in field.names), help=_help(field).replace("%", "%%"), **kwargs)


def _metavar(field: Field) -> str:
    if "choices" in field.meta:
        return "{" + ",".join(field.meta["choices"]) + "}"
    return field.meta.get("metavar") or ("true|false" if field.kind is bool else _METAVARS[field.kind])


def _help(field: Field) -> str:
    text: str = field.meta["help"]
    if field.default in (None, (), "") or field.kind is bool:
        return text
    return f"{text} (default: {' '.join(field.default) if field.is_list else field.default})"


def given(namespace: argparse.Namespace) -> dict[str, tuple[str, Any]]:
    """Field name -> (flag as spelled, value) of what a command line says. Raises ConfigError."""
    found: dict[str, tuple[str, Any]] = {}
    for name, field in FIELDS.items():
        spelled = getattr(namespace, name, None)
        if spelled is not None:
            flag, words = spelled
            value = from_texts(field, words, flag) if field.is_list else from_text(field, words, flag)
            found[name] = flag, value
    return found


def from_args(namespace: argparse.Namespace) -> ServeConfig:
    """The checked settings of a parsed command line. Raises ConfigError."""
    return check(ServeConfig(**{name: value for name, (_, value) in given(namespace).items()}))
