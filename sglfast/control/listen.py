"""The listening sockets: one for each shard on one address, made by control so that they outlive a shard.

Runs in: control, once at start. Contract: all sockets are of one SO_REUSEPORT group and listen already, so the kernel spreads connections
    over them from the start; what arrives before a shard is up, or while it is started again, waits in its queue.
"""

import contextlib
import errno
import os
import socket

from sglfast.errors import ConfigError

_BACKLOG = 4096  # connections that wait for a shard; the kernel lowers it to net.core.somaxconn


def listen(host: str, port: int, count: int) -> list[socket.socket]:
    """`count` listening sockets on one address; port 0 picks a free port for all of them.

    Raises ConfigError when the address cannot be had. Nothing is left open then.
    """
    family, address = _resolve(host, port)
    with contextlib.ExitStack() as made:
        try:
            if address[1]:
                # SO_REUSEPORT would let us share the port with another router of the same user: ask without it first.
                _listener(family, address, is_shared=False).close()
            first = made.enter_context(_listener(family, address, is_shared=True))
            address = (address[0], first.getsockname()[1], *address[2:])
            listeners = [first, *(made.enter_context(_listener(family, address, is_shared=True)) for _ in range(count - 1))]
        except OSError as error:
            raise ConfigError(_explain(error, host, port)) from None
        made.pop_all()
        return listeners


def url_of(host: str, port: int) -> str:
    """The URL to print for an address; an IPv6 address stands in brackets."""
    host = host.strip("[]")
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int, *tuple[int, ...]]]:
    """Family and address of a host name or address. A name with both families means IPv4, as most clients of `localhost` do."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no host name"
        advice = "give the port with --port" if host.count(":") == 1 else "give an address of this machine, such as 0.0.0.0"
        raise ConfigError(f"--host {host}: cannot be resolved ({reason}); {advice}") from None
    found.sort(key=lambda row: row[0] != socket.AF_INET)
    family, _, _, _, address = found[0]
    return family, (str(address[0]), int(address[1]), *(int(part) for part in address[2:]))


def _listener(family: socket.AddressFamily, address: tuple[str, int, *tuple[int, ...]], *, is_shared: bool) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setblocking(False)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # `::` means all addresses, IPv4 too
        listener.bind(address)
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def _explain(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is in use on {host}: give another --port, or --port 0 for a free one"
    if error.errno == errno.EACCES:
        return f"--port {port}: this user may not listen on it; give a --port of 1024 or higher"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"--host {host}: is no address of this machine; 0.0.0.0 means all of them"
    return f"--host {host} --port {port}: cannot listen there ({os.strerror(error.errno or 0)})"
