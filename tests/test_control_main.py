"""`sglfast serve` as a process: its flags, its start, its signals, its end. Children are stand-ins, but for the last test."""

import contextlib
import json
import logging
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from control_doubles import STANDIN
from router_process import WORKER, Router, engine, get, is_alive, running

from sglfast.config import ServeConfig
from sglfast.control.main import _create_maps, main


@contextlib.contextmanager
def serving(tmp_path: Path, *flags: str, index: str = "serve", shard: str = "serve") -> Iterator[Router]:
    """A control with stand-in children, listening."""
    with running(tmp_path, [sys.executable, STANDIN, "control", index, shard], "--shards", "1", *flags) as router:
        router.until_listening()
        yield router


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_what_is_in_flight_and_ends_with_0(tmp_path: Path, number: signal.Signals) -> None:
    with serving(tmp_path) as router, router.saying("work 0.6") as client:
        lines = client.makefile()
        assert lines.readline() == "begun\n"
        children = router.children()
        assert len(children) == 2
        router.signal(number)
        router.until(lambda: "draining inflight_requests=1 grace_s=180.0" in router.err, "drain")
        with router.saying("who") as late:
            assert int(late.makefile().readline()) in children, "a shard that drains still serves"
        assert int(lines.readline()) in children, "what was in flight is answered"
        assert router.end() == 0
        assert "shard0 was told b'q', draining=True" in router.err
        assert "requests are cut" not in router.err
        assert not any(map(is_alive, children))


def test_nothing_in_flight_ends_at_once(tmp_path: Path) -> None:
    with serving(tmp_path) as router:
        begun_s = time.monotonic()
        router.signal(signal.SIGTERM)
        assert router.end() == 0
        assert time.monotonic() - begun_s < 10, "it waited for the grace of 180 s"


def test_the_grace_is_the_longest_wait(tmp_path: Path) -> None:
    with serving(tmp_path, "--shutdown-grace-secs", "0.2") as router, router.saying("work 60") as client:
        assert client.makefile().readline() == "begun\n"
        router.signal(signal.SIGTERM)
        assert router.end() == 0
        assert "the grace is over, requests are cut inflight_requests=1" in router.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(tmp_path: Path, number: signal.Signals) -> None:
    with serving(tmp_path) as router, router.saying("work 60") as client:
        assert client.makefile().readline() == "begun\n"
        children = router.children()
        router.signal(signal.SIGTERM)
        router.until(lambda: "draining" in router.err, "drain")
        router.signal(number)
        assert router.end() == 128 + number
        assert not any(map(is_alive, children))


def test_a_signal_before_it_listens_ends_it(tmp_path: Path) -> None:
    argv = [sys.executable, STANDIN, "control", "serve", "silent"]
    with running(tmp_path, argv, "--shards", "1") as router:
        router.until(lambda: len(router.children()) == 2, "children")
        router.signal(signal.SIGTERM)
        assert router.end() == 0
        assert router.process.stdout is not None
        assert router.process.stdout.read() == "", "it never listened, and never said so"


def test_no_child_outlives_a_killed_control(tmp_path: Path) -> None:
    with serving(tmp_path, index="stubborn") as router:
        children = router.children()
        assert len(children) == 2
        router.signal(signal.SIGKILL)
        assert router.end() == -signal.SIGKILL
        router.until(lambda: not any(map(is_alive, children)), "the children die")


def test_a_crash_loop_ends_it_with_the_childs_last_words(tmp_path: Path) -> None:
    argv = [sys.executable, STANDIN, "control", "serve", "crash"]
    with running(tmp_path, argv, "--shards", "1") as router:
        assert router.end() == 1
        last = [line for line in router.err.splitlines() if "ERROR" in line]
        assert len(last) == 1
        assert last[0].endswith(
            "shard0 did not start in 3 attempts; the last time: exit code 1: ValueError: there is no tokenizer; the router ends"
        )
        assert router.err.count("half of the story") == 3, "all that children write comes through"


