"""Files that settings name and that control reads as text, of a size that it can bear.

Runs in: control, at start and at SIGHUP. Contract: a message names the flag and the file, never what stands there.
"""

from sglfast.errors import ConfigError


def read_text(flag: str, path: str, limit_bytes: int, encoding: str = "UTF-8") -> str:
    """The whole file `path`, which `flag` names. Raises ConfigError: unreadable, larger than `limit_bytes`, or in another encoding."""
    try:
        with open(path, "rb") as file:
            data = file.read(limit_bytes + 1)
        if len(data) > limit_bytes:
            raise ConfigError(f"{flag} {path}: is larger than {limit_bytes} bytes")
        return data.decode(encoding)
    except OSError as error:
        raise ConfigError(f"{flag} {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{flag} {path}: must be {encoding} text") from None
