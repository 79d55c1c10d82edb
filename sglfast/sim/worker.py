"""One simulated worker: its routes, its ranks with their engines and event sockets, its faults and its restarts.

Runs in: sim, on the event loop. Contract: `open` makes it listen, `close` releases every socket and timer of it. Counters are
    the observer's: a restart empties caches and sequences, not them. Besides SGLang's routes, on the same port:

    POST /sim/fault        {"mode", "count"?, "after_bytes"?, "scope"?, "share"?}   see fault.py
    POST /sim/restart      {"down_s"?, "dp_size"?}   as an engine that was killed and started again, perhaps with fewer
                           data-parallel ranks than the worker began with: connections are reset, requests
                           lost, caches empty, sequences at 0 with AllBlocksCleared, another startup_time; for `down_s`
                           seconds nothing listens, on HTTP (connections are refused) and ZMQ alike. Answers when it is up.
    POST /sim/drop_events  {"count", "rank"?}   the next batches (of every rank) get their numbers but are not sent
    POST /sim/keep_back_stores  {"share"?, "unit"?}   see silence.py
    GET  /sim/stats        counters and gauges; ?keys=1 adds the cached block keys of each rank
"""

import asyncio
import contextlib
import dataclasses
import logging
import struct
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import orjson
import zmq

from sglfast.errors import ConfigError
from sglfast.prompt.keys import RequestKind
from sglfast.sim import introspect
from sglfast.sim.engine import Engine, EngineTotals
from sglfast.sim.fault import Fault, FaultSwitch, parse_fault
from sglfast.sim.http import KEEP_ALIVE_S, TEXT, Connection, Request
from sglfast.sim.inference import Inference, Rank, Shared, error_body
from sglfast.sim.pacer import Pacer
from sglfast.sim.publisher import KvPublisher
from sglfast.sim.requests import INFERENCE_PATHS
from sglfast.sim.rooms import Rooms
from sglfast.sim.settings import SimSettings
from sglfast.sim.silence import parse_silence
from sglfast.sim.weights import Weights

BACKLOG = 2048
REBIND_TRIES = 500
REBIND_PAUSE_S = 0.01
DOWN_LIMIT_S = 600.0
# A loop tells a reset connection of its end in one of its next rounds.
CLOSE_ROUNDS = 100
FLUSHED = (
    b"Cache flushed.\nPlease check backend logs for more details. "
    b"(When there are running or waiting requests, the operation will not be performed.)\n"
)
NOT_FLUSHED = b"Flush cache failed.\n"

log = logging.getLogger("sim")

Handler = Callable[[Request, Connection], None]


