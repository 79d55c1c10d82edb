"""The door of a shard: its listening socket, how many come in at once, and what happens when that is too many.

Runs in: shards, event loop. Contract: whoever is above `most_clients` is answered 503 (`ClientConnection.connection_made`), so that
    descriptors remain for connections to workers. Should they run out all the same, libuv closes who comes (it keeps a
    descriptor in reserve for that, so the loop neither spins nor dies) and the log says so. With TLS, handshakes count as clients;
    whoever could not be answered within the limit is closed before one, and without descriptors new clients wait.
Why not uvloop's server alone: it takes one connection in each turn of the loop. That is fair to those who are in, but a shard that is
    busy makes few turns, and a thousand new clients would wait for ten seconds where a request takes 20 ms. And with TLS it tells
    nobody of a handshake that began or failed.
"""

from __future__ import annotations

import asyncio
import errno
import resource
import socket
import ssl
from typing import TYPE_CHECKING

from sglfast.edge.server import LINGERING, ClientConnection

if TYPE_CHECKING:
    from sglfast.config import ServeConfig
    from sglfast.edge.shard import Shard

_BACKLOG = 4096
_TAKEN_AT_ONCE = 64  # by each tick, 40 us each, besides one in each turn of the loop
_UNSENT_BYTES = 128 << 10  # of an answer that the kernel holds for a client beyond what is on its way
_TLS_SHUTDOWN_SECS = 2.0  # for a client's part in the end of a TLS connection


def most_clients(config: ServeConfig) -> int:
    """Client connections at most: as set, but an eighth of the descriptors, and some, are for workers and ourselves."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(config.max_connections, max(1, files - files // 8 - 64))


class Door:
    """A listening socket and the tasks that let clients in."""

    def __init__(self, shard: Shard, listener: socket.socket) -> None:
        self._shard = shard
        self._listener = listener
        self._tls: ssl.SSLContext | None = shard.client_tls
        # A handshake is the beginning of a head: whoever does not go on with it is cut as then.
        self._handshake_secs = None if self._tls is None else shard.config.header_timeout_secs
        self._shutdown_secs = None if self._tls is None else _TLS_SHUTDOWN_SECS
        self._server: asyncio.Server | None = None
        self._is_open = False
        self._is_reading = False  # with TLS: the loop calls us for each new client
        self._entering: set[asyncio.Task[object]] = set()

    def _client(self) -> ClientConnection:
        return ClientConnection(self._shard)

    async def open(self) -> None:
        """Begin to let clients in."""
        # Inherited by what is accepted. Without it the kernel takes megabytes of an answer for a client that does not read.
        self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
        if self._tls is None:
            self._server = await self._shard.loop.create_server(self._client, sock=self._listener, backlog=_BACKLOG)
        else:
            self._listener.listen(_BACKLOG)
            self._read(True)
        self._is_open = True

    def _read(self, is_reading: bool) -> None:
        """Have the loop call us for new clients, or no more."""
        if is_reading and not self._is_reading:
            self._shard.loop.add_reader(self._listener.fileno(), self._take)
        elif self._is_reading and not is_reading:
            self._shard.loop.remove_reader(self._listener.fileno())
        self._is_reading = is_reading

    def take_waiting(self) -> None:
        """Let in some of those whom the loop had no turn for. From the shard's tick; costs a system call when nobody waits."""
        if self._is_open:
            self._read(self._tls is not None)
            for _ in range(_TAKEN_AT_ONCE):
                if not self._take():
                    return

    def _take(self) -> bool:
        """Let in one of those who wait; False: nobody waits, or there is no descriptor for whoever does."""
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return False
        except OSError as error:  # gone again while it waited, or there is no room
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._shard.note_full(f"no descriptor is free: new connections {'are closed' if self._tls is None else 'wait'}")
                self._read(False)  # until the next tick: else the loop would spin
            return False
        shard = self._shard
        if self._tls is not None and len(shard.clients) + len(self._entering) >= shard.max_clients + LINGERING:
            shard.note_full(f"connections above {shard.max_clients} are refused")
            sock.close()
            return True
        task: asyncio.Task[object] = shard.loop.create_task(self._let_in(sock))
        self._entering.add(task)
        task.add_done_callback(self._entering.discard)
        return True

    async def _let_in(self, sock: socket.socket) -> None:
        try:
            await self._shard.loop.connect_accepted_socket(
                self._client, sock, ssl=self._tls,
                ssl_handshake_timeout=self._handshake_secs, ssl_shutdown_timeout=self._shutdown_secs,
            )  # fmt: skip
        except OSError:  # a handshake that failed; ssl.SSLError and TimeoutError are OSErrors
            sock.close()

    def close(self) -> None:
        """Let nobody in any more; the socket stays open for the shard's successor."""
        self._is_open = False
        self._read(False)
        if self._server is not None:
            self._server.close()
            self._server = None
