"""The owner of child processes, with small scripts in the place of router and simulator; the real ones are in test_load_demo.py."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_load_client import serving

from sglfast.errors import ConfigError
from sglfast.load import stack
from sglfast.load.stack import (
    Child,
    SimSettings,
    Stack,
    StackError,
    check_port,
    wait_announced,
    wait_ready,
)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def wait_for(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "waited in vain"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


@pytest.fixture
def children() -> Iterator[Callable[[str, str], Child]]:
    started: list[Child] = []

    def start(name: str, code: str) -> Child:
        started.append(Child(name, python(code)))
        return started[-1]

    yield start
    for child in started:
        child.stop(grace_s=0.0)


def test_child_that_ends_by_itself_is_reported_with_its_output(children: Callable[[str, str], Child]) -> None:
    child = children("router", "import sys; print('cannot listen'); sys.exit(3)")
    wait_for(lambda: not is_alive(child.pid))
    with pytest.raises(StackError, match=r"the router ended by itself \(exit code 3\).*\n  \| cannot listen"):
        child.check_alive()


def test_stop_is_gentle_first(children: Callable[[str, str], Child]) -> None:
    code = (
        "import signal, sys, time\nsignal.signal(15, lambda *_: (print('bye', flush=True), sys.exit(0)))\n"
        "print('up', flush=True)\ntime.sleep(60)"
    )
    child = children("router", code)
    wait_for(lambda: "up" in child.log_tail())
    child.signal_stop()
    wait_for(lambda: not is_alive(child.pid))
    assert "bye" in child.log_tail()


def test_child_that_will_not_end_is_killed(children: Callable[[str, str], Child]) -> None:
    child = children("router", "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)")
    wait_for(lambda: "up" in child.log_tail())
    child.stop(grace_s=0.1)
    assert not is_alive(child.pid)


def test_children_die_with_their_owner() -> None:
    owner = (
        "import sys, time\nfrom sglfast.load.stack import Child\n"
        "child = Child('c', [sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\ntime.sleep(60)\n"
    )
    with subprocess.Popen(python(owner), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert is_alive(pid)
        process.kill()
    wait_for(lambda: not is_alive(pid))


def test_ctrl_c_of_the_terminal_does_not_reach_children(children: Callable[[str, str], Child]) -> None:
    child = children("router", "import time; time.sleep(60)")
    assert os.getsid(child.pid) == child.pid != os.getsid(0)


def test_announced_workers() -> None:
    text = '{"workers": [{"url": "http://a", "kv_port": 1}, {"url": "http://b"}]}\n'
    with tempfile.TemporaryFile() as file:
        code = (
            f"import os, time\nfd = {file.fileno()}\nos.write(fd, {text[:20].encode()!r})\ntime.sleep(0.2)\n"
            f"os.write(fd, {text[20:].encode()!r})\ntime.sleep(60)"
        )
        child = Child("simulator", python(code), [file.fileno()])
        try:
            assert wait_announced(file.fileno(), child) == ["http://a", "http://b"]
        finally:
            child.stop()


def test_workers_that_never_come(children: Callable[[str, str], Child]) -> None:
    child = children("simulator", "import time; print('thinking', flush=True); time.sleep(60)")
    wait_for(lambda: "thinking" in child.log_tail())
    words = r"the simulator was not ready within 0 s; its last lines:\n  \| thinking"
    with tempfile.TemporaryFile() as file, pytest.raises(StackError, match=words):
        wait_announced(file.fileno(), child, timeout_s=0.1)


def test_ready_is_waited_for(children: Callable[[str, str], Child]) -> None:
    answers = [b"HTTP/1.1 503 X\r\ncontent-length: 0\r\n\r\n"] * 2 + [b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"]
    child = children("router", "import time; time.sleep(60)")
    with serving(lambda _: [answers[len(server.seen) - 1]]) as server:
        wait_ready("127.0.0.1", int(server.url.rpartition(":")[2]), child, timeout_s=20)
    assert [seen.path for seen in server.seen] == ["/readyz"] * 3


def free_port() -> int:
    """A port that nobody listens on right now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def test_router_that_is_never_ready(children: Callable[[str, str], Child]) -> None:
    child = children("router", "import time; time.sleep(60)")
    with (
        serving(lambda _: [b"HTTP/1.1 503 X\r\ncontent-length: 0\r\n\r\n"]) as server,
        pytest.raises(StackError, match=r"not ready within 0 s \(/readyz answers 503\)"),
    ):
        wait_ready("127.0.0.1", int(server.url.rpartition(":")[2]), child, timeout_s=0.2)
    with pytest.raises(StackError, match=r"not ready within 0 s \(/readyz: .*refused"):
        wait_ready("127.0.0.1", free_port(), child, timeout_s=0.2)


def test_port_in_use_names_another() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"port {port} on 127.0.0.1 cannot be used \(Address already in use\); try --port \d+"
        ) as raised:
            check_port("127.0.0.1", port)
    other = int(str(raised.value).rpartition(" ")[2])
    check_port("127.0.0.1", other)
    check_port("127.0.0.1", port)


def test_address_that_is_not_ours() -> None:
    with pytest.raises(ConfigError, match=r"port 8000 on 192.0.2.1 cannot be used"):
        check_port("192.0.2.1", 8000)


def test_sim_flags() -> None:
    assert SimSettings(workers=2, tokenizer_path="/t").flags() == ["--workers", "2", "--base-port", "0", "--tokenizer-path", "/t"]
    assert SimSettings(kv_events=False, tokenizer_path="/t").flags()[-1] == "--no-kv-events"
    assert SimSettings(mode="decode").flags()[-2:] == ["--disaggregation-mode", "decode"]
    assert SimSettings(mode="prefill").flags()[-4:] == ["--disaggregation-mode", "prefill", "--disaggregation-bootstrap-port", "0"]
    flags = SimSettings(cache_tokens=3_000_000, page_tokens=16, prefill_tokens_per_s=120_000.0, decode_tokens_per_s=0.5).flags()
    pairs = dict(zip(flags[::2], flags[1::2], strict=True))
    assert pairs["--cache-tokens"] == "3000000"
    assert pairs["--page-size"] == "16"
    assert float(pairs["--prefill-tokens-per-s"]) == 120_000
    assert float(pairs["--decode-tokens-per-s-per-request"]) == 0.5


def test_stack_that_fails_to_start_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The simulator starts, the router does not: the simulator is stopped, the error has the router's words."""
    program = tmp_path / "sglfast.py"
    program.write_text(
        "import os, sys, time\n"
        "if sys.argv[1] == 'serve':\n    sys.exit('no such policy')\n"
        "fd = int(sys.argv[sys.argv.index('--announce-fd') + 1])\n"
        'os.write(fd, b\'{"workers": [{"url": "http://127.0.0.1:1"}]}\\n\')\n'
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(stack, "SGLFAST", (sys.executable, str(program)))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    owner = Stack(SimSettings())
    with pytest.raises(StackError, match=r"the router ended by itself \(exit code 1\).*\n  \| no such policy"):
        owner.__enter__()
    assert owner.children == []
    assert [path.name for path in tmp_path.iterdir()] == ["sglfast.py"]
