"""The way of a prompt's KV cache from a simulated prefill worker to a simulated decode worker: rooms, and the bytes between them.

Runs in: sim, on the event loop. Contract: a room is a number that a router put into both halves of a request. The prefill worker keeps
    what it computed in the room until a decode worker has it; whoever goes away first, the other is told at once, and the room is empty.
    A real engine moves KV pages by RDMA and asks an HTTP server where; here one TCP connection to the bootstrap port does both, and the
    token ids stand for the pages: the decode worker compares them with its own prompt, so a router that sends two bodies is caught.
The protocol, one room a connection, integers little-endian:

    decode -> prefill    room u64
    prefill -> decode    when the prompt is computed: u8 0, cached_tokens u64, prompt_tokens u64, then each token id as u64
                         when it will never be: u8 1, length u32, so many bytes of UTF-8 that say why; end of connection
    decode -> prefill    u8 1: it has everything, the room is free. The end of the connection instead: it gave up

    An ask for a room that is not there yet waits; how long is the decode worker's business.

Why a decode worker notices late that there is no prefill process (any more): a real one has no connection that breaks, it counts missed
    heartbeats (two of 5 s by SGLang's defaults) and asks again. A router that waits for that keeps its client waiting, so the double
    must not be better.
"""

import array
import asyncio
import contextlib
import logging
import struct
from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol, cast

from sglfast.errors import ConfigError, SglfastError
from sglfast.sim.output import TokenIds

_ROOM = struct.Struct("<Q")
_READY = struct.Struct("<BQQ")
_FAILED = struct.Struct("<BI")
_TAKEN = b"\x01"
_TOKEN_BYTES = 8
_READY_OUTCOME, _FAILED_OUTCOME = 0, 1
_CAUSE_LIMIT_BYTES = 4096
# A decode worker may ask a moment after its room's end, and is to hear of it instead of waiting.
_PAST_ROOMS = 1024
_REBIND_TRIES = 500
_REBIND_PAUSE_S = 0.01
HEARTBEATS_S = 10.0

log = logging.getLogger("sim")


class TransferError(SglfastError):
    """A prompt's KV cache that did not come; the text says why."""


class Keeper(Protocol):
    """The request that keeps something in a room. One of the two is called, once, unless it leaves the room before."""

    def transferred(self) -> None:
        """The decode worker has it."""

    def transfer_failed(self, cause: str) -> None:
        """The decode worker is gone."""


@dataclass(slots=True)
class _Room:
    """keeper: None while only the decode worker knows the room; content: set when the prompt is computed."""

    keeper: Keeper | None = None
    caller: "_Caller | None" = None
    content: bytes | None = None


class Rooms:
    """The rooms of one prefill worker and the port where they are asked for. port: 0 = a free one, known after `open`."""

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._rooms: dict[int, _Room] = {}
        self._past: OrderedDict[int, str] = OrderedDict()
        self._server: asyncio.Server | None = None
        self._was_open = False
        self.callers: set[_Caller] = set()
        self.port = port
        self.transfers = 0
        self.failed = 0

    @property
    def kept(self) -> int:
        """Rooms that a request of this worker is in."""
        return sum(room.keeper is not None for room in self._rooms.values())

    async def open(self) -> None:
        """Listen. Raises ConfigError when the port is taken."""
        loop = asyncio.get_running_loop()
        # After `close` the loop may give the port back a little later than it says.
        for _ in range(_REBIND_TRIES if self._was_open else 1):
            try:
                self._server = await loop.create_server(lambda: _Caller(self), self._host, self.port)
                self.port = self._server.sockets[0].getsockname()[1]
                self._was_open = True
                return
            except (OSError, OverflowError) as error:
                reason = error
            await asyncio.sleep(_REBIND_PAUSE_S)
        raise ConfigError(
            f"cannot listen on {self._host} port {self.port}: {reason}; choose another --disaggregation-bootstrap-port, or 0 for a free one"
        )

    def close(self) -> None:
        """Stop listening and end every connection without a word, as a killed process does; keepers hear nothing."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self._rooms.clear()
        self._past.clear()
        for caller in list(self.callers):
            caller.abort()

    # ---- for requests ----

    def enter(self, number: int, keeper: Keeper) -> None:
        """Announce what will be in a room. Raises ValueError when a request is in it."""
        room = self._rooms.setdefault(number, _Room())
        if room.keeper is not None:
            raise ValueError(f"bootstrap_room {number} is taken by another request")
        self._past.pop(number, None)
        room.keeper = keeper

    def fill(self, number: int, token_ids: TokenIds, cached_tokens: int) -> None:
        """The prompt is computed: send it as soon as it is asked for."""
        room = self._rooms[number]
        room.content = _READY.pack(_READY_OUTCOME, cached_tokens, len(token_ids)) + array.array("Q", token_ids).tobytes()
        if room.caller is not None:
            room.caller.send(room.content)

    def leave(self, number: int, cause: str) -> None:
        """Give up a room; who asks for it is told why."""
        if number not in self._rooms:
            return  # all were closed
        room = self._end(number, cause)
        self.failed += 1
        if room.caller is not None:
            room.caller.refuse(cause)

    def _end(self, number: int, cause: str) -> _Room:
        self._past[number] = cause
        if len(self._past) > _PAST_ROOMS:
            self._past.popitem(last=False)
        return self._rooms.pop(number)

    # ---- for connections ----

    def ask(self, number: int, caller: "_Caller") -> None:
        """A decode worker wants this room."""
        cause = self._past.get(number)
        room = self._rooms.get(number)
        if cause is None and room is not None and room.caller is not None:
            cause = f"bootstrap_room {number} is asked for twice"
        if cause is not None:
            caller.refuse(cause)
            return
        room = self._rooms.setdefault(number, _Room())
        room.caller = caller
        if room.content is not None:
            caller.send(room.content)

    def take(self, number: int, caller: "_Caller") -> None:
        """A decode worker says that it has all of it."""
        room = self._rooms.get(number)
        if room is None or room.caller is not caller or room.keeper is None or room.content is None:
            caller.abort()  # it cannot have anything yet
            return
        self._end(number, f"bootstrap_room {number} was fetched before")
        self.transfers += 1
        room.keeper.transferred()

    def hang_up(self, number: int, caller: "_Caller") -> None:
        """A decode worker's connection is over."""
        room = self._rooms.get(number)
        if room is None or room.caller is not caller:
            return
        if room.keeper is None:
            del self._rooms[number]
            return
        cause = "the decode worker closed its connection before it had the KV cache"
        self._end(number, cause)
        self.failed += 1
        room.keeper.transfer_failed(cause)


