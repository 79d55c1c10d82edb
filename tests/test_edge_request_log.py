"""sglfast.edge.request_log: one line a request, whatever becomes of it, and never a wait for its reader."""

import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from edge_harness import Edge, Memory, run, settled, shard_in_loop, stub_client, stub_upstream, wait_until
from raw_client import chunk, post
from scripted_worker import SSE_HEAD, Call, Script, Worker, answer, echoes, says, then_closes

from sglfast.config import ServeConfig
from sglfast.edge.request_log import RequestLog


@contextmanager
def logged(worker: Worker, log_format: str, request_log: str = "all", **settings: Any) -> Iterator[Edge]:
    with Edge([worker], log_format=log_format, request_log=request_log, **settings) as edge:
        edge.allowed_log = ("request",)
        with settled(edge):
            yield edge


def lines(edge: Edge, count: int) -> list[str]:
    """The request lines, once there are so many."""

    def found() -> list[str]:
        return [line for line in edge.log().splitlines() if "outcome" in line]

    wait_until(lambda: len(found()) >= count, lambda: f"{count} lines, not {edge.log()!r}")
    assert len(found()) == count
    return found()


def text_fields(line: str) -> dict[str, str]:
    assert re.match(r"\d\d:\d\d:\d\d\.\d{3} INFO    shard0: request request_id=", line), line
    return dict(part.split("=", 1) for part in line.partition("request ")[2].split(" "))


def test_text(worker: Worker) -> None:
    with logged(worker, "text") as edge:
        worker.plan(says(answer(b"12345")))
        edge.ask(post(b"123", "x-request-id: my-id"))
        fields = text_fields(lines(edge, 1)[0])
        times = [float(fields.pop(name)) for name in ("ttft_ms", "latency_ms")]
        assert 0 < times[0] <= times[1] < 8000
        assert fields == {
            "request_id": "my-id", "path": "/v1/chat/completions", "model": "demo", "worker": worker.url, "decision": "round_robin",
            "status": "200", "bytes_in": "3", "bytes_out": "5", "outcome": "ok",
        }  # fmt: skip


def cut(call: Call) -> None:
    call.send(SSE_HEAD + chunk(b"data: 1\n\n"))
    call.close()


OUTCOMES: dict[str, tuple[Script, int]] = {
    "ok": (says(answer()), 200),
    "client_error": (says(answer(status="400 Bad")), 400),
    "busy": (says(answer(status="429 Busy")), 429),
    "error": (then_closes(b""), 502),
    "cut": (cut, 200),
}


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_json_says_what_came_of_it(outcome: str, worker: Worker) -> None:
    script, status = OUTCOMES[outcome]
    with logged(worker, "json") as edge:
        worker.plan(script)
        with edge.client() as client:
            client.send(post())
            client.read_until(b"\r\n\r\n" if outcome != "cut" else b"upstream_body_incomplete")
        row = json.loads(lines(edge, 1)[0])
        assert (row["outcome"], row["status"]) == (outcome, status)
        assert (row["level"], row["process"], row["message"]) == ("info", "shard0", "request")
        assert abs(row["ts"] - time.time()) < 60
        assert re.fullmatch("[0-9a-f]{32}", row["request_id"])
        assert row["model"] == "demo"


def test_a_client_that_leaves(worker: Worker) -> None:
    with logged(worker, "json") as edge:
        worker.plan(lambda call: call.wait_for_end())
        with edge.client() as client:
            client.send(post())
            worker.wait_calls(1)
        assert json.loads(lines(edge, 1)[0])["outcome"] == "cancelled"


def test_nobody_to_ask(worker: Worker) -> None:
    with logged(worker, "json") as edge:
        edge.put(0, state=3, is_new=False)
        edge.ask(post())
        row = json.loads(lines(edge, 1)[0])
        assert (row["outcome"], row["status"]) == ("refused", 503)
        assert "worker" not in row
        edge.put(0, is_new=False)


