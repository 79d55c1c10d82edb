"""Paths that control answers: a shard hands the request on through control's own socket and the answer back, both unchanged.

Runs in: shards, event loop. Contract: method, target, end-to-end headers (`authorization` with them) and body are the client's; HEAD
    is asked as GET. A connection for each request: these paths are rare, and control may be restarted at any moment with nothing
    to notice. A path's kind decides whether the main port has it (`--admin-port`, `--main-port-paths`).
"""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sglfast import errors
from sglfast._httphead import RequestHead, ResponseHead, scan_response

if TYPE_CHECKING:
    from sglfast.config import ServeConfig
    from sglfast.edge.server import ClientConnection

_ANSWER_LIMIT_BYTES = 64 << 20
_BODY_LIMIT_BYTES = 64 << 10  # of a worker's description; as control/admin
_HEAD_LIMIT_BYTES = 64 << 10
# /add_worker waits 30 s for the worker, /health_generate 20 s for each of three, /engine_metrics 5 s for every 32 workers.
_TIMEOUT_SECS = 180.0
_METRICS_TIMEOUT_SECS = 5.0


@dataclass(frozen=True, slots=True)
class Relayed:
    """A path of control's. methods: without HEAD, which goes with GET.

    kind: `admin` changes the router or its workers, or tells of them what clients of the data plane need not know; `metrics`; `info`
    tells clients of the workers.
    """

    methods: tuple[bytes, ...]
    kind: Literal["admin", "metrics", "info"] = "admin"
    timeout_s: float = _TIMEOUT_SECS

    def takes(self, method: bytes) -> bool:
        """Whether the path has this method."""
        return method in self.methods or (method == b"HEAD" and b"GET" in self.methods)


_GET, _POST = (b"GET",), (b"POST",)
_ONE_WORKER = Relayed((b"GET", b"PUT", b"DELETE"))
_PATHS = {
    b"/metrics": Relayed(_GET, "metrics", timeout_s=_METRICS_TIMEOUT_SECS),
    b"/engine_metrics": Relayed(_GET, "metrics"),
    b"/health_generate": Relayed(_GET, "info"),
    b"/server_info": Relayed(_GET, "info"),
    b"/get_server_info": Relayed(_GET, "info"),
    b"/model_info": Relayed(_GET, "info"),
    b"/get_model_info": Relayed(_GET, "info"),
    b"/workers": Relayed((b"GET", b"POST")),
    b"/add_worker": Relayed(_POST),
    b"/remove_worker": Relayed(_POST),
    b"/list_workers": Relayed(_GET),
    b"/get_loads": Relayed(_GET),
    b"/flush_cache": Relayed(_POST),
}


def elsewhere(config: ServeConfig) -> frozenset[str]:
    """The kinds of paths that the main port does not have."""
    kinds = {"all": [], "no-metrics": ["metrics"], "data": ["metrics", "info"]}[config.main_port_paths]
    return frozenset([*kinds, *(["admin"] if config.admin_port is not None else [])])


def relayed(path: bytes) -> Relayed | None:
    """What control takes on this path, None when it is not control's."""
    return _PATHS.get(path) or (_ONE_WORKER if path.startswith(b"/workers/") else None)


async def ask_control(address: str, head: RequestHead, body: bytes, timeout_s: float) -> tuple[ResponseHead, bytes]:
    """Ask control; (head, body) of its answer. Raises OSError or TimeoutError when control does not answer.

    address: `@name` is an abstract Unix socket, which no file system holds.
    """
    async with asyncio.timeout(timeout_s):
        # libuv takes no abstract name, so the socket is connected first.
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            peer.setblocking(False)
            await asyncio.get_running_loop().sock_connect(peer, "\0" + address[1:])
            reader, writer = await asyncio.open_unix_connection(sock=peer, limit=_HEAD_LIMIT_BYTES)
        except BaseException:
            peer.close()
            raise
        try:
            method = b"GET" if head.method == b"HEAD" else head.method
            writer.write(
                b"%b %b HTTP/1.1\r\nhost: control\r\n%bconnection: close\r\ncontent-length: %d\r\n\r\n%b"
                % (method, head.target, head.kept, len(body), body)
            )
            answer = scan_response(await reader.readuntil(b"\r\n\r\n"), _HEAD_LIMIT_BYTES)
            if type(answer) is not ResponseHead or not 0 <= answer.content_length <= _ANSWER_LIMIT_BYTES:
                raise ConnectionError("control's answer has no usable head")
            return answer, await reader.readexactly(answer.content_length)
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            raise ConnectionError(f"control's answer is broken: {error}") from error
        finally:
            writer.close()


async def relay(client: ClientConnection, path: Relayed, head: RequestHead, body: bytes) -> None:
    """Answer a client with what control says; the client waits in state BUSY."""
    is_head = head.method == b"HEAD"
    if len(body) > _BODY_LIMIT_BYTES:
        client.answer_error(errors.PAYLOAD_TOO_LARGE, head.request_id)
    else:
        try:
            answer, found = await ask_control(client.shard.control_address, head, body, path.timeout_s)
        except (OSError, TimeoutError):
            client.answer_error(errors.CONTROL_UNAVAILABLE, head.request_id, None, is_head)
        else:
            request_id = None if answer.has_request_id else head.request_id or client.shard.new_request_id()
            client.write_head(answer.kept, request_id, b"", b"" if is_head else found)
    client.task = None
    client.on_exchange_end()
