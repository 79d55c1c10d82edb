"""Requests that the fast scanner does not take: llhttp (httptools) decides, and what it accepts is read again in plain form.

Runs in: shards. Why: strictness is not for sale. Absolute targets, rare methods and the like are valid HTTP, most of the rest is an
    attack; llhttp knows which. One request per object; its connection is closed afterwards, so nothing behind it matters.
"""

from __future__ import annotations

from urllib.parse import urlsplit

import httptools

from sglfast import errors
from sglfast._httphead import TOO_LARGE, RequestHead, scan_request


class UnusualRequest:
    """Collects one request through llhttp."""

    def __init__(self, limit_head_bytes: int, limit_body_bytes: int) -> None:
        self._parser = httptools.HttpRequestParser(self)
        self._limit_head_bytes = limit_head_bytes
        self._limit_body_bytes = limit_body_bytes
        self._method = b""
        self._version = b""
        self._target = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._body = bytearray()
        self._fed_bytes = 0
        self._head_bytes = 0
        self.has_head = False
        self._is_complete = False
        self.wants_continue = False

    def feed(self, data: bytes) -> tuple[RequestHead, bytes] | errors.Reason | None:
        """(head, body) when complete, the reason of a refusal, or None: go on."""
        self._fed_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # httptools stops behind the head then: a body, if there is one, would be lost without a word
            if any(name.lower() in (b"content-length", b"transfer-encoding") for name, _ in self._headers):
                return errors.BAD_REQUEST
        except httptools.HttpParserError:
            if not self._is_complete:
                return errors.BAD_REQUEST
        if self._head_bytes > self._limit_head_bytes or (not self.has_head and self._fed_bytes > self._limit_head_bytes):
            return errors.HEADERS_TOO_LARGE
        if self._is_complete:
            body = bytes(self._body)
            head = self.head(b"%d" % len(body))
            return (head, body) if isinstance(head, RequestHead) else head
        return self.limit(self._limit_body_bytes)

    def limit(self, body_bytes: int) -> errors.Reason | None:
        """Take no larger body than this from now on; the reason of a refusal when there is more already."""
        self._limit_body_bytes = body_bytes
        return errors.PAYLOAD_TOO_LARGE if len(self._body) > body_bytes else None

    # ---- llhttp's calls ----

    def on_url(self, piece: bytes) -> None:
        if not self.has_head:
            self._target += piece
            self._head_bytes += len(piece)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.has_head:  # else a trailer, which nobody may read as a header (RFC 9110 6.5.1)
            self._headers.append((name, value))
            self._head_bytes += len(name) + len(value) + 4

    def on_headers_complete(self) -> None:
        if self.has_head:
            return  # a further request in the same bytes
        self.has_head = True
        self._method = self._parser.get_method()
        self._version = self._parser.get_http_version().encode()
        expects = [value.lower() for name, value in self._headers if name.lower() == b"expect"]
        self.wants_continue = expects == [b"100-continue"] and self._version == b"1.1"

    def on_body(self, piece: bytes) -> None:
        if not self._is_complete:
            self._body += piece

    def on_message_complete(self) -> None:
        self._is_complete = True

    def head(self, size: bytes | None = None) -> RequestHead | errors.Reason:
        """The head, once it is there, in the one form that the fast scanner reads: origin target, framing by length.

        size: of the body, as far as the head tells it when None.
        """
        if size is None:
            size = next((value.strip() for name, value in self._headers if name.lower() == b"content-length"), b"0")
        method, target = self._method, self._target
        if not target.startswith((b"/", b"*")):
            try:
                parts = urlsplit(target)
            except ValueError:  # brackets that are no IPv6 address
                return errors.BAD_REQUEST
            if parts.scheme.lower() not in (b"http", b"https"):
                return errors.BAD_REQUEST
            target = (parts.path or b"/") + (b"?" + parts.query if parts.query else b"")
        target = target.partition(b"#")[0]
        if method not in (b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS"):
            method = b"DELETE"  # some method that no path takes: answered 404 or 405
        kept = [(n, v) for n, v in self._headers if n.lower() not in (b"content-length", b"transfer-encoding")]
        codings = [value.strip(b" \t").lower() for name, value in self._headers if name.lower() == b"transfer-encoding"]
        if codings not in ([], [b"chunked"]):
            return errors.BAD_REQUEST  # the body is still coded in a way that the worker would not be told of
        lines = [b"%b %b HTTP/%b" % (method, target, self._version), *(b"%b: %b" % pair for pair in kept)]
        lines.append(b"content-length: %b\r\n\r\n" % size)
        head = scan_request(b"\r\n".join(lines), self._limit_head_bytes + 4096)
        if isinstance(head, RequestHead):
            return head
        return errors.HEADERS_TOO_LARGE if head == TOO_LARGE else errors.BAD_REQUEST
