"""The demo: its parts against a scripted worker, then the whole of it, and a comparison of policies, with the real programs."""

import contextlib
import io
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import SeededRandom
from rich.console import Console
from test_load_client import Seen, serving, uvloop_run

from sglfast.errors import ConfigError
from sglfast.load.demo import WorkerView, live_line, live_table, main, what_to_try

ROOT = Path(__file__).parent.parent
SGLFAST = [sys.executable, "-m", "sglfast"]
TRIES = 6
LAST_SIGNAL_S = 6.0


def curls(text: str) -> list[list[str]]:
    return [shlex.split(line) for line in text.splitlines() if line.strip().startswith("curl ")]


def test_what_to_try_are_commands_that_can_be_copied() -> None:
    chat, stream, header, metrics = curls(what_to_try("http://127.0.0.1:8000"))
    for words in (chat, stream, header):
        body = json.loads(words[words.index("-d") + 1])
        assert body["model"] == "demo-model"
        assert body["messages"][0]["role"] == "user"
        assert "http://127.0.0.1:8000/v1/chat/completions" in words
        assert words[words.index("-H") + 1] in ("content-type: application/json", "x-sglfast-kv: 1")
        assert bool(body.get("stream")) is (words is stream)
    assert "x-sglfast-kv: 1" in header
    assert metrics[-1] == "http://127.0.0.1:8000/metrics"


def stats(requests: int, running: int, prompt: int, cached: int) -> bytes:
    names = {"requests": requests, "running": running, "waiting": 1, "prompt_tokens_total": prompt, "cached_tokens_total": cached}
    body = json.dumps(names).encode()
    return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body


def test_view_of_the_workers() -> None:
    def script(seen: Seen) -> Iterator[bytes]:
        assert seen.path == "/sim/stats"
        yield stats(1200, 2, 4000, 1000) if server.connections == 1 else stats(300, 0, 2000, 2000)

    async def run(urls: list[str]) -> list[WorkerView]:
        workers = [WorkerView(url) for url in urls]
        for worker in workers:
            await worker.refresh()
            await worker.close()
        return workers

    with serving(script) as server:
        workers = uvloop_run(run([server.url, server.url, "http://127.0.0.1:1"]))
    line = " ".join(live_line(workers, 61.0).split())
    assert line == "61 s requests per worker 1200 / 300 / down in flight 4 prefix hits 50.0 % of tokens"
    output = io.StringIO()
    Console(file=output, width=100).print(live_table(workers))
    rows = [[cell.strip() for cell in line.split("│")] for line in output.getvalue().splitlines() if "│" in line]
    assert [row[1:] for row in rows] == [
        ["1,200", "3", "4,000", "25.0 %"], ["300", "1", "2,000", "100.0 %"], ["0", "0", "0", "-"], ["1,500", "4", "6,000", "50.0 %"],
    ]  # fmt: skip
    assert rows[2][0] == "http://127.0.0.1:1 (down)"


def test_worker_that_answers_nonsense_is_down() -> None:
    async def run(url: str) -> bool:
        worker = WorkerView(url)
        await worker.refresh()
        await worker.close()
        return worker.is_up

    with serving(lambda _: [b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n<p>"]) as server:
        assert not uvloop_run(run(server.url))


def test_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} on 127.0.0.1 cannot be used.*try --port \d+"):
            main(["--port", str(port)])


@pytest.mark.parametrize("argv", [["--workers", "0"], ["--interval", "0"], ["--seconds", "-1"], ["--port", "-1"]])
def test_settings_that_cannot_work(argv: list[str]) -> None:
    with pytest.raises(ConfigError, match=rf"{argv[0]} {argv[1]}.*: must be at least"):
        main(argv)


def test_pairs_need_two_workers_and_no_scale_out() -> None:
    with pytest.raises(ConfigError, match=r"^--workers 1: --pd needs at least 2"):
        main(["--pd", "--workers", "1"])
    with pytest.raises(ConfigError, match=r"^--pd and --scale-out: give one of them$"):
        main(["--pd", "--scale-out"])


# ---- the real programs ----


@contextlib.contextmanager
def demo(*flags: str) -> Iterator[subprocess.Popen[str]]:
    command = [*SGLFAST, "demo", "--port", "0", "--interval", "0.2", *flags]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def descendants(pid: int) -> set[int]:
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found |= {child} | descendants(child)
    return found


def wait_gone(pids: set[int], timeout_s: float = 20.0) -> None:
    end_s = time.monotonic() + timeout_s
    while left := {pid for pid in pids if Path(f"/proc/{pid}").exists()}:
        assert time.monotonic() < end_s, f"still there: {left}"
        time.sleep(0.02)


def read_until(process: subprocess.Popen[str], words: str) -> str:
    assert process.stdout is not None
    text = ""
    for line in process.stdout:
        text += line
        if words in line:
            return text
    raise AssertionError(f"ended before {words!r}:\n{text}")


def run_curl(words: list[str]) -> tuple[bytes, dict[str, str]]:
    """Do what curl would, without needing curl."""
    url = next(word for word in words if word.startswith("http"))
    headers = dict(words[place + 1].split(": ", 1) for place, word in enumerate(words) if word == "-H")
    body = words[words.index("-d") + 1].encode() if "-d" in words else None
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=30) as answer:
            return answer.read(), {name.lower(): value for name, value in answer.headers.items()}
    except urllib.error.HTTPError as error:
        with error:
            pytest.fail(f"{url} answers {error.code}: {error.read().decode()}")


