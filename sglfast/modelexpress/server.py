"""The gRPC server: its services, their limits, the reaper and the metrics port, started and stopped together.

Runs in: the metadata service. Contract: after `start` everything works and `port` says where; `stop` ends it all, calls in flight get their
    grace, and what was acknowledged is on disk. gRPC codes are for what is no call of the API: undecodable bytes, a limit, a token.
"""

from __future__ import annotations  # the stubs have generic classes where grpc itself has none

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from logging import Logger
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
from grpc_health.v1 import health as standard_health
from grpc_health.v1 import health_pb2 as standard_health_pb2
from grpc_health.v1 import health_pb2_grpc as standard_health_pb2_grpc

from sglfast import __version__
from sglfast.errors import ConfigError
from sglfast.modelexpress.auth import TokenInterceptor, TokenReviewer
from sglfast.modelexpress.limits import ClientLimits, TooMuchError, client_of
from sglfast.modelexpress.metrics import Meters, MetricsServer
from sglfast.modelexpress.reaper import Reaper
from sglfast.modelexpress.records import MalformedError
from sglfast.modelexpress.schema import HEALTH_SERVICE, P2P_SERVICE, health
from sglfast.modelexpress.service import P2pService, wall_clock_ms
from sglfast.modelexpress.settings import ServeSettings
from sglfast.modelexpress.storage import open_storage

if TYPE_CHECKING:
    Call = Callable[[bytes], Awaitable[bytes]]
    Context = grpc.aio.ServicerContext[bytes, bytes]

_SERVING = standard_health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = standard_health_pb2.HealthCheckResponse.NOT_SERVING


class Server:
    """One metadata service.

    clock_ms: unix milliseconds. port, metrics_port: where it listens; metrics_port is None without. reaper: there after `start`.
    """

    reaper: Reaper

    def __init__(self, settings: ServeSettings, log: Logger, *, clock_ms: Callable[[], int] = wall_clock_ms) -> None:
        self._settings, self._log, self._clock_ms = settings, log, clock_ms
        self._limits = ClientLimits(settings.max_calls_per_client, settings.max_inflight_bytes_per_client)
        self._tasks: set[asyncio.Task[None]] = set()
        self.meters = Meters()
        self.port = settings.port
        self.metrics_port: int | None = None

    async def start(self) -> None:
        """Open the storage, listen, begin to scan. Raises ConfigError or StorageError; then nothing is left open."""
        settings = self._settings
        async with contextlib.AsyncExitStack() as stack:
            storage = open_storage(settings.storage, settings.redis_prefix)
            await storage.open()
            stack.push_async_callback(storage.close)
            service = P2pService(storage, settings, self.meters, self._log, on_storage=self._on_storage, clock_ms=self._clock_ms)
            stack.callback(service.close)
            if settings.metrics_port >= 0:
                await self._start_metrics(stack, MetricsServer(self.meters, storage, settings.host, settings.metrics_port))
            self.reaper = Reaper(storage, service, settings, self.meters, self._log, clock_ms=self._clock_ms)
            stack.push_async_callback(_cancel, asyncio.create_task(self.reaper.run()))
            self._health = standard_health.aio.HealthServicer()
            for name in ("", P2P_SERVICE, HEALTH_SERVICE):
                await self._health.set(name, _SERVING)
            self._server = self._grpc_server(service)
            place = f"[{settings.host}]" if ":" in settings.host else settings.host
            try:
                self.port = self._server.add_insecure_port(f"{place}:{settings.port}")
            except RuntimeError:  # whose text advises to debug gRPC; the cause stands on standard error, by gRPC itself
                await self._server.stop(None)
                raise ConfigError(
                    f"--port {settings.port}: cannot listen on {place}:{settings.port}; is it in use, or no address of this machine?"
                ) from None
            await self._server.start()
            self._stack = stack.pop_all()

    async def stop(self, grace_s: float | None = None) -> None:
        """End: no new calls, `grace_s` seconds for those in flight, then everything else. None: the settings' grace."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(self._settings.shutdown_grace_secs if grace_s is None else grace_s)
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._stack.aclose()

    async def stop_now(self) -> None:
        """While `stop` waits: give the calls in flight up."""
        await self._server.stop(0)

    async def _start_metrics(self, stack: contextlib.AsyncExitStack, metrics: MetricsServer) -> None:
        try:
            await metrics.start()
        except OSError as error:
            raise ConfigError(f"--metrics-port {self._settings.metrics_port}: {error}") from None
        stack.push_async_callback(metrics.stop)
        self.metrics_port = metrics.port

    def _grpc_server(self, service: P2pService) -> grpc.aio.Server:
        settings = self._settings
        interceptors = []
        if settings.allowed_service_accounts:
            reviewer = TokenReviewer(
                settings.kubernetes_api, settings.allowed_service_accounts, settings.token_audiences, settings.token_cache_secs
            )
            interceptors.append(TokenInterceptor(reviewer, self.meters.refusals.labels("token").inc))
        server = grpc.aio.server(
            interceptors=interceptors,
            options=[
                ("grpc.max_receive_message_length", settings.max_message_bytes),
                ("grpc.max_send_message_length", settings.max_message_bytes),
                ("grpc.so_reuseport", 0),  # a second service on the port is a mistake that must be seen
            ],
            maximum_concurrent_rpcs=settings.max_calls,
        )
        calls = {
            "PublishMetadata": service.publish, "ListSources": service.list_sources,
            "GetMetadata": service.get, "UpdateStatus": service.update,
        }  # fmt: skip
        # Bytes in, bytes out: a record is never made into objects on the loop.
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            name: grpc.unary_unary_rpc_method_handler(self._handler(name, call)) for name, call in calls.items()
        }
        started_s = time.monotonic()

        async def get_health(request: object, context: object) -> health.HealthResponse:
            return health.HealthResponse(version=__version__, status="ok", uptime=int(time.monotonic() - started_s))

        own_health = grpc.unary_unary_rpc_method_handler(
            get_health, health.HealthRequest.FromString, health.HealthResponse.SerializeToString
        )
        server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(P2P_SERVICE, handlers),
                grpc.method_handlers_generic_handler(HEALTH_SERVICE, {"GetHealth": own_health}),
            )
        )
        standard_health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        return server

    def _handler(self, name: str, call: Call) -> Callable[[bytes, Context], Awaitable[bytes]]:
        latency = self.meters.latency.labels(name)

        async def handle(data: bytes, context: Context) -> bytes:
            begun_s = time.perf_counter()
            client = client_of(context.peer())
            try:
                self._limits.enter(client, len(data))
            except TooMuchError as error:
                await self._refuse(context, "client_limit", grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
            try:
                return await call(data)
            except MalformedError as error:
                await self._refuse(context, "malformed", grpc.StatusCode.INVALID_ARGUMENT, f"the request is no {name}Request: {error}")
            except Exception:
                self._log.exception(f"{name} failed")
                await self._refuse(context, "internal", grpc.StatusCode.INTERNAL, "internal error, see the log of the service")
            finally:
                self._limits.leave(client, len(data))
                latency.observe(time.perf_counter() - begun_s)

        return handle

    async def _refuse(self, context: Context, reason: str, code: grpc.StatusCode, text: str) -> NoReturn:
        self.meters.refusals.labels(reason).inc()
        await context.abort(code, text)

    def _on_storage(self, is_working: bool) -> None:
        """A load balancer may send calls to another instance meanwhile; the process itself is well."""
        task = asyncio.create_task(self._health.set(P2P_SERVICE, _SERVING if is_working else _NOT_SERVING))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
