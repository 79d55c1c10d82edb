"""What one client may have in flight, so that it cannot take the service from the others.

Runs in: the metadata service's loop. Contract: `enter` and `leave` in pairs; a client that has nothing in flight costs nothing.
A client is an address without its port: all processes of one host share a limit, which must therefore hold the ranks of a whole host.
"""

from urllib.parse import unquote


class TooMuchError(Exception):
    """A limit is reached; the text names it."""


class ClientLimits:
    """calls, inflight_bytes: at most this much of one client at a time."""

    def __init__(self, calls: int, inflight_bytes: int) -> None:
        self._calls_max, self._bytes_max = calls, inflight_bytes
        self._inflight: dict[str, tuple[int, int]] = {}

    def __len__(self) -> int:
        """Clients with something in flight."""
        return len(self._inflight)

    def enter(self, client: str, size_bytes: int) -> None:
        """A request has come. Raises TooMuchError; then `leave` is not to be called."""
        calls, inflight = self._inflight.get(client, (0, 0))
        if calls >= self._calls_max:
            raise TooMuchError(f"{client} has {calls} calls in flight, the limit is {self._calls_max} (--max-calls-per-client)")
        if inflight + size_bytes > self._bytes_max:
            raise TooMuchError(
                f"{client} has {inflight} bytes in flight and sends {size_bytes} more, the limit is {self._bytes_max} "
                "(--max-inflight-bytes-per-client)"
            )
        self._inflight[client] = calls + 1, inflight + size_bytes

    def leave(self, client: str, size_bytes: int) -> None:
        """It was answered, or is given up."""
        calls, inflight = self._inflight[client]
        if calls == 1:
            del self._inflight[client]
        else:
            self._inflight[client] = calls - 1, inflight - size_bytes


def client_of(peer: str) -> str:
    """The address in what gRPC calls a peer: `ipv4:10.0.0.5:40112` is 10.0.0.5."""
    kind, _, rest = peer.partition(":")
    if kind not in ("ipv4", "ipv6"):
        return peer
    return unquote(rest).rpartition(":")[0].strip("[]")
