"""A file of API keys: `NAME:KEY` a line, `#` begins a comment line.

Runs in: control, at start and at SIGHUP. Contract: a message tells the line, never what stands there.
"""

from sglfast.config.text_file import read_text
from sglfast.errors import ConfigError

_LIMIT_BYTES = 4 << 20


def read_key_file(path: str) -> tuple[str, ...]:
    """The entries `NAME:KEY`. Raises ConfigError."""
    text = read_text("--api-key-file", path, _LIMIT_BYTES, "ASCII")
    entries = []
    for number, line in enumerate(text.splitlines(), 1):
        entry = line.strip()
        if entry and not entry.startswith("#"):
            name, colon, key = entry.partition(":")
            if not (name and colon and key):
                raise ConfigError(f"--api-key-file {path}: line {number} must look like NAME:KEY")
            entries.append(entry)
    return tuple(entries)
