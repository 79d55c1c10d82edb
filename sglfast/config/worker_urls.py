"""The workers that settings name: their URLs, and what each of them is there for.

Runs in: control, at start, at SIGHUP and for each URL that administration is given. Contract: a text that means a worker is kept in one
    form, so that two spellings of it are equal; a refusal names the flag and what would be right.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from sglfast.errors import ConfigError

_NO_PORT = "none"


@dataclass(frozen=True, slots=True)
class NamedWorker:
    """A worker as a flag names it. bootstrap_port: of a prefill worker, None = none; is_port_known: None was said, not left open."""

    url: str
    role: Literal["regular", "prefill", "decode"] = "regular"
    bootstrap_port: int | None = None
    is_port_known: bool = False


def named_workers(worker_urls: Sequence[str], prefill: Sequence[str], decode: Sequence[str]) -> tuple[NamedWorker, ...]:
    """The workers of --worker-urls, --prefill and --decode. Raises ConfigError."""
    return (
        *(NamedWorker(worker_url(text)) for text in worker_urls),
        *(read_prefill(text) for text in prefill),
        *(NamedWorker(worker_url(text, "--decode"), "decode") for text in decode),
    )


def read_prefill(text: str) -> NamedWorker:
    """The worker that `URL`, `URL PORT` or `URL none` means. Raises ConfigError."""
    words = text.split()
    if not 1 <= len(words) <= 2:
        raise ConfigError(f"--prefill {text}: takes a URL and at most one port; give --prefill once for each worker")
    url = worker_url(words[0], "--prefill")
    if len(words) == 1:
        return NamedWorker(url, "prefill")
    if words[1].lower() == _NO_PORT:
        return NamedWorker(url, "prefill", is_port_known=True)
    if not (words[1].isascii() and words[1].isdecimal() and 0 < int(words[1]) < 65536):
        raise ConfigError(f"--prefill {text}: the bootstrap port must be a number from 1 to 65535, or none")
    return NamedWorker(url, "prefill", int(words[1]), is_port_known=True)


def prefill_text(worker: NamedWorker) -> str:
    """What `read_prefill` reads as this worker."""
    if not worker.is_port_known:
        return worker.url
    return f"{worker.url} {worker.bootstrap_port or _NO_PORT}"


def worker_url(text: str, name: str = "--worker-urls") -> str:
    """A worker's URL as it is kept: scheme, host and port, lower case. name: what the message names. Raises ConfigError."""
    text = text.strip().rstrip("/")
    if text.count("://") > 1:
        raise ConfigError(f"{name} {text}: is more than one URL; give each as a word of its own, with a blank between them")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        reason = "the port must be a number" if "cast to integer" in str(error) else error
        raise ConfigError(f"{name} {text}: {reason}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{name} {text}: must look like http://host:port or https://host:port")
    if port == 0:
        raise ConfigError(f"{name} {text}: port 0 is no port that a worker can listen on")
    # Also what is empty: `http://host?`, `http://@host`, `http://host:`; and blanks and control characters.
    if text.partition("://")[2] != parts.netloc or not set(parts.netloc).isdisjoint("@ ") or parts.netloc.endswith(":"):
        raise ConfigError(f"{name} {text}: give only scheme, host and port, such as {parts.scheme}://{parts.hostname}:{port or 80}")
    return f"{parts.scheme}://{parts.netloc.lower()}"
