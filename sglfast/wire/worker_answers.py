"""What a worker answers to questions that are passed on to all of them: its load, and `/server_info` without its secrets.

Runs in: control. No I/O. Source: spec/kv_events.md 3 (`/v1/loads` of sglang 0.5.8 and later; `/get_load` before), spec/gateway.md 1.2.
"""

import re
from typing import Any

import msgspec

from sglfast.errors import WorkerInfoError

HIDDEN = "***"
_SECRET_NAME = re.compile(
    r"api[_-]?key|passw|secret|credential|authorization|private_?key|launch_command|(^|_)(auth|access|bearer|hf)_?token$", re.IGNORECASE
)
_SHORTEST_SECRET = 4  # shorter ones would be found everywhere


def parse_loads(body: bytes) -> int:
    """Tokens that a worker has and waits to have, over all its ranks, from `/v1/loads` or the older `/get_load`. Raises WorkerInfoError."""
    try:
        found = msgspec.json.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise WorkerInfoError("the worker's loads are no JSON") from None
    rows, name = (found.get("loads"), "num_total_tokens") if isinstance(found, dict) else (found, "num_tokens")
    if not isinstance(rows, list) or not rows:
        raise WorkerInfoError("the worker's loads have no ranks")
    tokens = [row.get(name) if isinstance(row, dict) else None for row in rows]
    if not all(type(count) is int and count >= 0 for count in tokens):
        raise WorkerInfoError(f"a rank of the worker's loads has no {name}")
    return sum(tokens)  # type: ignore[arg-type]


def without_secrets(body: bytes) -> bytes:
    """A JSON object with every secret in it replaced by ***, also where it stands in another text. Raises WorkerInfoError.

    Engines put their keys, their key file's password and their whole command line into `/server_info`.
    """
    try:
        found = msgspec.json.decode(body, type=dict[str, Any])
        secrets: set[str] = set()
        _collect(found, secrets)
        # The longest first: one may be a part of another.
        return msgspec.json.encode(_cleaned(found, sorted(secrets, key=len, reverse=True)))
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise WorkerInfoError("the worker's answer is no JSON object") from None


def _collect(value: Any, secrets: set[str]) -> None:
    if isinstance(value, dict):
        for name, inner in value.items():
            if isinstance(inner, str) and _SECRET_NAME.search(name) and len(inner) >= _SHORTEST_SECRET:
                secrets.add(inner)
            _collect(inner, secrets)
    elif isinstance(value, list):
        for inner in value:
            _collect(inner, secrets)


def _cleaned(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, dict):
        return {
            name: HIDDEN if inner not in (None, "") and _SECRET_NAME.search(name) else _cleaned(inner, secrets)
            for name, inner in value.items()
        }
    if isinstance(value, list):
        return [_cleaned(inner, secrets) for inner in value]
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, HIDDEN)
    return value
