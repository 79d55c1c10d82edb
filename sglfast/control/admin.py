"""Control's own HTTP server, on an abstract Unix socket: shards hand on to it what only control can answer.

Runs in: control. Contract: only processes of control's own user are answered (SO_PEERCRED); the socket's name is in no file system and goes
    to the shards on their command line. Paths, methods and bodies are the client's own: a shard relays them unchanged, its
    `authorization` included (edge/relay). What has to be asked of every administrative request is one more of the middlewares
    of `start`, whichever door the request came through.
"""

import asyncio
import logging
import os
import secrets
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from aiohttp import web

from sglfast.config import ServeConfig
from sglfast.control.admin_keys import AdminKeys
from sglfast.control.listen import listen, url_of
from sglfast.control.metrics import CONTENT_TYPE
from sglfast.tls import renew_server, server_context

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_UCRED = struct.Struct("3i")  # struct ucred: pid, uid, gid
_BACKLOG = 128
_CLOSE_S = 0.2  # for answers that are being sent
_METRICS = ("/metrics", "/engine_metrics")
_BODY_LIMIT_BYTES = 64 << 10  # a worker's description; shards refuse larger ones too


class AdminServer:
    """Made before the children (they need `address`); `start` inside the loop, `close` releases everything.

    render_metrics: returns the body of /metrics; `add` brings all other paths, before `start`.
    """

    def __init__(self, render_metrics: Callable[[], bytes], keys: AdminKeys, log: logging.Logger) -> None:
        self._render_metrics = render_metrics
        self._keys = keys
        self._routes: list[web.RouteDef] = [web.get("/metrics", self._metrics)]
        self._log = log
        self._allowed_uid = os.geteuid()
        self._tls: ssl.SSLContext | None = None
        self._runners: list[web.AppRunner] = []
        name = f"sglfast-{os.getpid()}-{secrets.token_hex(8)}"
        self.address = f"@{name}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.setblocking(False)
            self._socket.bind(f"\0{name}")
        except BaseException:
            self._socket.close()
            raise

    def add(self, routes: Iterable[web.RouteDef]) -> None:
        """Answer these paths too."""
        self._routes += routes

    async def start(self, config: ServeConfig) -> None:
        """Begin to answer, also at the addresses of their own that the settings give. Raises ConfigError when one cannot be had."""
        await self._serve(self._socket, self._routes, [self._only_our_user, self._keys.middleware], None)
        if config.admin_port is not None:
            self._tls = server_context(config)
            await self._open("administration", config.admin_host, config.admin_port, self._routes, self._tls)
        if config.prometheus_port is not None:
            metrics = [route for route in self._routes if route.path in _METRICS]
            await self._open("metrics", config.prometheus_host or "0.0.0.0", config.prometheus_port, metrics, None)

    def renew_certificates(self, config: ServeConfig) -> None:
        """Read the certificate files again. Raises ConfigError, and then nothing has changed."""
        if self._tls is not None:
            renew_server(self._tls, config)

    async def _open(self, what: str, host: str, port: int, routes: list[web.RouteDef], tls: ssl.SSLContext | None) -> None:
        (listener,) = listen(host, port, 1)
        try:
            await self._serve(listener, routes, [self._keys.middleware], tls)
        except BaseException:
            listener.close()
            raise
        url = url_of(host, listener.getsockname()[1])
        self._log.info(
            f"{what} has an address of its own", extra={"fields": {"url": url if tls is None else url.replace("http", "https", 1)}}
        )

    async def _serve(self, listener: socket.socket, routes: list[web.RouteDef], middlewares: list[Any], tls: ssl.SSLContext | None) -> None:
        app = web.Application(middlewares=middlewares, client_max_size=_BODY_LIMIT_BYTES)
        app.add_routes(routes)
        app.on_response_prepare.append(_without_server_line)
        runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=_CLOSE_S)
        self._runners.append(runner)
        await runner.setup()
        await web.SockSite(runner, listener, backlog=_BACKLOG, ssl_context=tls).start()

    async def close(self) -> None:
        """Stop answering; what is being answered is cut."""
        for runner in self._runners:
            await runner.cleanup()
        self._socket.close()

    @web.middleware
    async def _only_our_user(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        if peer_uid(request.transport) != self._allowed_uid:
            self._log.warning("refused a request of another user on control's socket")
            raise web.HTTPForbidden(text="this socket is for the router's own processes\n")
        return await handler(request)

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=self._render_metrics(), headers={"content-type": CONTENT_TYPE})


async def _without_server_line(request: web.Request, response: web.StreamResponse) -> None:
    """Clients are not told by which library they were answered."""
    response.headers.popall("Server", None)


def peer_uid(transport: asyncio.BaseTransport | None) -> int | None:
    """User of the process at the other end of a Unix socket, None when the connection is gone."""
    peer = transport.get_extra_info("socket") if transport is not None else None
    if peer is None:
        return None
    _, uid, _ = _UCRED.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return int(uid)