class _Caller(asyncio.Protocol):
    """One connection of a decode worker."""

    __slots__ = ("_number", "_received", "_rooms", "_transport")

    def __init__(self, rooms: Rooms) -> None:
        self._rooms = rooms
        self._received = b""
        self._number: int | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast, because uvloop's transports are none by inheritance.
        self._transport = cast(asyncio.Transport, transport)
        self._rooms.callers.add(self)

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._number is None and len(self._received) >= _ROOM.size:
            (self._number,) = _ROOM.unpack_from(self._received)
            self._received = self._received[_ROOM.size :]
            self._rooms.ask(self._number, self)
        if self._number is not None and self._received:
            if self._received == _TAKEN:
                self._rooms.take(self._number, self)
            else:
                self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._rooms.callers.discard(self)
        if self._number is not None:
            self._rooms.hang_up(self._number, self)

    def send(self, content: bytes) -> None:
        """Send what is in the room."""
        self._transport.write(content)

    def refuse(self, cause: str) -> None:
        """Say why there is nothing to come, and end."""
        text = cause.encode()[:_CAUSE_LIMIT_BYTES]
        self._transport.write(_FAILED.pack(_FAILED_OUTCOME, len(text)) + text)
        self._transport.close()

    def abort(self) -> None:
        """End the connection at once."""
        self._transport.abort()


async def fetch(host: str, port: int, room: int, token_ids: TokenIds, timeout_s: float) -> int:
    """Fetch a prompt's KV cache for a decode worker; returns how many of its tokens were cached there.

    token_ids: the decode worker's own idea of the prompt. Raises TransferError after `timeout_s`, when the prefill worker says no,
    is not there or dies, and when it computed another prompt.
    """
    where = f"the prefill worker at {host}:{port}"
    try:
        async with asyncio.timeout(timeout_s):
            try:
                reader, writer = await asyncio.open_connection(host.strip("[]"), port)
                with contextlib.closing(writer):
                    writer.write(_ROOM.pack(room))
                    cached_tokens = await _read(reader, where, token_ids)
                    writer.write(_TAKEN)
                    return cached_tokens
            except (EOFError, ConnectionError):
                await asyncio.sleep(HEARTBEATS_S)
                raise TransferError(f"{where} is not there, or died before it gave room {room}") from None
    except TimeoutError:
        raise TransferError(f"{where} did not give room {room} within {timeout_s:g} s") from None
    except (OSError, UnicodeError, OverflowError) as error:  # the latter two: a host or port that can be none
        raise TransferError(f"{where} failed: {error}") from None


async def _read(reader: asyncio.StreamReader, where: str, token_ids: TokenIds) -> int:
    head = await reader.readexactly(_FAILED.size)
    if head[0] == _FAILED_OUTCOME:
        _, length = _FAILED.unpack(head)
        cause = await reader.readexactly(min(length, _CAUSE_LIMIT_BYTES))
        raise TransferError(f"{where}: {cause.decode(errors='replace')}")
    head += await reader.readexactly(_READY.size - _FAILED.size)
    _, cached_tokens, prompt_tokens = _READY.unpack(head)
    if prompt_tokens != len(token_ids):
        raise TransferError(f"{where} computed another prompt: {prompt_tokens} tokens, here it has {len(token_ids)}")
    if await reader.readexactly(_TOKEN_BYTES * prompt_tokens) != array.array("Q", token_ids).tobytes():
        raise TransferError(f"{where} computed another prompt of the same {prompt_tokens} tokens' length")
    return int(cached_tokens)