def test_printed_commands_work_and_ctrl_c_stops_everything() -> None:
    with demo() as process:
        chat, stream, header, metrics = curls(read_until(process, "Ctrl-C"))
        message = json.loads(run_curl(chat)[0])["choices"][0]["message"]
        assert message["role"] == "assistant"
        assert message["content"]
        events = run_curl(stream)[0].split(b"\n\n")
        assert len(events) > 3
        assert events[-2] == b"data: [DONE]"
        assert "worker=http://127.0.0.1:" in run_curl(header)[1]["x-sglfast-kv"]
        assert b"sglfast_" in run_curl(metrics)[0]
        read_until(process, "requests per worker")
        pids = descendants(process.pid)
        assert len(pids) >= 4  # simulator, control, index, a shard
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
        assert process.returncode == 0, rest
        wait_gone(pids)


def test_traffic_moves_the_view_and_sigterm_stops_everything() -> None:
    with demo("--traffic", "--workers", "2") as process:
        text = read_until(process, "Ctrl-C")
        while not re.search(r"requests per worker (\d+ / [1-9]|[1-9]\d* / \d)", text):
            text = read_until(process, "requests per worker")
        pids = descendants(process.pid)
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=60)
        assert process.returncode == 0, rest
        assert "Traceback" not in rest
        wait_gone(pids)


def test_prefill_and_decode_apart() -> None:
    with demo("--pd", "--workers", "3") as process:
        text = read_until(process, "Ctrl-C")
        assert "3 simulated workers (1 for prefill, the others for decode)" in text
        chat = curls(text)[0]
        assert json.loads(run_curl(chat)[0])["choices"][0]["message"]["content"]
        line = read_until(process, "requests per worker")
        while not re.search(r"requests per worker 1 / (0 / 1|1 / 0) ", line):
            line = read_until(process, "requests per worker")


@pytest.mark.parametrize("attempt", range(TRIES))
def test_signal_at_any_moment_ends_it_and_its_children(rng: SeededRandom, attempt: int) -> None:
    """From the first import over the start of the children to the traffic; bounded, and nothing is left."""
    after_s = LAST_SIGNAL_S * (attempt + rng.random()) / TRIES
    with demo("--traffic", "--workers", "1") as process:
        end_s, pids = time.monotonic() + after_s, set[int]()
        while time.monotonic() < end_s:
            pids |= descendants(process.pid)  # also of those that end by themselves
            time.sleep(0.02)
        process.send_signal(rng.choice((signal.SIGTERM, signal.SIGINT)))
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            pids |= descendants(process.pid)
        rest, _ = process.communicate(timeout=60)
        assert process.returncode in (0, 1, 130, -signal.SIGTERM, -signal.SIGINT), rest  # not 0: it came before the demo was there
        assert process.returncode == 0 or "Starting" not in rest, rest
        wait_gone(pids)


def test_killed_demo_leaves_no_process() -> None:
    with demo("--workers", "1") as process:
        read_until(process, "requests per worker")
        pids = descendants(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(20)
        wait_gone(pids)


def test_once() -> None:
    done = subprocess.run(
        [*SGLFAST, "demo", "--port", "0", "--workers", "1", "--once"], cwd=ROOT, text=True, capture_output=True, timeout=90
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall("requests per worker 0 ", done.stdout)) == 1


def test_compare_policies(tmp_path: Path) -> None:
    """Conversations on small caches: cache_aware finds more of them than round_robin, and says beforehand what it will find."""
    command = [
        *SGLFAST, "replay", "--compare", "round_robin,cache_aware", "--users", "20", "--turns", "4", "--arrivals-per-s", "5",
        "--speed-up", "16", "--max-output-tokens", "4", "--settled-checks", "12", "--sim-prefill-tokens-per-s", "50000",
        "--serve-flags", "--shards 1", "--json", str(tmp_path / "run.json"), "--plot", str(tmp_path / "run.svg"),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (json.loads((tmp_path / f"run-{name}.json").read_text())["summary"] for name in ("round_robin", "cache_aware"))
    assert first["errors"] == second["errors"] == {}
    assert len(first["requests_per_worker"]) == 4
    assert second["hit_tokens"] > first["hit_tokens"] + 0.1
    assert second["settled"]["checked"] == 12
    assert second["settled"]["exact"] == 12
    assert "cache_aware" in (tmp_path / "run.svg").read_text()
