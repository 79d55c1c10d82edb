"""`sglfast check-config`: what `sglfast serve` with the same flags, environment and file would run, and where each value comes from.

Runs in: a process of its own, which starts nothing and listens nowhere. Contract: exit code 0 and the settings on standard output, or 2 and
    why they cannot work on standard error. Secrets are never shown.
"""

import contextlib
import os
import sys
from typing import Any

from sglfast.config.fields import FIELDS, Field
from sglfast.config.flags import SettingsParser, given_in
from sglfast.config.sources import Loaded, load
from sglfast.errors import ConfigError
from sglfast.tls import server_context, worker_context


def main(argv: list[str]) -> int:
    """Print the settings; returns the exit code."""
    parser = SettingsParser("sglfast check-config", "Say what `sglfast serve` with these flags would run, without running it.")
    try:
        loaded = load(given_in(parser.parse_args(argv)))
        server_context(loaded.config)
        worker_context(loaded.config)
        if loaded.config.tokenizer_path is not None:
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
            from sglfast.prompt.tokenizer import load_tokenizer  # late: only then it is worth its time

            load_tokenizer(loaded.config.tokenizer_path, loaded.config.chat_template)
    except ConfigError as error:
        print(f"sglfast check-config: {error}", file=sys.stderr)
        return 2
    with contextlib.suppress(BrokenPipeError):
        print(table(loaded), flush=True)
    for note in loaded.notes:
        print(f"note: {note}", file=sys.stderr)
    return 0


def table(loaded: Loaded) -> str:
    """A line for each setting: flag, value, where it comes from."""
    rows = [(field.flag, shown(field, getattr(loaded.config, name)), loaded.origins[name]) for name, field in FIELDS.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{flag:<{widths[0]}}  {value:<{widths[1]}}  {origin}" for flag, value, origin in rows)


def shown(field: Field, value: Any) -> str:
    """A setting's value as it may be printed."""
    if value is None or value == ():
        return "-"
    if "secret" in field.meta:
        return " ".join("***" for _ in value) if field.is_list else "***"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.15g}"
    if field.is_list:
        return (", " if any(" " in item for item in value) else " ").join(value)
    return str(value)
