"""A router whose standard error nobody reads: it serves, checks and administers as before, and counts what it could not say."""

import fcntl
import json
import os
import re
import subprocess
import sys
import time

from control_doubles import ROOT, WAIT_S
from raw_client import Client, post, request
from router_process import Router, engine, get

LINES_MAX_BYTES = 4 << 20  # what waits in each process


def lost_lines(router: Router) -> int:
    found = re.search(r"^sglfast_log_lines_lost_total (\S+)$", get(router.port, "/metrics")[1], re.MULTILINE)
    assert found
    return int(float(found[1]))


def test_requests_checks_and_administration_go_on(tmp_path: object) -> None:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    argv = [sys.executable, "-m", "sglfast", "serve", "--host", "127.0.0.1", "--port", "0", "--shards", "1", "--log-level", "debug"]
    process = subprocess.Popen(
        [*argv, "--health-check-interval-secs", "0.2", "--health-failure-threshold", "1"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=writing, cwd=ROOT, text=True,
    )  # fmt: skip
    os.close(writing)
    router = Router(process, None)  # type: ignore[arg-type]
    with process:
        try:
            assert process.stdout is not None
            router.port = int(process.stdout.readline().split()[2].rpartition(":")[2])
            # There are no workers: each request is refused and leaves a line of a kilobyte.
            asked = post(b"{}", "x-request-id: " + "i" * 1000)
            with Client(router.port) as client:
                for _ in range(60):
                    client.send(asked * 100)
                    for _ in range(100):
                        assert client.read_answer().status == 503
                begun = time.monotonic()
                while lost_lines(router) <= 500 and time.monotonic() - begun < WAIT_S:
                    time.sleep(0.05)
                assert lost_lines(router) > 500
                with engine() as url:
                    # Control logs each of these steps and goes on.
                    assert json.loads(client.ask(request("POST", "/workers", body=json.dumps({"url": url}).encode())).body)
                    for _ in range(3000):
                        assert get(router.port, "/workers")[0] == 200
                        if get(router.port, "/readyz")[0] == 200:
                            break
                    assert client.ask(post(b"{}")).status == 200
                end_s = time.monotonic() + WAIT_S
                while get(router.port, "/readyz")[0] == 200:
                    assert time.monotonic() < end_s, "no health check has seen that the worker is gone"
                    time.sleep(0.05)
            process.terminate()
            assert process.wait(WAIT_S) == 0, "nobody's reading is waited for at the end"
        finally:
            process.kill()
    os.close(reading)
