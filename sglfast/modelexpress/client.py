"""The four calls to a ModelExpress metadata service over one gRPC channel, and their errors.

Runs in: a seed's or a target's process, on its asyncio loop. Contract: works with every server since April 2026. The service answers
    failures inside the message and keeps gRPC codes for the transport; here both are exceptions that say which server, which call and why:

    ModelExpressError
     +- CallFailed    the call did not come through: gRPC code and details
     +- Refused       the server answered success=false: its message
     +- NoSource      nobody offers what is wanted (target.py)
     +- WrongRecord   a peer offers something else than what is wanted (target.py)

    Every call has a deadline. Only what cannot harm when done twice is repeated, after UNAVAILABLE or DEADLINE_EXCEEDED alone.
"""

import asyncio
import os
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from sglfast.errors import ConfigError, SglfastError
from sglfast.modelexpress.schema import P2P_SERVICE, p2p

CALL_TIMEOUT_S = 30.0  # what the clients of the modelexpress package have
# Servers take 100 MiB and hand tensors out in two fields, so that an answer may have twice that.
MAX_MESSAGE_BYTES = 256 << 20
TOKEN_PATH = "/var/run/secrets/tokens/modelexpress"
_WORTH_REPEATING = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)

_Request = TypeVar("_Request", bound=Message)
_Answer = TypeVar("_Answer", bound=Message)
_Result = TypeVar("_Result")


class ModelExpressError(SglfastError):
    """Base of what goes wrong between a seed or target and the metadata service."""


class CallFailed(ModelExpressError):
    """A call that did not come through. code: gRPC's; details: gRPC's text; method: the RPC's name; address: the server's host:port."""

    def __init__(self, address: str, method: str, code: grpc.StatusCode, details: str) -> None:
        super().__init__(f"ModelExpress server {address} did not answer {method}: {code}: {details or 'no details'}")
        self.address = address
        self.method = method
        self.code = code
        self.details = details

    @property
    def is_worth_repeating(self) -> bool:
        """Whether the same call may succeed a little later."""
        return self.code in _WORTH_REPEATING


class Refused(ModelExpressError):
    """The server answered, and said no. message: its reason."""

    def __init__(self, address: str, method: str, message: str) -> None:
        super().__init__(f"ModelExpress server {address} refused {method}: {message or 'it gave no reason'}")
        self.message = message


@dataclass(frozen=True, slots=True, kw_only=True)
class BackOff:
    """How often and how soon a call is repeated: the pause doubles from `first_s` to `limit_s`, each shortened by chance.

    attempts: calls in all. The chance (half to whole pause) keeps workers that lost one server at one moment from returning at one moment.
    """

    attempts: int = 3
    first_s: float = 1.0
    limit_s: float = 30.0

    def pause_s(self, failures: int) -> float:
        """Seconds to wait after this many failures (1, 2, ...)."""
        return min(self.limit_s, self.first_s * 2.0 ** min(failures - 1, 32)) * random.uniform(0.5, 1.0)

    async def run(self, call: Callable[[], Awaitable[_Result]]) -> _Result:
        """Await the call until it succeeds. Raises its last CallFailed, or at once one that is not worth repeating."""
        failures = 0
        while True:
            try:
                return await call()
            except CallFailed as error:
                failures += 1
                if failures >= self.attempts or not error.is_worth_repeating:
                    raise
            await asyncio.sleep(self.pause_s(failures))


