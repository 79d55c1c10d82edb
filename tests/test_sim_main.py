"""sim/main.py as a process: announcement, help, wrong settings, signals."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from sglfast.sim.main import build_parser, main
from sglfast.sim.settings import SimSettings

COMMAND = [sys.executable, "-m", "sglfast.sim.main", "--base-port", "0"]
WAIT_S = 30


def end(process: "subprocess.Popen[bytes]", number: int) -> tuple[int, bytes]:
    process.send_signal(number)
    out, _ = process.communicate(timeout=WAIT_S)
    return process.returncode, out


def health(url: str) -> int:
    with urllib.request.urlopen(url + "/health", timeout=WAIT_S) as response:
        status: int = response.status
        return status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_announced_workers_listen_and_a_signal_ends_them(number: int) -> None:
    reader, writer = os.pipe()
    command = [*COMMAND, "--workers", "2", "--no-replay", "--announce-fd", str(writer)]
    process = subprocess.Popen(command, pass_fds=(writer,), stdout=subprocess.PIPE)
    os.close(writer)
    try:
        with open(reader, "rb") as pipe:
            line = pipe.readline()
        workers = json.loads(line)["workers"]
        assert len(workers) == 2
        for worker in workers:
            assert health(worker["url"]) == 200
            assert isinstance(worker["kv_port"], int)
            assert worker["replay_port"] is None
        code, out = end(process, number)
        assert code == 0
        assert b"2 workers of demo-model at " + workers[0]["url"].encode() in out
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_announcement_in_a_file_and_the_end_by_itself(tmp_path: Path) -> None:
    file = tmp_path / "announced.json"
    process = subprocess.Popen([*COMMAND, "--workers", "1", "--announce", str(file), "--max-seconds", "0.5"])
    try:
        deadline = time.monotonic() + WAIT_S
        while not file.exists():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
        (worker,) = json.loads(file.read_text())["workers"]
        assert set(worker) == {"url", "kv_port", "replay_port", "bootstrap_port"}
        assert process.wait(WAIT_S) == 0
        assert [path.name for path in tmp_path.iterdir()] == [file.name]
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workers", "0"], "--workers 0: must be at least 1"),
        (["--tokenizer-path", "/nowhere"], "/nowhere"),
        (["--announce", "/nowhere/file"], "announcement cannot be written"),
    ],
)
def test_what_cannot_work_ends_with_code_2_and_a_message(flags: list[str], message: str) -> None:
    done = subprocess.run([*COMMAND, *flags], capture_output=True, timeout=WAIT_S, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for word in (
        "--instant",
        "--kv-base-port",
        "/sim/fault",
        "/sim/restart",
        "/sim/drop_events",
        "/sim/keep_back_stores",
        "/sim/stats",
        "ignore_eos",
    ):
        assert word in text


def test_every_setting_is_a_flag_with_its_default() -> None:
    arguments = vars(build_parser().parse_args([]))
    for name in ("max_seconds", "announce", "announce_fd"):
        assert arguments.pop(name) is None
    assert SimSettings(**arguments) == SimSettings()
    changed = vars(build_parser().parse_args(["--no-replay", "--event-shape", "array", "--instant", "--dp-size", "2"]))
    assert (changed["replay"], changed["event_shape"], changed["instant"], changed["dp_size"]) == (False, "array", True, 2)
