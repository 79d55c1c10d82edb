"""How a simulated worker misbehaves on request: the switch, and the writers that damage an answer on its way out.

Runs in: sim. Contract: POST /sim/fault sets one fault of MODES for a worker; it hits the next `count` requests of its scope
    (null = until it is taken back), each with the chance `share`, and every other request is served as usual. Requests to /sim/
    are never hit.

    refuse        the connection is reset as soon as the request has arrived
    hang          the request is read and never answered
    error_500     status 500 with SGLang's error object
    busy_503      status 503, as an engine whose queue is full
    cut_headers   the connection ends after `after_bytes` of the answer's head
    cut_body      the connection ends after `after_bytes` of the answer's body (chunk framing counted)
    slow_headers  the answer's head comes in pieces of SLOW_BYTES every SLOW_PAUSE_S
"""

import asyncio
import random
from dataclasses import dataclass, replace
from typing import Any, Protocol

MODES = ("none", "refuse", "hang", "error_500", "busy_503", "cut_headers", "cut_body", "slow_headers")
# inference: the POST routes that make tokens; all: also /health, /server_info and their like.
SCOPES = ("inference", "all")
DEFAULT_AFTER_BYTES = 20
SLOW_BYTES = 8
SLOW_PAUSE_S = 0.02
HEAD_END = b"\r\n\r\n"


class Writer(Protocol):
    """Where an answer's bytes go: the transport itself, or one of the damaging writers."""

    def write(self, data: bytes) -> None:
        """Send bytes, now or later."""

    def close(self) -> None:
        """End the connection when everything is sent."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault as it was set. count: requests that are still to be hit, None = all; share: of the requests that may be hit."""

    mode: str = "none"
    count: int | None = None
    after_bytes: int = DEFAULT_AFTER_BYTES
    scope: str = "inference"
    share: float = 1.0

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON object that POST /sim/fault takes and answers with."""
        return {"mode": self.mode, "count": self.count, "after_bytes": self.after_bytes, "scope": self.scope, "share": self.share}


NO_FAULT = Fault()


def parse_fault(body: Any) -> Fault:
    """Return the fault that a JSON body asks for. Raises ValueError with what would be right."""
    if not isinstance(body, dict):
        raise ValueError('the body must be a JSON object such as {"mode": "hang", "count": 1}')
    unknown = sorted(body.keys() - {"mode", "count", "after_bytes", "scope", "share"})
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r}: there are mode, count, after_bytes, scope, share")
    fault = Fault(**body)
    if fault.mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}")
    if fault.scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}")
    if fault.count is not None and not _is_count(fault.count, 1):
        raise ValueError("count must be null or an integer of at least 1")
    if not _is_count(fault.after_bytes, 0):
        raise ValueError("after_bytes must be an integer of at least 0")
    if isinstance(fault.share, bool) or not isinstance(fault.share, int | float) or not 0 < fault.share <= 1:
        raise ValueError("share must be a number above 0, at most 1")
    return fault


def _is_count(value: object, lowest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= lowest


class FaultSwitch:
    """The fault of one worker. hits: requests that were hit so far; seed: of the chance that `share` is."""

    __slots__ = ("_chance", "fault", "hits")

    def __init__(self, seed: int = 0) -> None:
        self.fault = NO_FAULT
        self.hits = 0
        self._chance = random.Random(seed)

    def take(self, *, is_inference: bool) -> Fault:
        """Return what a request of this kind suffers, and count it."""
        fault = self.fault
        if fault is NO_FAULT or fault.mode == "none" or not (is_inference or fault.scope == "all"):
            return NO_FAULT
        if fault.share < 1 and self._chance.random() >= fault.share:
            return NO_FAULT
        self.hits += 1
        if fault.count is not None:
            left = fault.count - 1
            self.fault = replace(fault, count=left) if left else NO_FAULT
        return fault


class CutWriter:
    """Lets `after_bytes` of the head (or of the body) through, then ends the connection."""

    __slots__ = ("_budget", "_counts_body", "_head", "_transport")

    def __init__(self, transport: asyncio.WriteTransport, after_bytes: int, *, counts_body: bool) -> None:
        self._transport = transport
        self._budget = after_bytes
        self._counts_body = counts_body
        self._head = b""  # of an answer whose head is not over yet

    def write(self, data: bytes) -> None:
        """Pass on what the budget allows."""
        if self._counts_body:
            self._head += data
            head, end, body = self._head.partition(HEAD_END)
            if not end:
                return
            self._counts_body = False
            self._transport.write(head + end)
            data = body
        if self._transport.is_closing():
            return
        self._transport.write(data[: self._budget])
        self._budget -= len(data)
        if self._budget <= 0:
            self._transport.close()

    def close(self) -> None:
        """End the connection."""
        self._transport.close()


class SlowWriter:
    """Sends the head in small pieces with pauses, then all the rest at once. The first write must hold the whole head."""

    __slots__ = ("_head_bytes_left", "_is_closing", "_loop", "_rest", "_transport")

    def __init__(self, transport: asyncio.WriteTransport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._rest = bytearray()
        self._head_bytes_left = -1  # -1 = nothing was written yet
        self._is_closing = False

    def write(self, data: bytes) -> None:
        """Queue bytes behind the head, or send them when the head is over."""
        if self._head_bytes_left == 0:
            self._transport.write(data)
            return
        self._rest += data
        if self._head_bytes_left == -1:
            self._head_bytes_left = data.index(HEAD_END) + len(HEAD_END)
            self._send_piece()

    def close(self) -> None:
        """End the connection after the last piece."""
        self._is_closing = True
        if self._head_bytes_left <= 0:
            self._transport.close()

    def _send_piece(self) -> None:
        if self._transport.is_closing():
            return
        piece = min(SLOW_BYTES, self._head_bytes_left)
        self._head_bytes_left -= piece
        if self._head_bytes_left:
            self._transport.write(bytes(self._rest[:piece]))
            del self._rest[:piece]
            self._loop.call_later(SLOW_PAUSE_S, self._send_piece)
            return
        self._transport.write(bytes(self._rest))
        if self._is_closing:
            self._transport.close()
