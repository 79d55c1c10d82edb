"""A bound SUB for engines that connect out (a concrete host in their endpoint, or `"bind": false`), one a port.

Runs in: index, one thread a port. Started by `main` for the first such worker, closed with the index.
Contract: what arrives is handed on unchanged to an inproc endpoint, to which the subscribers of the ranks connect as they would to an
    engine; a rank's messages are those of its port (`--kv-listen` port + rank) with exactly its worker's topic.
Limits, which are the wire's: a SUB does not tell from whom a message came, so workers that connect out must differ in their topics
    (main refuses the second of a kind); nobody tells when one of them connects, so that a restart shows only by its sequence
    going back or by `startup_time`; and events published before the engine reached us come by replay or not at all. The replay
    socket is bound by the engine in any case and is looked for at the host of the worker's URL.
Source: spec/kv_events.md 1.1.
"""

import contextlib
import logging
import os
import threading
from urllib.parse import urlsplit

import zmq

from sglfast.errors import ConfigError
from sglfast.wire.server_info import zmq_endpoint

_ROUND_MESSAGES = 1000
_MAX_MESSAGE_BYTES = 256 << 20


def listen_endpoint(base: str, rank: int) -> str:
    """Where the engines' rank `rank` arrives, for the `--kv-listen` value `base`. Raises: ConfigError when there is no such port."""
    try:
        parts = urlsplit(base)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    endpoint = zmq_endpoint(host, port + rank) if host and port else None
    if endpoint is None or not base.startswith("tcp://"):
        raise ConfigError(f"--kv-listen {base}: must look like tcp://0.0.0.0:5557 (rank {rank} uses its port + {rank})")
    return endpoint


class Listener:
    """Listens at `endpoint`; subscribers connect to `inner`. Raises zmq.ZMQError when the address cannot be bound,
    and OSError when there are too many open files."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, log: logging.Logger) -> None:
        self.inner = "inproc://kv-listen-" + endpoint
        self._log = log
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self._source = context.socket(zmq.SUB)
            self._target = context.socket(zmq.PUB)
        except zmq.ZMQError:
            os.close(self._stop_fd)
            raise
        try:
            for made in (self._source, self._target):
                made.setsockopt(zmq.LINGER, 0)
            self._source.setsockopt(zmq.RCVHWM, 0)  # a burst waits in our memory, see subscriber.connect
            self._source.setsockopt(zmq.MAXMSGSIZE, _MAX_MESSAGE_BYTES)
            self._source.setsockopt(zmq.IPV6, int(endpoint.startswith("tcp://[")))
            self._source.setsockopt(zmq.TCP_KEEPALIVE, 1)
            self._source.setsockopt(zmq.SUBSCRIBE, b"")
            self._target.setsockopt(zmq.SNDHWM, 0)
            self._target.bind(self.inner)
            self._source.bind(endpoint)
        except zmq.ZMQError:
            self._close_sockets()
            os.close(self._stop_fd)
            raise
        self._thread = threading.Thread(target=self._run, name=f"kv-listen {endpoint}", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float) -> bool:
        """End the thread, which closes the sockets; False when it did not end in time."""
        os.eventfd_write(self._stop_fd, 1)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            return False
        os.close(self._stop_fd)
        return True

    def _close_sockets(self) -> None:
        self._source.close(linger=0)
        self._target.close(linger=0)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._stop_fd, zmq.POLLIN)
        poller.register(self._source, zmq.POLLIN)
        try:
            while self._stop_fd not in dict(poller.poll()):
                with contextlib.suppress(zmq.Again):
                    for _ in range(_ROUND_MESSAGES):
                        self._target.send_multipart(self._source.recv_multipart(zmq.NOBLOCK, copy=False), copy=False)
        except Exception:
            self._log.exception("KV events of engines that connect out are not received any more")
        finally:
            self._close_sockets()
