"""What llhttp reads of bytes, as plain values: the oracle of the HTTP fuzzers.

httptools wraps llhttp without leniency. Trailers are told apart from headers. A request that offers an upgrade is read on as one
whose offer is ignored (RFC 9110 7.8): httptools stops behind its head, so its body is read behind a head without the offer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import httptools

HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"te", b"upgrade", b"proxy-connection", b"proxy-authenticate", b"proxy-authorization")
)
Fields = list[tuple[bytes, bytes]]


@dataclass
class Message:
    """One request or answer. body_ends: fed bytes at its end, -1 = not complete."""

    method: bytes = b""
    target: bytes = b""
    status: int = 0
    version: str = ""
    headers: Fields = field(default_factory=list)
    trailers: Fields = field(default_factory=list)
    body: bytes = b""
    has_head: bool = False
    is_complete: bool = False
    keeps_alive: bool = False

    def values(self, name: bytes) -> list[bytes]:
        return [value for key, value in self.headers if key.lower() == name]


class Reference:
    """Feeds llhttp and collects its messages. is_request: requests, else answers."""

    def __init__(self, is_request: bool) -> None:
        self._is_request = is_request
        self._new_parser()
        self.messages: list[Message] = []
        self.error = ""
        self._is_muted = False

    def _new_parser(self) -> None:
        self._parser: Any = httptools.HttpRequestParser(self) if self._is_request else httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> Reference:
        """Read on; after an error nothing is read any more."""
        while data and not self.error:
            try:
                self._parser.feed_data(data)
                return self
            except httptools.HttpParserUpgrade as upgrade:
                data = data[upgrade.args[0] :]
                self._ignore_offer()
            except httptools.HttpParserError as error:
                self.error = str(error) or repr(error)
        return self

    def _ignore_offer(self) -> None:
        message = self.messages[-1]
        if not self._is_request or message.method == b"CONNECT":
            self.error = "another protocol follows"
            return
        self._new_parser()
        message.is_complete = False
        self._is_muted = True
        framing = [field for field in message.headers if field[0].lower() in (b"content-length", b"transfer-encoding")]
        if b"close" in connection_tokens(message.headers):
            framing.append((b"connection", b"close"))
        elif message.version == "1.0" and b"keep-alive" in connection_tokens(message.headers):
            framing.append((b"connection", b"keep-alive"))
        head = b"POST / HTTP/%b\r\n" % message.version.encode() + b"".join(b"%b: %b\r\n" % field for field in framing) + b"\r\n"
        self.feed(head)
        self._is_muted = False

    @property
    def complete(self) -> list[Message]:
        return [message for message in self.messages if message.is_complete]

    # ---- llhttp's calls ----

    def on_message_begin(self) -> None:
        if not self._is_muted:
            self.messages.append(Message())

    def on_url(self, piece: bytes) -> None:
        if not self._is_muted:
            self.messages[-1].target += piece

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_muted:
            return
        message = self.messages[-1]
        (message.trailers if message.has_head else message.headers).append((name, value.strip(b" \t")))

    def on_headers_complete(self) -> None:
        message = self.messages[-1]
        if self._is_muted:
            return
        message.has_head = True
        message.version = self._parser.get_http_version()
        if self._is_request:
            message.method = self._parser.get_method()
        else:
            message.status = self._parser.get_status_code()

    def on_body(self, piece: bytes) -> None:
        self.messages[-1].body += piece

    def on_message_complete(self) -> None:
        message = self.messages[-1]
        message.is_complete = True
        message.keeps_alive = self._parser.should_keep_alive()


def requests(data: bytes) -> Reference:
    """llhttp's reading of a client's bytes."""
    return Reference(is_request=True).feed(data)


def answers(data: bytes) -> Reference:
    """llhttp's reading of a worker's bytes."""
    return Reference(is_request=False).feed(data)


def connection_tokens(headers: Fields) -> set[bytes]:
    """Lower-case tokens of all Connection fields."""
    return {token.strip(b" \t").lower() for name, value in headers if name.lower() == b"connection" for token in value.split(b",")} - {b""}


def end_to_end(headers: Fields, *dropped: bytes) -> Fields:
    """The fields that a proxy hands on (RFC 9110 7.6.1), without the ones that it writes itself (`dropped`)."""
    never = HOP_BY_HOP | set(dropped) | (connection_tokens(headers) - {b"content-length", b"transfer-encoding"})
    return [(name, value) for name, value in headers if name.lower() not in never]


def fields_of(lines: bytes) -> Fields:
    """Header lines, each with its CRLF, as fields."""
    assert lines == b"" or lines.endswith(b"\r\n"), lines
    return [(name, value.strip(b" \t")) for name, _, value in (line.partition(b":") for line in lines.split(b"\r\n")[:-1])]