class MetadataClient:
    """One channel to one metadata service; connects at the first call. Use as an async context manager, or call `close`.

    address: host:port, `http://` in front is dropped (the API is plaintext HTTP/2); timeout_s: deadline of each call; token_path: file
    with the service account's token that a guarded service asks for, read at each call because Kubernetes renews it; None = the
    environment's MX_AUTH_TOKEN_PATH, else where the package's charts mount it. No file, no token. Make it while its loop runs.
    Raises ConfigError for an address that cannot be one.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float = CALL_TIMEOUT_S,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        token_path: str | None = None,
    ) -> None:
        self.address = parse_address(address)
        self._token_path = Path(token_path or os.environ.get("MX_AUTH_TOKEN_PATH") or TOKEN_PATH)
        self._timeout_s = timeout_s
        self._channel = grpc.aio.insecure_channel(
            self.address,
            options=[
                ("grpc.max_send_message_length", max_message_bytes),
                ("grpc.max_receive_message_length", max_message_bytes),
                # After a server's restart a heartbeat must not wait for gRPC's own back-off of two minutes.
                ("grpc.max_reconnect_backoff_ms", 5_000),
            ],
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the channel; calls in flight fail."""
        await self._channel.close()

    async def publish(self, identity: p2p.SourceIdentity, worker: p2p.WorkerMetadata, worker_id: str) -> str:
        """Store one worker's record; returns its mx_source_id. It is found as READY only after `update_status`.

        Doing it again replaces the record. Raises CallFailed, Refused.
        """
        request = p2p.PublishMetadataRequest(identity=identity, worker=worker, worker_id=worker_id)
        answer = await self._call("PublishMetadata", request, p2p.PublishMetadataResponse)
        if not answer.success:
            raise Refused(self.address, "PublishMetadata", answer.message)
        return answer.mx_source_id

    async def list_sources(
        self,
        identity: p2p.SourceIdentity | None = None,
        *,
        status: p2p.SourceStatus | None = None,
        worker_rank: int | None = None,
    ) -> list[p2p.SourceInstanceRef]:
        """What is offered, newest first. identity: None = all of it; worker_rank is ignored by servers before 0.5. Raises CallFailed."""
        request = p2p.ListSourcesRequest(identity=identity, status_filter=status, worker_rank_filter=worker_rank)
        answer = await self._call("ListSources", request, p2p.ListSourcesResponse)
        return list(answer.instances)

    async def get_metadata(self, source_id: str, worker_id: str) -> p2p.GetMetadataResponse | None:
        """The whole record of a worker, None when the server has none. Raises CallFailed."""
        request = p2p.GetMetadataRequest(mx_source_id=source_id, worker_id=worker_id)
        answer = await self._call("GetMetadata", request, p2p.GetMetadataResponse)
        return answer if answer.found else None

    async def update_status(
        self, source_id: str, worker_id: str, worker_rank: int, status: p2p.SourceStatus, *, timeout_s: float | None = None
    ) -> None:
        """Set a worker's status; with READY this is the heartbeat. timeout_s: None = the client's. Raises CallFailed, Refused."""
        request = p2p.UpdateStatusRequest(mx_source_id=source_id, worker_id=worker_id, worker_rank=worker_rank, status=status)
        answer = await self._call("UpdateStatus", request, p2p.UpdateStatusResponse, timeout_s)
        if not answer.success:
            raise Refused(self.address, "UpdateStatus", answer.message)

    async def _call(self, method: str, request: _Request, kind: type[_Answer], timeout_s: float | None = None) -> _Answer:
        call = self._channel.unary_unary(
            f"/{P2P_SERVICE}/{method}", request_serializer=type(request).SerializeToString, response_deserializer=kind.FromString
        )
        try:
            return await call(request, timeout=self._timeout_s if timeout_s is None else timeout_s, metadata=self._credentials())
        except grpc.aio.AioRpcError as error:
            raise CallFailed(self.address, method, error.code(), error.details() or "") from error

    def _credentials(self) -> tuple[tuple[str, str], ...]:
        try:
            token = self._token_path.read_text().strip()
        except OSError:  # most clusters have none; a service that wants one says UNAUTHENTICATED
            return ()
        return (("authorization", f"Bearer {token}"),) if token else ()


def parse_address(address: str) -> str:
    """Return host:port of an address that may begin with `http://`. Raises ConfigError."""
    plain = address.removeprefix("http://").rstrip("/")
    host, colon, port = plain.rpartition(":")
    if "://" in plain:
        raise ConfigError(f"ModelExpress server {address!r}: must be host:port, with nothing or http:// before it; the API has no TLS")
    if not (colon and host and port.isdecimal() and 0 < int(port) < 65536) or "/" in plain:
        raise ConfigError(f"ModelExpress server {address!r}: must be host:port, as 10.0.0.5:8001")
    return plain
