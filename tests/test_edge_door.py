"""sglfast.edge.door: how many clients come in, how fast, and what happens when there is no room."""

import asyncio
import itertools
import os
import resource
import socket
import ssl
import time
from typing import Any

import pytest
import trustme
from edge_harness import Edge, Memory, run, settled, shard_in_loop, wait_until
from raw_client import WAIT_S, Client, many, post, request
from scripted_worker import Worker

from sglfast import _counters as c
from sglfast.config import ServeConfig
from sglfast.edge.door import Door, most_clients

HEALTH = request("GET", "/health")


def leave_files(edge: Edge, free: int) -> None:
    """Let the shard open so many further descriptors and no more."""
    taken = set(map(int, os.listdir(f"/proc/{edge.process.pid}/fd")))
    limit = next(itertools.islice((number for number in itertools.count() if number not in taken), free, None))
    _, hard = resource.prlimit(edge.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(edge.process.pid, resource.RLIMIT_NOFILE, (limit, hard))


@pytest.mark.parametrize(("files", "expected"), [(1 << 20, 32768), (20_000, 17_436), (1024, 832), (40, 1)])
def test_clients_leave_descriptors_for_workers(files: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))
    assert most_clients(ServeConfig()) == expected
    assert most_clients(ServeConfig(max_connections=1)) == 1


def test_without_descriptors_who_is_in_is_served(worker: Worker) -> None:
    """New connections are closed, the log says so once, the loop does not spin; with descriptors all is as before."""
    with Edge([worker]) as edge, settled(edge):
        edge.allowed_log = ("no descriptor is free",)
        assert edge.ask(post(b"1")).body == b"1"
        wait_until(lambda: edge.word(c.S_CONNECTIONS) == 0, "the first client has left")
        leave_files(edge, 10)
        with many(30, edge.port) as clients:
            wait_until(lambda: "no descriptor is free" in edge.log(), "the log says that new connections are closed")
            states = []
            for client in clients:
                client.send_what_fits(HEALTH)
                try:
                    states.append(client.read_answer().status)
                except (EOFError, ConnectionError):
                    states.append(0)
            assert set(states) == {200, 0}
            assert states.count(200) == 10
            served = clients[states.index(200)]
            before_s = edge.cpu_s()
            time.sleep(1.0)
            assert edge.cpu_s() - before_s < 0.3, "a full shard rests"
            assert served.ask(post(b"2")).body == b"2", "its connection to the worker is still there"
        wait_until(lambda: edge.word(c.S_CONNECTIONS) == 0, "all have left")
        assert edge.ask(post(b"3")).body == b"3"
        assert edge.log().count("no descriptor is free") == 1


def test_no_socket_for_a_worker_is_not_the_workers_fault(worker: Worker) -> None:
    with Edge([worker]) as edge, settled(edge), edge.client() as client:
        assert client.ask(HEALTH).status == 200
        leave_files(edge, 0)
        found = client.ask(post(b"1"))
        assert (found.status, found.code) == (503, "too_many_connections")
        assert found.header("retry-after")
        assert [edge.worker_word(0, word) for word in (c.W_CONNECT_ERRORS, c.W_ERRORS)] == [0, 0]
        leave_files(edge, 100)
        assert client.ask(post(b"2")).body == b"2"


def test_who_is_refused_does_not_hold_what_others_need(worker: Worker) -> None:
    """A crowd above the limit: everybody is answered or closed; only some may take their time to read the answer."""
    with Edge([worker], max_connections=3) as edge, settled(edge):
        edge.allowed_log = ("connections above 3 are refused",)
        with many(3, edge.port) as inside:
            assert [client.ask(HEALTH).status for client in inside] == [200] * 3
            with many(300, edge.port) as crowd:
                wait_until(lambda: edge.word(c.S_REASONS + 24) == 300, "all are refused")
                assert edge.word(c.S_CONNECTIONS) <= 3 + 64 + 5
                for client in crowd:
                    found = client.read_answer()
                    assert (found.status, found.code) == (503, "too_many_connections")
            assert [client.ask(post(b"1")).body for client in inside] == [b"1"] * 3
        assert edge.log().count("are refused") == 1


