"""Who may use the data plane: API keys, and whose they are.

Runs in: shards, event loop, only when keys are set. Contract: a key is compared by its SHA-256 digest, so the time a comparison takes
    says nothing of the key; nothing here keeps, logs or answers a key. What is administration is control's to judge (control/admin_keys).
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from sglfast.edge.header_lines import value_of

if TYPE_CHECKING:
    from sglfast._httphead import RequestHead
    from sglfast.config import ServeConfig

_SCHEME = b"bearer "


class Guard:
    """The keys of the settings: --api-key, --api-keys, --api-key-file."""

    def __init__(self, config: ServeConfig) -> None:
        self._tenants: dict[bytes, str] = {}
        if config.api_key is not None:
            self._tenants[_digest(config.api_key.encode())] = ""
        for entry in config.api_keys:
            name, _, key = entry.partition(":")
            self._tenants[_digest(key.encode())] = name

    def __bool__(self) -> bool:
        """Whether any key is needed."""
        return bool(self._tenants)

    def lets_in(self, head: RequestHead) -> bool:
        """Whether the request shows a key."""
        shown = value_of(head.kept, b"authorization")
        return shown is not None and shown[:7].lower() == _SCHEME and _digest(shown[7:].strip()) in self._tenants


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
