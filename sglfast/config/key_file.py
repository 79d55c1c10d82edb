"""A file of API keys: `NAME:KEY` a line, `#` begins a comment line.

Runs in: control, at start and at SIGHUP. Contract: a message tells the line, never what stands there.
"""

from sglfast.errors import ConfigError

_LIMIT_BYTES = 4 << 20


def read_key_file(path: str) -> tuple[str, ...]:
    """The entries `NAME:KEY`. Raises ConfigError."""
    try:
        with open(path, "rb") as file:
            data = file.read(_LIMIT_BYTES + 1)
        text = data.decode("ascii")
    except OSError as error:
        raise ConfigError(f"--api-key-file {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--api-key-file {path}: must be ASCII text") from None
    if len(data) > _LIMIT_BYTES:
        raise ConfigError(f"--api-key-file {path}: is larger than {_LIMIT_BYTES} bytes")
    entries = []
    for number, line in enumerate(text.splitlines(), 1):
        entry = line.strip()
        if entry and not entry.startswith("#"):
            name, colon, key = entry.partition(":")
            if not (name and colon and key):
                raise ConfigError(f"--api-key-file {path}: line {number} must look like NAME:KEY")
            entries.append(entry)
    return tuple(entries)