def test_those_who_wait_are_let_in_by_the_tick() -> None:
    """The loop takes one connection a turn; a tick takes many."""

    async def test() -> None:
        shard = shard_in_loop(Memory(["http://127.0.0.1:9"]))
        with socket.create_server(("127.0.0.1", 0), backlog=256) as listener:
            listener.setblocking(False)
            door = Door(shard, listener)
            door.take_waiting()  # not open yet
            await door.open()
            clients = [socket.create_connection(listener.getsockname()) for _ in range(100)]
            door.take_waiting()
            while not len(shard.clients):  # noqa: ASYNC110 - real sockets, bounded by `run`
                await asyncio.sleep(0)
            assert 64 <= len(shard.clients) < 80
            while len(shard.clients) < 100:  # noqa: ASYNC110
                await asyncio.sleep(0)
            for connection in shard.clients:
                inner = connection.transport.get_extra_info("socket")
                assert inner.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == 128 << 10
                assert inner.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            clients[0].sendall(HEALTH)
            clients[99].sendall(HEALTH)
            for client in (clients[0], clients[99]):
                client.setblocking(False)
                assert (await shard.loop.sock_recv(client, 1000)).startswith(b"HTTP/1.1 200 ")
            door.close()
            for client in clients:
                client.close()
            while len(shard.clients):  # noqa: ASYNC110
                await asyncio.sleep(0)

    run(test())


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder, issued = tmp_path_factory.mktemp("tls"), trustme.CA().issue_cert("localhost")
    issued.private_key_pem.write_to_path(folder / "key")
    issued.cert_chain_pems[0].write_to_path(folder / "cert")
    return {"tls_cert_path": str(folder / "cert"), "tls_key_path": str(folder / "key")}


def in_tls(client: Client) -> Client:
    """The same client after its handshake; nobody is checked."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    client.sock = context.wrap_socket(client.sock)
    return client


def test_a_handshake_that_does_not_go_on_is_cut(worker: Worker, tls: dict[str, str]) -> None:
    settings: dict[str, Any] = {**tls, "header_timeout_secs": 0.5}
    with Edge([worker], **settings) as edge, settled(edge), Client(edge.port) as silent, Client(edge.port) as begun:
        begun.send(b"\x16\x03\x01\x02\x00")
        start = time.monotonic()
        for client in (silent, begun):
            with client:
                assert client.has_ended()
        assert 0.3 < time.monotonic() - start < WAIT_S - 1


def test_handshakes_count_as_clients(worker: Worker, tls: dict[str, str]) -> None:
    settings: dict[str, Any] = {**tls, "max_connections": 3, "header_timeout_secs": 60.0}
    with Edge([worker], **settings) as edge, settled(edge):
        edge.allowed_log = ("connections above 3 are refused",)
        with many(3, edge.port) as inside:
            for client in inside:
                assert in_tls(client).ask(HEALTH).status == 200
            with many(63, edge.port):
                with Client(edge.port) as above:
                    assert in_tls(above).read_answer().code == "too_many_connections"
                with many(40, edge.port) as crowd:
                    wait_until(lambda: sum(not client.is_silent(0.01) for client in crowd) >= 38, "who could not even be told is closed")
                assert inside[0].ask(post(b"1")).body == b"1"
            wait_until(lambda: edge.word(c.S_CONNECTIONS) == 3, "who was above has left")
        wait_until(lambda: edge.word(c.S_CONNECTIONS) == 0, "all have left")
        with edge.client() as client:
            assert in_tls(client).ask(post(b"2")).body == b"2", "handshakes that came to nothing count no more"


def test_without_descriptors_handshakes_wait(worker: Worker, tls: dict[str, str]) -> None:
    with Edge([worker], **tls) as edge, settled(edge):  # type: ignore[arg-type]
        edge.allowed_log = ("no descriptor is free",)
        with edge.client() as first:
            assert in_tls(first).ask(HEALTH).status == 200
            leave_files(edge, 0)
            with edge.client() as second:
                wait_until(lambda: "no descriptor is free: new connections wait" in edge.log(), "the log says so")
                before_s = edge.cpu_s()
                time.sleep(1.0)
                assert edge.cpu_s() - before_s < 0.3, "a full shard rests"
                leave_files(edge, 100)
                assert in_tls(second).ask(HEALTH).status == 200
