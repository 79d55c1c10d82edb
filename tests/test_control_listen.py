"""Listening sockets of the shards: one address, one group, and a port that somebody has is refused with a clear text."""

import socket

import pytest

from sglfast.control.listen import listen, url_of
from sglfast.errors import ConfigError


def close(listeners: list[socket.socket]) -> None:
    for listener in listeners:
        listener.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "[::1]", "localhost"])
def test_all_sockets_of_port_0_listen_on_one_port_and_share_the_connections(host: str) -> None:
    listeners = listen(host, 0, 3)
    clients: list[socket.socket] = []
    try:
        ports = {listener.getsockname()[1] for listener in listeners}
        assert len(ports) == 1
        for _ in range(90):
            clients.append(socket.create_connection(listeners[0].getsockname()[:2], timeout=5))
        accepted = []
        for listener in listeners:
            count = 0
            while True:
                try:
                    listener.accept()[0].close()
                except BlockingIOError:
                    break
                count += 1
            accepted.append(count)
        assert sum(accepted) == 90
        assert all(accepted), "the kernel gave a socket nothing: they are not in one group"  # chance of it: 3 * (2/3)^90
    finally:
        close(clients + listeners)


def test_a_port_of_another_is_refused_even_when_it_would_share_it() -> None:
    """Two routers of one user must not share a port by accident: half of the requests would go to either."""
    for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        other = socket.socket()
        try:
            other.setsockopt(socket.SOL_SOCKET, option, 1)
            other.bind(("127.0.0.1", 0))
            other.listen()
            port = other.getsockname()[1]
            with pytest.raises(ConfigError, match=f"port {port} is in use on 127.0.0.1: give another --port"):
                listen("127.0.0.1", port, 2)
        finally:
            other.close()


def test_a_given_port_is_taken_and_free_again_after_close() -> None:
    first = listen("127.0.0.1", 0, 1)
    port = first[0].getsockname()[1]
    close(first)
    second = listen("127.0.0.1", port, 2)
    try:
        assert [listener.getsockname()[1] for listener in second] == [port, port]
        # What is inherited by name on the command line must not be inherited by others by accident.
        assert not any(listener.get_inheritable() for listener in second)
    finally:
        close(second)


def test_all_ipv6_addresses_means_ipv4_too() -> None:
    listeners = listen("::", 0, 1)
    try:
        socket.create_connection(("127.0.0.1", listeners[0].getsockname()[1]), timeout=5).close()
    finally:
        close(listeners)


@pytest.mark.parametrize(
    ("host", "text"),
    [
        ("192.0.2.1", "no address of this machine"),
        ("no-such-host.invalid", "cannot be resolved"),
        ("a" * 300, "cannot be resolved"),
        ("127.0.0.1:30000", "give the port with --port"),
    ],
)
def test_a_host_that_cannot_be_had_is_named(host: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.getaddrinfo

    def without_dns(name: str, *args: int, **more: int) -> object:
        if name.endswith(".invalid"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return real(name, *args, **more)

    monkeypatch.setattr(socket, "getaddrinfo", without_dns)
    with pytest.raises(ConfigError, match=f"--host {host}: .*{text}"):
        listen(host, 0, 1)


def test_url_puts_ipv6_in_brackets() -> None:
    assert url_of("::1", 1) == url_of("[::1]", 1) == "http://[::1]:1"
    assert url_of("127.0.0.1", 80) == "http://127.0.0.1:80"
