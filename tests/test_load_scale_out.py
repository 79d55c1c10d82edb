"""load/scale_out.py: the demo of a worker that joins, with the real programs, and what it says when a step fails."""

import http.server
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import orjson
import pytest

from sglfast.load import scale_out
from sglfast.load.scale_out import ScaleOut, add_worker, last_progress
from sglfast.load.stack import StackError
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH

ROOT = Path(__file__).parent.parent


def test_progress_is_read_from_the_last_line() -> None:
    assert last_progress("INFO x\n") is None
    text = "weights: 1 %, 100 of 9000 bytes from 127.0.0.1:7\nINFO x\nweights: 50 %, 4500 of 9000 bytes from [::1]:8\nweights: 51 %, 4"
    assert last_progress(text) == (4500, 9000, "[::1]:8")


@contextmanager
def router(answers: dict[str, list[tuple[int, bytes]]]) -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """A stand-in that answers /workers by method, the last answer again and again; yields its URL and what it was sent."""
    seen: list[tuple[str, bytes]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            seen.append((f"{self.command} {self.path}", body))
            left = answers[self.command]
            status, answer = left.pop(0) if len(left) > 1 else left[0]
            self.send_response(status)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_POST = do_GET

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", seen
        finally:
            server.shutdown()
            thread.join()


def listing(*workers: tuple[str, bool]) -> tuple[int, bytes]:
    return 200, orjson.dumps({"workers": [{"url": url, "is_healthy": is_healthy} for url, is_healthy in workers]})


def test_a_worker_is_added_and_waited_for() -> None:
    gets = [listing(("http://a", True)), listing(("http://a", True), ("http://b", False)), listing(("http://a", True), ("http://b", True))]
    with router({"POST": [(202, b"{}")], "GET": gets}) as (url, seen):
        add_worker(url, "http://b", timeout_s=20)
    assert seen == [("POST /workers", b'{"url":"http://b"}')] + [("GET /workers", b"")] * 3


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"POST": [(404, b"no such path")]}, "POST /workers answers 404, not 202: no such path"),
        ({"POST": [(202, b"{}")], "GET": [listing(("http://b", False))]}, r"did not take http://b within 0 s; GET /workers: 200 .*false"),
        ({"POST": [(202, b"{}")], "GET": [(503, b"down")]}, "GET /workers: 503 down"),
    ],
)
def test_a_router_that_does_not_take_it_is_quoted(answers: dict[str, list[tuple[int, bytes]]], message: str) -> None:
    with router(answers) as (url, _), pytest.raises(StackError, match=message):
        add_worker(url, "http://b", timeout_s=0.2)


def test_nobody_answers() -> None:
    with pytest.raises(StackError, match=r"POST http://127\.0\.0\.1:1/workers: "):
        add_worker("http://127.0.0.1:1", "http://b")


# ---- the real programs ----


def test_a_second_worker_copies_from_the_first() -> None:
    size_bytes = 6 << 20
    seen: list[tuple[int, int, str]] = []
    with ScaleOut(4, DEMO_TOKENIZER_PATH, host="127.0.0.1", port=0, model_bytes=size_bytes, bandwidth_bytes_per_s=16e6) as stack:
        url = stack.start_target(lambda child: seen.append(found) if (found := last_progress(child.output())) is not None else None)
        weights = []
        for worker in stack.worker_urls:
            with urllib.request.urlopen(worker + "/sim/stats", timeout=30) as answer:
                weights.append(orjson.loads(answer.read())["weights"])
    assert stack.worker_urls[1] == url
    assert [one["role"] for one in weights] == ["seed", "target"]
    assert weights[0]["sent"] == weights[1]["copied"] == size_bytes
    assert weights[1]["source"] == weights[0]["endpoint"]
    copied = [done for done, _, _ in seen]
    assert 0 < copied[0] <= copied[-1] <= size_bytes
    assert copied == sorted(copied)
    assert {(whole, source) for _, whole, source in seen} == {(size_bytes, weights[0]["endpoint"])}


def test_demo() -> None:
    """From nothing to requests on both workers, in one command."""
    command = [sys.executable, "-m", "sglfast", "demo", "--scale-out", "--port", "0", "--once"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"weights: \d+ of 64 MiB from 127\.0\.0\.1:\d+\n", done.stdout)
    shares = re.search(rf"{scale_out.REQUESTS} requests: (\d+) and (\d+) of them on the two workers", done.stdout)
    assert shares, done.stdout
    assert all(int(share) > 0 for share in shares.groups())
    assert sum(map(int, shares.groups())) == scale_out.REQUESTS
    assert re.search(r"sglfast modelexpress sources --url 127\.0\.0\.1:\d+", done.stdout)
