"""Which pages of other origins may call the router from a browser. Format: https://fetch.spec.whatwg.org/#http-cors-protocol.

Runs in: shards. Contract: an origin that is not listed gets answers without CORS lines, which the
    browser then keeps from the page. Workers never see `origin`, so they add no such lines of their own. A browser sends simple requests
    without asking, so administration is refused to pages that are not allowed, also where nothing is set: else any page that
    an operator visits could add workers to a router without keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglfast.edge.header_lines import value_of

if TYPE_CHECKING:
    from sglfast._httphead import RequestHead
    from sglfast.config import ServeConfig

_MAX_AGE_SECS = 3600
_EXPOSED = b"access-control-expose-headers: x-request-id, x-router-error-code, x-sglfast-kv, retry-after\r\n"


class Cors:
    """The origins of the settings."""

    def __init__(self, config: ServeConfig) -> None:
        self._origins = frozenset(origin.encode() for origin in config.cors_allowed_origins)

    def __bool__(self) -> bool:
        return bool(self._origins)

    def allows(self, origin: bytes) -> bool:
        """Whether pages of this origin may call."""
        return b"*" in self._origins or origin in self._origins

    def lines_for(self, head: RequestHead) -> bytes:
        """The lines of an answer to this request."""
        origin = head.origin
        if origin is None:
            return b""
        if b"*" in self._origins:
            return b"access-control-allow-origin: *\r\n" + _EXPOSED
        if origin in self._origins:
            return b"access-control-allow-origin: %b\r\nvary: origin\r\n" % origin + _EXPOSED
        return b"vary: origin\r\n"

    def preflight(self, head: RequestHead) -> bytes | None:
        """Further lines of the answer to a question before a request; None when it is none, or not from an allowed origin."""
        if head.method != b"OPTIONS" or head.origin is None or value_of(head.kept, b"access-control-request-method") is None:
            return None
        if not self.allows(head.origin):
            return None
        headers = value_of(head.kept, b"access-control-request-headers") or b"authorization, content-type"
        return (
            b"access-control-allow-methods: GET, POST, PUT, DELETE, OPTIONS\r\naccess-control-allow-headers: %b\r\n"
            b"access-control-max-age: %d\r\n" % (headers, _MAX_AGE_SECS)
        )
