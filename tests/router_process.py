"""A whole router as a process of its own, for tests, and a worker behind it that echoes."""

import contextlib
import http.client
import json
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from control_doubles import ROOT, WAIT_S

WORKER = "http://127.0.0.1:9"  # nothing listens there


class Router:
    """A running control. err: what it and its children have written to standard error so far."""

    def __init__(self, process: "subprocess.Popen[str]", err_path: Path) -> None:
        self.process = process
        self._err_path = err_path
        self.port = 0

    @property
    def err(self) -> str:
        return self._err_path.read_text()

    def until(self, is_true: Callable[[], object], what: str) -> None:
        end_s = time.monotonic() + WAIT_S
        while not is_true():
            assert time.monotonic() < end_s, f"waited {WAIT_S:g} s in vain: {what}\n{self.err}"
            time.sleep(0.01)

    def until_listening(self) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("listening on http://"), f"{line!r}\n{self.err}"
        self.port = int(line.split()[2].rpartition(":")[2])

    def children(self) -> list[int]:
        return [int(pid) for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()]

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        """Wait for the exit code."""
        return self.process.wait(WAIT_S)

    @contextlib.contextmanager
    def saying(self, line: str) -> Iterator[socket.socket]:
        """A connection to a stand-in shard that was sent this line."""
        with socket.create_connection(("127.0.0.1", self.port), WAIT_S) as client:
            client.sendall(line.encode() + b"\n")
            yield client


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


@contextlib.contextmanager
def running(tmp_path: Path, argv: list[str], *flags: str, worker: str | None = WORKER) -> Iterator[Router]:
    argv = [*argv, *(("--worker-urls", worker) if worker is not None else ()), "--host", "127.0.0.1", "--port", "0", *flags]
    err_path = tmp_path / "stderr.txt"
    with open(err_path, "w") as err:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=err, cwd=ROOT, text=True)
    with process:
        try:
            yield Router(process, err_path)
        finally:
            process.kill()


class Engine(BaseHTTPRequestHandler):
    """A worker that is healthy, tells its name and echoes."""

    def do_GET(self) -> None:
        self._answer({"served_model_name": "m1"} if self.path == "/server_info" else {})

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["content-length"]))))

    def _answer(self, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None: ...


@contextlib.contextmanager
def engine() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Engine) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def get(port: int, path: str, body: object = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)
    try:
        connection.request("GET" if body is None else "POST", path, None if body is None else json.dumps(body))
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()
