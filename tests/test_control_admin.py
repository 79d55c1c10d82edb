"""Control's socket: answers its own user's processes, and nobody else."""

import asyncio
import os
import re
import signal
import socket
import sys
from functools import partial
from pathlib import Path

import pytest
from control_doubles import WAIT_S, Remembered, no_task_is_left, remembering_log
from router_process import engine, get, running
from shared_memory import forked

from sglfast.config import ServeConfig
from sglfast.control.admin import AdminServer
from sglfast.control.admin_keys import AdminKeys
from sglfast.control.metrics import CONTENT_TYPE


def ask(path: str = "/metrics", uid: int | None = None) -> tuple[str, Remembered]:
    """The answer that another process gets, as user `uid` if one is given, and control's log."""

    def get(address: str) -> str:
        if uid is not None:
            os.setuid(uid)
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(WAIT_S)
        client.connect("\0" + address.removeprefix("@"))
        client.sendall(f"GET {path} HTTP/1.1\r\nhost: control\r\nconnection: close\r\n\r\n".encode())
        return client.makefile(newline="").read()

    def ask_from_outside(address: str) -> str:
        with forked(partial(get, address)) as child:
            return str(child.result())

    async def run() -> tuple[str, Remembered]:
        log, seen = remembering_log()
        async with no_task_is_left():
            server = AdminServer(lambda: b"sglfast_state 1.0\n", AdminKeys(ServeConfig()), log)
            await server.start(ServeConfig())
            try:
                return await asyncio.to_thread(ask_from_outside, server.address), seen
            finally:
                await server.close()

    return asyncio.run(run())


def test_metrics_as_prometheus_wants_them() -> None:
    head, _, body = ask()[0].partition("\r\n\r\n")
    lines = head.lower().split("\r\n")
    assert lines[0] == "http/1.1 200 ok"
    assert f"content-type: {CONTENT_TYPE}" in lines
    assert "content-length: 18" in lines
    assert body == "sglfast_state 1.0\n"


ENGINE_ARGV = [sys.executable, "-m", "sglfast", "serve", "--shards", "1", "--prometheus-host", "127.0.0.1", "--prometheus-port", "0"]
INFO = ("/server_info", "/get_server_info", "/model_info", "/get_model_info", "/health_generate")
METRICS = ("/metrics", "/engine_metrics")


@pytest.mark.parametrize(
    ("flags", "main", "own"),
    [
        ((), {*METRICS, *INFO, "/workers"}, {"metrics": {*METRICS}}),
        (("--main-port-paths", "no-metrics"), {*INFO, "/workers"}, {"metrics": {*METRICS}}),
        (
            ("--main-port-paths", "data", "--admin-port", "0"),
            set(),
            {"metrics": {*METRICS}, "administration": {*METRICS, *INFO, "/workers"}},
        ),
    ],
)
def test_which_paths_are_where(flags: tuple[str, ...], main: set[str], own: dict[str, set[str]], tmp_path: Path) -> None:
    with engine() as url, running(tmp_path, ENGINE_ARGV, *flags, worker=url) as router:
        router.until_listening()
        router.until(lambda: get(router.port, "/readyz")[0] == 200, "ready")

        def served(port: int) -> set[str]:
            return {path for path in (*METRICS, *INFO, "/workers") if get(port, path)[0] != 404}

        assert served(router.port) == main
        assert get(router.port, "/v1/models")[0] == get(router.port, "/health")[0] == 200
        found: list[tuple[str, str]] = re.findall(r"(\w+) has an address of its own url=\S+:(\d+)", router.err)
        assert {what: served(int(port)) for what, port in found} == own
        assert "sglfast_" in get(int(dict(found)["metrics"]), "/metrics")[1]
        router.signal(signal.SIGTERM)
        assert router.end() == 0


def test_other_paths_are_not_there() -> None:
    assert ask("/workers")[0].startswith("HTTP/1.1 404")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to become another user")
def test_another_user_is_refused() -> None:
    answer, seen = ask(uid=65534)
    assert answer.startswith("HTTP/1.1 403")
    assert "sglfast_state" not in answer
    assert "another user" in seen.text


def test_a_socket_that_was_never_served_is_released() -> None:
    async def run() -> None:
        log, _ = remembering_log()
        server = AdminServer(lambda: b"", AdminKeys(ServeConfig()), log)
        assert server.address.startswith("@sglfast-")
        await server.close()

    asyncio.run(run())