def test_settings_that_a_child_finds_out_to_be_wrong_end_it_at_once(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "sglfast", "serve"]
    (tmp_path / "tokenizer.json").write_text("{}")
    with running(tmp_path, argv, "--shards", "2", "--tokenizer-path", str(tmp_path)) as router:
        assert router.end() == 2
        (said,) = (line for line in router.err.splitlines() if "ERROR" in line)
        assert f"tokenizer file {tmp_path}/tokenizer.json: not a tokenizer.json of Hugging Face" in said
        assert said.endswith("; the router ends")
        assert "Traceback" not in router.err
        assert "started again" not in router.err


def test_a_port_that_somebody_has_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["--worker-urls", WORKER, "--host", "127.0.0.1", "--port", str(port)]) == 2
    assert f"sglfast serve: port {port} is in use on 127.0.0.1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--worker-urls", WORKER, "--prefill", "http://127.0.0.1:2"], "sglfast serve: --prefill needs --decode: "),
        (["--worker-urls", WORKER, "--shards", "-1"], "sglfast serve: --shards -1: must be at least 0"),
        (["--worker-urls", WORKER, "--port", "0", "--host", "192.0.2.1"], "sglfast serve: --host 192.0.2.1: is no address"),
    ],
)
def test_a_flag_that_cannot_work_ends_with_2(argv: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith(text)
    assert err.count("\n") == 1


def test_without_workers_it_serves_and_is_not_ready(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "sglfast", "serve", "--shards", "1", "--worker-urls"]
    with running(tmp_path, argv, worker="--worker-urls") as router:
        router.until_listening()
        status, text = get(router.port, "/readyz")
        assert (status, json.loads(text)["reason"]) == (503, "insufficient healthy workers")
        assert get(router.port, "/health") == (200, "OK")
        assert get(router.port, "/v1/completions", {"prompt": "x"})[0] == 503
        router.signal(signal.SIGTERM)
        assert router.end() == 0


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for part in ("usage: sglfast serve", "sglfast serve --worker-urls http://", "--tokenizer-path", "curl http://", "exit codes: 0"):
        assert part in text


def test_the_real_router_serves_heals_and_ends(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "sglfast", "serve", "--health-check-interval-secs", "0.2"]
    with engine() as url, running(tmp_path, argv, "--shards", "2", worker=url) as router:
        router.until_listening()
        router.until(lambda: get(router.port, "/readyz")[0] == 200, "ready")
        assert get(router.port, "/v1/completions", {"prompt": "x"}) == (200, '{"prompt": "x"}')
        status, text = get(router.port, "/metrics")
        assert (status, 'sglfast_worker_up{model="m1"' in text) == (200, True)
        assert get(router.port, "/v1/models")[1].count('"m1"')
        shard = max(pid for pid in router.children() if b"edge.main" in Path(f"/proc/{pid}/cmdline").read_bytes())
        os.kill(shard, signal.SIGKILL)
        router.until(lambda: "process=shard" in router.err and len(router.children()) == 3, "started again")
        for _ in range(8):
            assert get(router.port, "/v1/completions", {"prompt": "y"})[0] == 200
        router.signal(signal.SIGTERM)
        assert router.end() == 0


def test_those_who_wait_for_their_turn_are_served_before_the_end(tmp_path: Path) -> None:
    """Between two of them no request is in flight, for as long as the rate says."""
    argv = [sys.executable, "-m", "sglfast", "serve", "--shards", "1", "--rate-limit-tokens-per-second", "2"]
    with engine() as url, running(tmp_path, argv, worker=url) as router, ThreadPoolExecutor(6) as clients:
        router.until_listening()
        router.until(lambda: get(router.port, "/readyz")[0] == 200, "ready")
        asked = [clients.submit(get, router.port, "/v1/completions", {"prompt": "x"}) for _ in range(6)]
        router.until(lambda: "sglfast_waiting_requests 4.0" in get(router.port, "/metrics")[1], "four wait")
        router.signal(signal.SIGTERM)
        assert [answer.result()[0] for answer in asked] == [200] * 6
        assert router.end() == 0
        assert "requests are cut" not in router.err


def test_a_limit_on_files_costs_the_maps_their_second_life_and_no_more(caplog: pytest.LogCaptureFixture) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        assert _create_maps(ServeConfig(max_ranks=64), logging.getLogger("test.control")) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "will not outlive the index process: no file for it (File too large)" in caplog.text
