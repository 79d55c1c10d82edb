"""The settings as flags of a command line.

Runs in: control, at start. Contract: the parser only collects words; sources.py gives them their meaning, as it does for file and
    environment. Flags of sglang-router that are no settings take the words that they take there.
"""

import argparse
import difflib
import shutil
from collections.abc import Sequence
from typing import Any, NoReturn

from sglfast.config.fields import FIELDS, Field, flag_of
from sglfast.config.sglang_router import FOREIGN, Foreign

# Setting, or name of a flag of sglang-router, or "config" -> (flag as spelled, its words) each time it is given.
Given = dict[str, list[tuple[str, list[str]]]]

_METAVARS = {int: "N", float: "X", str: "TEXT"}


class _Collect(argparse.Action):
    """Keeps every occurrence: the flag as it was spelled, and its words."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: str | Sequence[Any] | None, option: str | None = None
    ) -> None:
        given: Given = vars(namespace).setdefault("given", {})
        words = [values] if isinstance(values, str) else list(values or [])
        given.setdefault(self.dest, []).append((option or flag_of(self.dest), words))


class SettingsParser(argparse.ArgumentParser):
    """A parser of all settings, for people: a hundred flags are read in the help, not in the usage line of every mistake."""

    def __init__(self, prog: str, description: str, epilog: str | None = None) -> None:
        super().__init__(
            prog=prog, description=description, epilog=epilog, usage=f"{prog} [--worker-urls URL ...] [flags]",
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
                prog, max_help_position=38, width=min(140, shutil.get_terminal_size().columns - 2)
            ),
        )  # fmt: skip
        add_flags(self)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """What the words mean; a word that means nothing ends the program, with the closest flag."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = next((word.partition("=")[0] for word in unknown if word.startswith("--")), None)
            if flag is None:
                self.error(f"{unknown[0]}: belongs to no flag")
            close = difflib.get_close_matches(flag, self._option_string_actions, n=1, cutoff=0.6)
            self.error(f"{flag}: there is no such flag" + (f"; the closest is {close[0]}" if close else ""))
        return found

    def error(self, message: str) -> NoReturn:
        """End the program with this message."""
        self.exit(2, f"{self.prog}: {message}\n`{self.prog} --help` lists the flags\n")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add one flag for each setting, grouped as the fields say. `given_in` has what was parsed."""
    parser.add_argument(
        "--config", dest="config", default=argparse.SUPPRESS, metavar="FILE", action=_Collect,
        help="file with settings, .yaml, .yml or .toml; flags and SGLFAST_* variables win over it",
    )  # fmt: skip
    groups: dict[str, argparse._ArgumentGroup] = {}
    for field in FIELDS.values():
        name = field.meta["group"]
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        kwargs: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "metavar": _metavar(field), "action": _Collect}
        if "repeats" in field.meta:
            kwargs["nargs"] = "+"  # none at all would be a list that adds nothing
        elif field.is_list:
            kwargs["nargs"] = "*"
        elif field.kind is bool:
            kwargs |= {"nargs": "?", "const": "true"}
        groups[name].add_argument(*(flag_of(name) for name in field.names), help=help_of(field).replace("%", "%%"), **kwargs)
    for foreign in FOREIGN.values():
        parser.add_argument(
            flag_of(foreign.name), dest=foreign.name, default=argparse.SUPPRESS, help=argparse.SUPPRESS, action=_Collect, **_nargs(foreign)
        )  # fmt: skip


def _nargs(foreign: Foreign) -> dict[str, Any]:
    if foreign.words == 0:
        return {"nargs": "?", "const": "true"}
    return {} if foreign.words == 1 else {"nargs": foreign.words}


def _metavar(field: Field) -> str:
    if "choices" in field.meta:
        return "{" + ",".join(field.meta["choices"]) + "}"
    metavar: str | None = field.meta.get("metavar")
    return metavar or ("true|false" if field.kind is bool else _METAVARS[field.kind])


def help_of(field: Field) -> str:
    """The help of a setting, its default included."""
    text: str = field.meta["help"]
    if field.default in (None, (), "") or field.kind is bool:
        return text
    return f"{text} (default: {' '.join(field.default) if field.is_list else field.default})"


def given_in(namespace: argparse.Namespace) -> Given:
    """What a command line says."""
    found: Given = vars(namespace).get("given", {})
    return found