class SimWorker:
    """See the module. port: of HTTP, 0 until `open` when it is to be a free one; kv_port: of rank 0, likewise.

    weights: those it holds, if any are played; a restart does not lose them. bootstrap_port: of a prefill worker, 0 as for `port`.
    """

    def __init__(
        self,
        settings: SimSettings,
        shared: Shared,
        context: zmq.Context[zmq.Socket[bytes]],
        port: int,
        kv_port: int,
        weights: Weights | None = None,
        bootstrap_port: int = 0,
    ) -> None:
        self._settings = settings
        self._shared = shared
        self._weights = weights
        self._server: asyncio.Server | None = None
        self._restart: asyncio.Task[None] | None = None
        self._totals = [EngineTotals() for _ in range(settings.dp_size)]
        self._faults = FaultSwitch(settings.seed + port)
        self.rooms: Rooms | None = None
        if settings.disaggregation_mode == "prefill":
            self.rooms = Rooms(settings.host, bootstrap_port)
        self._inference = Inference(settings, shared, self.rooms)
        self._startup_time = 0.0
        self._restarts = 0
        self._is_up = False
        self._routes = self._route_table()
        self.port = port
        self.publisher = KvPublisher(context, settings, kv_port)
        self.connections: set[Connection] = set()

    @property
    def url(self) -> str:
        """Base URL of the worker."""
        host = self._settings.host
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    # ---- life ----

    async def open(self) -> None:
        """Start the engines, bind the event sockets and listen. Raises ConfigError when a port is taken."""
        await self.publisher.open()
        loop = asyncio.get_running_loop()
        ranks = []
        for totals, publisher in zip(self._totals[: self._settings.dp_size], self.publisher.ranks, strict=True):
            engine = Engine(self._settings, self._shared.output, publisher.publish, totals)
            ranks.append(Rank(engine, Pacer(engine, loop)))
        self._inference.ranks = ranks
        self._startup_time = max(time.time(), self._startup_time + 0.001)
        self._is_up = True
        try:
            if self.rooms is not None:
                await self.rooms.open()
            await self._listen(loop)
        except ConfigError:
            if self.rooms is not None:
                self.rooms.close()
            self.publisher.close()
            raise

    async def _listen(self, loop: asyncio.AbstractEventLoop) -> None:
        # On a restart the port was ours a moment ago, and the loop may close it a little later than it says.
        for _ in range(REBIND_TRIES if self._restarts else 1):
            try:
                self._server = await loop.create_server(lambda: Connection(self), self._settings.host, self.port, backlog=BACKLOG)
                self.port = self._server.sockets[0].getsockname()[1]
                return
            except (OSError, OverflowError) as error:
                reason = error
            await asyncio.sleep(REBIND_PAUSE_S)
        raise ConfigError(f"cannot listen on {self._settings.host} port {self.port}: {reason}; choose another --base-port")

    async def close(self) -> None:
        """Reset every connection and release everything."""
        if self._restart is not None:
            self._restart.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._restart
        self._go_down(None)
        for _ in range(CLOSE_ROUNDS):
            if not self.connections and not (self.rooms and self.rooms.callers):
                break
            await asyncio.sleep(0)

    def _go_down(self, keep: Connection | None) -> None:
        """Stop listening and working; reset every connection except `keep`."""
        self._is_up = False
        if self._server is not None:
            self._server.close()
            self._server = None
        for rank in self._inference.ranks:
            rank.pacer.stop()
        if self.rooms is not None:
            self.rooms.close()
        self._inference.drop_all()
        for connection in list(self.connections):
            if connection is not keep:
                connection.reset()
        self.publisher.close()

    def close_idle(self, now_s: float) -> None:
        """Close the connections that were idle for KEEP_ALIVE_S. now_s: monotonic."""
        for connection in list(self.connections):
            connection.close_idle(now_s - KEEP_ALIVE_S)

    # ---- requests ----

    def handle(self, request: Request, connection: Connection) -> None:
        """Answer a request; the connections' Application."""
        if not self._is_up:  # the kernel had accepted it before the listener closed
            connection.reset()
            return
        path, method = request.path, request.method
        by_method = self._routes.get(path)
        if by_method is None:
            connection.respond_json(404, {"detail": "Not Found"})
            return
        handler = by_method.get(method)
        if handler is None:
            allow = f"allow: {', '.join(by_method)}\r\n".encode()
            connection.respond_json(405, {"detail": "Method Not Allowed"}, allow)
            return
        if path.startswith("/sim/"):
            try:
                handler(request, connection)
            except ValueError as error:
                connection.respond_json(400, {"error": str(error)})
            return
        fault = self._faults.take(is_inference=path in INFERENCE_PATHS)
        if fault.mode == "none" or not self._suffer(fault, connection):
            handler(request, connection)

    def _suffer(self, fault: Fault, connection: Connection) -> bool:
        """Let a fault act; whether that was all that happens to the request."""
        match fault.mode:
            case "refuse":
                connection.reset()
            case "hang":
                pass
            case "error_500":
                body = error_body("Internal server error: the simulator was told to fail.", "InternalServerError", 500)
                connection.respond_json(500, body)
            case "busy_503":
                connection.respond_json(503, error_body("The request queue is full.", "ServiceUnavailableError", 503))
            case _:
                connection.damage(fault.mode, fault.after_bytes)
                return False
        return True

    def _route_table(self) -> dict[str, dict[str, Handler]]:
        get_info: dict[str, Handler] = {"GET": self._server_info}
        get_model: dict[str, Handler] = {"GET": self._json(lambda: introspect.model_info(self._settings))}
        health: dict[str, Handler] = {"GET": lambda request, connection: connection.respond(200, b"")}
        flush: Handler = self._flush_cache
        table: dict[str, dict[str, Handler]] = {
            "/server_info": get_info,
            "/get_server_info": get_info,
            "/model_info": get_model,
            "/get_model_info": get_model,
            "/v1/models": {"GET": self._json(lambda: introspect.models(self._settings, self._startup_time))},
            "/v1/loads": {"GET": self._json(lambda: introspect.loads(self._settings, self._engines()))},
            "/health": health,
            "/health_generate": health,
            "/flush_cache": {"POST": flush, "GET": flush},
            "/abort_request": {"POST": self._abort_request},
            "/sim/fault": {"POST": self._set_fault},
            "/sim/restart": {"POST": self._start_restart},
            "/sim/drop_events": {"POST": self._drop_events},
            "/sim/keep_back_stores": {"POST": self._keep_back_stores},
            "/sim/stats": {"GET": self._stats},
        }
        for path, kind in INFERENCE_PATHS.items():
            handler = partial(self._inference.handle, kind)
            table[path] = {"POST": handler, "PUT": handler} if kind == RequestKind.GENERATE else {"POST": handler}
        return table

    @staticmethod
    def _json(body: Callable[[], Any]) -> Handler:
        return lambda request, connection: connection.respond_json(200, body())

    def _engines(self) -> list[Engine]:
        return [rank.engine for rank in self._inference.ranks]

    def _server_info(self, request: Request, connection: Connection) -> None:
        bootstrap_port = self.rooms.port if self.rooms is not None else self._settings.disaggregation_bootstrap_port
        info = introspect.server_info(self._settings, self.port, bootstrap_port, self._startup_time, self._engines(), self.publisher)
        connection.respond_json(200, info)

    def _flush_cache(self, request: Request, connection: Connection) -> None:
        engines = self._engines()
        if any(engine.is_busy for engine in engines):
            connection.respond(400, NOT_FLUSHED, TEXT)
            return
        for engine in engines:
            engine.flush()
        connection.respond(200, FLUSHED, TEXT)

    def _abort_request(self, request: Request, connection: Connection) -> None:
        try:
            body = _object(request)
            if not isinstance(body.get("rid", ""), str):
                raise ValueError("rid must be a string")
        except ValueError as error:
            connection.respond_json(400, error_body(str(error), "Bad Request", 400))
            return
        connection.respond(200, b"")
        self._inference.abort(body.get("rid", ""), is_all=body.get("abort_all") is True)

    # ---- /sim/: they raise ValueError for a body that cannot be done ----

    def _set_fault(self, request: Request, connection: Connection) -> None:
        self._faults.fault = parse_fault(_object(request))
        connection.respond_json(200, self._faults.fault.as_dict())

    def _drop_events(self, request: Request, connection: Connection) -> None:
        body = _object(request)
        count, rank = body.get("count"), body.get("rank")
        if not isinstance(count, int) or count < 0:
            raise ValueError("count must be an integer of at least 0")
        if rank is not None and (not isinstance(rank, int) or not 0 <= rank < self._settings.dp_size):
            raise ValueError(f"rank must be 0..{self._settings.dp_size - 1}")
        for index, publisher in enumerate(self.publisher.ranks):
            if rank in (None, index):
                publisher.to_drop = count
        connection.respond_json(200, {"count": count, "rank": rank})

    def _keep_back_stores(self, request: Request, connection: Connection) -> None:
        silence = parse_silence(_object(request))
        for stores in self.publisher.stores:
            stores.silence = silence
        connection.respond_json(200, dataclasses.asdict(silence))

    def _start_restart(self, request: Request, connection: Connection) -> None:
        down_s = _object(request).get("down_s", 0.0)
        if not isinstance(down_s, int | float) or not 0 <= down_s <= DOWN_LIMIT_S:
            raise ValueError(f"down_s must be 0..{DOWN_LIMIT_S:g} seconds")
        dp_size, limit = _object(request).get("dp_size", self._settings.dp_size), len(self._totals)
        if not isinstance(dp_size, int) or not 1 <= dp_size <= limit:
            raise ValueError(f"dp_size must be 1..{limit}, which the worker began with")
        self._settings = dataclasses.replace(self._settings, dp_size=dp_size)
        self.publisher.n_ranks = dp_size
        self._restart = asyncio.get_running_loop().create_task(self._run_restart(down_s, connection))

    async def _run_restart(self, down_s: float, connection: Connection) -> None:
        self._restarts += 1
        self._go_down(connection)
        await asyncio.sleep(down_s)
        try:
            await self.open()
        except ConfigError as error:  # somebody took a port meanwhile: the worker stays down
            log.error("worker %d did not come back: %s", self.port, error)
            connection.reset()
            return
        connection.respond_json(200, {"startup_time": self._startup_time})

    def _stats(self, request: Request, connection: Connection) -> None:
        totals = self._inference.totals
        live = self.publisher.ranks
        ranks: list[dict[str, Any]] = []
        for engine, publisher in zip(self._engines(), live, strict=True):
            ranks.append(
                {
                    "running": engine.running_requests,
                    "waiting": engine.waiting_requests,
                    "prompt_tokens_total": engine.totals.prompt_tokens,
                    "cached_tokens_total": engine.totals.cached_tokens,
                    "generated_tokens_total": engine.totals.generated_tokens,
                    "steps": engine.totals.steps,
                    "cache_capacity_blocks": engine.cache.capacity_blocks,
                    "cache_used_blocks": engine.cache.used_blocks,
                    "cache_locked_blocks": engine.cache.locked_blocks,
                    "cache_evicted_blocks": engine.totals.evicted_blocks,
                    "next_sequence": publisher.next_sequence,
                }
            )
        stats: dict[str, Any] = {name: sum(rank[name] for rank in ranks) for name in ranks[0] if name != "next_sequence"}
        if "keys=1" in request.query.split("&"):
            for rank, engine in zip(ranks, self._engines(), strict=True):
                keys = engine.cache.keys()
                rank["block_keys"] = list(struct.unpack(f"<{len(keys) // 8}Q", keys))
        stats |= {
            "requests": totals.requests,
            "refused": totals.refused,
            "failed": totals.failed,
            "streams_aborted": totals.aborted,
            "abort_calls": totals.abort_calls,
            "abort_calls_known": totals.abort_calls_known,
            "events_published": self.publisher.published_before + sum(rank.next_sequence for rank in live),
            "events_dropped": self.publisher.dropped_before + sum(rank.dropped for rank in live),
            "blocks_kept_back": sum(stores.kept_back for stores in self.publisher.stores),
            "fault_hits": self._faults.hits,
            "fault": self._faults.fault.as_dict(),
            "restarts": self._restarts,
            "startup_time": self._startup_time,
            "connections": len(self.connections),
            "rooms": self.rooms and {"kept": self.rooms.kept, "transferred": self.rooms.transfers, "failed": self.rooms.failed},
            "weights": self._weights and self._weights.stats(),
            "ranks": ranks,
        }
        connection.respond_json(200, stats)


def _object(request: Request) -> dict[str, Any]:
    """Return the JSON object of a control request, an empty one for an empty body. Raises ValueError."""
    body = orjson.loads(request.body or b"{}")  # its error is a ValueError
    if not isinstance(body, dict):
        raise ValueError("the body must be a JSON object")
    return body