@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize(
    "odd", ['a" outcome="ok', "a\\b", "a b=c", "x" * 3000, "\xe9\xff"], ids=["quote", "backslash", "blank", "long", "bytes"]
)
def test_an_id_cannot_forge_fields(odd: str, log_format: str, worker: Worker) -> None:
    with logged(worker, log_format) as edge:
        worker.plan(echoes)
        assert edge.ask(post(b"{}", f"x-request-id: {odd}")).status == 200
        line = lines(edge, 1)[0]
        if log_format == "json":
            assert json.loads(line)["request_id"] == odd[:1024]
            assert json.loads(line)["outcome"] == "ok"
        else:
            assert (
                f"request_id={json.dumps(odd[:1024], ensure_ascii=False) if not odd.isalnum() or not odd.isascii() else odd[:1024]} "
                in line
            )


@pytest.mark.parametrize("is_ready", [True, False], ids=["answered", "refused"])
def test_a_line_with_an_odd_id_has_the_same_fields(is_ready: bool, worker: Worker) -> None:
    with logged(worker, "json") as edge:
        worker.plan(echoes)
        if not is_ready:
            edge.put(0, state=3, is_new=False)
        edge.ask(post(b"{}", "x-request-id: plain"))
        edge.ask(post(b"{}", 'x-request-id: "odd"'))
        plain, odd = (json.loads(line) for line in lines(edge, 2))
        assert list(odd) == list(plain)
        changing = ("ts", "request_id", "ttft_ms", "latency_ms")
        assert [odd[name] for name in odd if name not in changing] == [plain[name] for name in plain if name not in changing]
        edge.put(0, is_new=False)


def test_only_errors(worker: Worker) -> None:
    with logged(worker, "text", "errors") as edge:
        worker.plan(echoes)
        edge.ask(post())
        worker.plan(says(answer(status="500 Oops")))
        edge.ask(post())
        assert text_fields(lines(edge, 1)[0])["status"] == "500"


def test_off(worker: Worker) -> None:
    with logged(worker, "text", "off") as edge:
        worker.plan(echoes)
        edge.ask(post())
        time.sleep(0.3)
        assert "outcome" not in edge.log()


def test_a_reader_that_sleeps_costs_lines_not_time() -> None:
    reading, writing = socket.socketpair()
    reading.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    writing.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)

    log = RequestLog(ServeConfig(log_format="json"), "shard0", writing.fileno())

    async def inside() -> None:
        shard = shard_in_loop(Memory(["http://127.0.0.1:1"]))
        shard.request_log = log
        client, _ = stub_client(shard)
        connection, _ = stub_upstream(shard)
        for _ in range(25_000):
            client.data_received(post(b"{}"))
            connection.data_received(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

    run(inside())
    lost = log.newly_lost()
    assert 1000 < lost < 25_000
    assert log.newly_lost() == 0
    log.retire()
    seen: list[dict[str, Any]] = []
    reading.settimeout(8)
    data = b""
    while len(seen) < 25_000 - lost - 400:  # what the last batch, which was not full, lost is not among them
        data += reading.recv(65536)
        *whole, data = data.split(b"\n")
        seen += [json.loads(line) for line in whole]
    assert {row["outcome"] for row in seen} == {"ok"}
    reading.close()
    writing.close()


def test_lines_go_to_standard_error_and_to_the_file(worker: Worker, tmp_path: Path) -> None:
    with logged(worker, "text", log_dir=str(tmp_path)) as edge:
        worker.plan(echoes)
        edge.ask(post(b"{}", "x-request-id: one"))
        edge.ask(post(b"{}", "x-request-id: two"))
        written = lines(edge, 2)
        (path,) = tmp_path.iterdir()
        wait_until(lambda: path.read_text().splitlines() == written, lambda: path.read_text())


def test_a_folder_that_cannot_be_written_costs_the_file_only(worker: Worker, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with Edge([worker], request_log="all", log_dir=str(tmp_path / "file" / "logs")) as edge:
        edge.allowed_log = ("request",)
        with settled(edge):
            worker.plan(echoes)
            assert edge.ask(post()).status == 200
            wait_until(lambda: "outcome=ok" in edge.log(), edge.log)
            assert "cannot be written (Not a directory); requests are logged to standard error only" in edge.log()
